// Threads that work through a list of tasks together.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace unetrt {

// `items` pieces of work, in any order and on any thread.
struct Task {
    int items;
    std::function<void(int item, float* scratch)> run;
};

// Who waits spins for a moment and then sleeps, so that several pools may share the cores.
class Signal {
  public:
    // Returns when `holds`, which reads atomics only, is true; notify() must follow what makes it true.
    template <typename Condition>
    void wait(Condition holds) {
        if (spin(holds)) return;
        std::unique_lock lock(mutex_);
        sleepers_.fetch_add(1);
        changed_.wait(lock, holds);
        sleepers_.fetch_sub(1);
    }

    void notify() {
        if (sleepers_.load() == 0) return;
        std::lock_guard lock(mutex_);
        changed_.notify_all();
    }

  private:
    template <typename Condition>
    bool spin(Condition holds);

    std::mutex mutex_;
    std::condition_variable changed_;
    std::atomic<int> sleepers_{0};
};

class Pool {
  public:
    // threads: the caller's included.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // One task after the other, each by all threads; scratch: [threads][scratch_floats]. seconds: [tasks], what each
    // took, or null. Calls from several threads run one after the other.
    void run(const std::vector<Task>& tasks, float* scratch, int64_t scratch_floats, double* seconds);

  private:
    using Clock = std::chrono::steady_clock;

    // Items begun and done of a task, on a cache line of their own.
    struct alignas(64) Progress {
        std::atomic<int> begun{0}, done{0};
    };
    struct Job {
        const std::vector<Task>* tasks;
        float* scratch;
        int64_t scratch_floats;
        // When each task was done, or null.
        Clock::time_point* ends;
    };

    void stop();
    void serve(int thread);
    void work(const Job& job, int thread);

    std::mutex calls_;
    std::vector<std::thread> workers_;
    std::vector<Progress> progress_;
    Job job_{};
    Signal begun_, advanced_, left_;
    // Odd: a job runs, which workers may still enter.
    std::atomic<uint64_t> epoch_{0};
    std::atomic<int> inside_{0};
    std::atomic<bool> ends_{false};
};

}  // namespace unetrt
