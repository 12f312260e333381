#include "engine.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <string>

#include "error.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace unetrt {

namespace {

constexpr size_t kLine = 64, kHugePage = size_t{1} << 21;
constexpr int kMostBatch = 1 << 16;
constexpr int64_t kMostFloats = int64_t{1} << 40;

}  // namespace

Floats::Floats(int64_t count) {
    if (count == 0) return;
    const size_t bytes = static_cast<size_t>(count) * sizeof(float);
    const size_t unit = bytes >= kHugePage ? kHugePage : kLine, size = (bytes + unit - 1) / unit * unit;
    data_.reset(static_cast<float*>(std::aligned_alloc(unit, size)));
    if (data_ == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    // Maps are read in strides that many small pages would make slow; without huge pages it works too.
    if (unit == kHugePage) (void)madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
    std::memset(data_.get(), 0, size);
}

Engine::Engine(std::shared_ptr<const Layout> layout, const float* packed, std::shared_ptr<Pool> pool)
    : layout_(std::move(layout)), packed_(packed), pool_(std::move(pool)) {}

void Engine::run(int batch, const float* x, const float* rows, float* out, double* seconds) {
    if (batch < 1 || batch > kMostBatch) {
        throw Error("the batch is " + std::to_string(batch) + "; expected 1 to " + std::to_string(kMostBatch));
    }
    if (x == nullptr || out == nullptr || (rows == nullptr && layout_->row_width > 0)) {
        throw Error("x, out or rows is NULL; give them all");
    }
    const std::lock_guard lock(mutex_);
    const Bound& bound = find_bound(batch);
    pad_rows(batch, rows);
    request_ = {x, out};
    std::vector<double> times(seconds == nullptr ? 0 : bound.tasks.size());
    pool_->run(bound.tasks, scratch_.data(), scratch_floats_, seconds == nullptr ? nullptr : times.data());
    if (seconds != nullptr) std::fill(seconds, seconds + operators(), 0.0);
    for (size_t i = 0; i < times.size(); ++i) seconds[bound.operators[i]] += times[i];
}

// Tasks know where the maps lie, so that a larger arena makes them anew.
void Engine::make_room(int batch) {
    if (batch <= most_) return;
    if (layout_->arena > kMostFloats / batch) throw std::bad_alloc();
    const Memory memory = count_memory(*layout_, batch);
    bound_.clear();
    most_ = 0;
    for (Floats* floats : {&maps_, &rows_, &statistics_, &shared_, &scratch_}) *floats = Floats();
    maps_ = Floats(memory.maps);
    rows_ = Floats(memory.rows);
    statistics_ = Floats(memory.statistics);
    shared_ = Floats(memory.shared);
    // Whole lines, so that no two threads write one.
    constexpr int64_t unit = kLine / sizeof(float);
    scratch_floats_ = (memory.scratch + unit - 1) / unit * unit;
    scratch_ = Floats(scratch_floats_ * pool_->threads());
    most_ = batch;
}

const Bound& Engine::find_bound(int batch) {
    make_room(batch);
    const auto known = bound_.find(batch);
    if (known != bound_.end()) return known->second;
    const Places places{packed_, maps_.data(), rows_.data(), statistics_.data(), shared_.data(), &request_};
    return bound_.emplace(batch, bind(*layout_, batch, pool_->threads(), places)).first->second;
}

void Engine::pad_rows(int batch, const float* rows) {
    for (int n = 0; n < batch; ++n)
        for (const RowCopy& copy : layout_->rows) {
            const float* from = rows + static_cast<int64_t>(n) * layout_->row_width + copy.column;
            float* to = rows_.data() + n * layout_->padded_rows + copy.padded;
            std::memcpy(to, from, static_cast<size_t>(copy.count) * sizeof(float));
        }
}

}  // namespace unetrt
