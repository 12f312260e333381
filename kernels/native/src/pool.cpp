#include "pool.h"

namespace unetrt {

namespace {

constexpr auto kSpin = std::chrono::microseconds(100);

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#else
    std::this_thread::yield();
#endif
}

}  // namespace

template <typename Condition>
bool Signal::spin(Condition holds) {
    if (holds()) return true;
    const auto end = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 16; ++i) {
            pause();
            if (holds()) return true;
        }
    } while (std::chrono::steady_clock::now() < end);
    return false;
}

Pool::Pool(int threads) {
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { serve(i); });
    } catch (...) {
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    ends_ = true;
    begun_.notify();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::run(const std::vector<Task>& tasks, float* scratch, int64_t scratch_floats, double* seconds) {
    const std::lock_guard lock(calls_);
    if (progress_.size() < tasks.size()) progress_ = std::vector<Progress>(tasks.size());
    for (Progress& progress : progress_) {
        progress.begun = 0;
        progress.done = 0;
    }
    std::vector<Clock::time_point> ends(seconds == nullptr ? 0 : tasks.size());
    job_ = {&tasks, scratch, scratch_floats, seconds == nullptr ? nullptr : ends.data()};
    auto start = Clock::now();
    ++epoch_;
    begun_.notify();
    work(job_, 0);
    ++epoch_;
    left_.wait([this] { return inside_ == 0; });
    for (size_t t = 0; t < ends.size(); start = ends[t++]) {
        seconds[t] = std::chrono::duration<double>(ends[t] - start).count();
    }
}

void Pool::serve(int thread) {
    uint64_t last = 0;
    for (;;) {
        begun_.wait([&] { return ends_ || (epoch_ % 2 == 1 && epoch_ != last); });
        if (ends_) return;
        const uint64_t epoch = epoch_;
        // run() waits for who is inside once the epoch is over: either this thread sees that, or run() sees this thread.
        ++inside_;
        if (epoch % 2 == 1 && epoch_ == epoch) {
            work(job_, thread);
            last = epoch;
        }
        if (--inside_ == 0) left_.notify();
    }
}

void Pool::work(const Job& job, int thread) {
    float* scratch = job.scratch + thread * job.scratch_floats;
    for (size_t t = 0; t < job.tasks->size(); ++t) {
        const Task& task = (*job.tasks)[t];
        Progress& progress = progress_[t];
        for (int item = progress.begun++; item < task.items; item = progress.begun++) {
            task.run(item, scratch);
            // Read before others can see that the task is done, so that the times of tasks follow one another.
            const auto now = job.ends == nullptr ? Clock::time_point{} : Clock::now();
            if (++progress.done < task.items) continue;
            advanced_.notify();
            if (job.ends != nullptr) job.ends[t] = now;
        }
        advanced_.wait([&] { return progress.done == task.items; });
    }
}

}  // namespace unetrt
