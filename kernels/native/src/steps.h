// A layout's steps as tasks, for one batch and one place of its maps.
#pragma once

#include <memory>
#include <vector>

#include "layout.h"
#include "pool.h"

namespace unetrt {

// Where a run's images, rows and results are; read when a task runs.
struct Request {
    const float* x;
    float* out;
};

// Floats that a layout needs for a batch besides the packed weights. scratch: for each thread.
struct Memory {
    int64_t maps, rows, statistics, shared, scratch;
};

// Where they are; rows: [batch][layout.padded_rows]. shared: workspace of one step at a time.
struct Places {
    const float* packed;
    float* maps;
    const float* rows;
    float* statistics;
    float* shared;
    const Request* request;
};

// operators: of the program, for each task. Segments are what the tasks of convolutions point to.
struct Bound {
    std::vector<Task> tasks;
    std::vector<int32_t> operators;
    std::vector<std::unique_ptr<std::vector<Segment>>> segments;
};

Memory count_memory(const Layout& layout, int32_t batch);

Bound bind(const Layout& layout, int32_t batch, int threads, const Places& places);

}  // namespace unetrt
