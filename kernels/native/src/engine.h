#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

#include "layout.h"
#include "pool.h"
#include "steps.h"

namespace unetrt {

// 64-byte aligned floats that begin as zeros.
class Floats {
  public:
    explicit Floats(int64_t count = 0);
    float* data() const { return data_.get(); }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    std::unique_ptr<float, Free> data_;
};

// A layout with its weights and memory, and threads that other engines may use too; calls from several threads run one
// after the other.
class Engine {
  public:
    Engine(std::shared_ptr<const Layout> layout, const float* packed, std::shared_ptr<Pool> pool);

    // See unetrt_engine_run and, where seconds is not null, unetrt_engine_profile; raises Error, or std::bad_alloc where
    // the batch does not fit.
    void run(int batch, const float* x, const float* rows, float* out, double* seconds);
    int32_t operators() const { return layout_->operator_count; }
    const std::shared_ptr<Pool>& pool() const { return pool_; }

  private:
    void make_room(int batch);
    const Bound& find_bound(int batch);
    void pad_rows(int batch, const float* rows);

    const std::shared_ptr<const Layout> layout_;
    const float* packed_;
    std::mutex mutex_;
    Floats maps_, rows_, statistics_, shared_, scratch_;
    int64_t scratch_floats_ = 0;
    int most_ = 0;
    Request request_{};
    std::map<int, Bound> bound_;
    const std::shared_ptr<Pool> pool_;
};

}  // namespace unetrt
