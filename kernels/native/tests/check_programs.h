// Programs put together by hand, and the C interface with owners.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "unetrt_native.h"

namespace unetrt::check {

struct FreeNetwork {
    void operator()(unetrt_network* network) const { unetrt_network_destroy(network); }
};
struct FreeEngine {
    void operator()(unetrt_engine* engine) const { unetrt_engine_destroy(engine); }
};
using Network = std::unique_ptr<unetrt_network, FreeNetwork>;
using Engine = std::unique_ptr<unetrt_engine, FreeEngine>;

// scale, zero: of bytes.
struct Shape {
    int channels, height, width;
    float scale = 0;
    int zero = 0;
};

// Fields that an operator does not use are -1 or 0.
inline unetrt_operator make_operator(int32_t code, int32_t dst, int32_t first, int32_t second = -1) {
    unetrt_operator op{};
    op.code = code;
    op.dst = dst;
    op.src[0] = first;
    op.src[1] = second;
    op.add = op.weight = op.bias = op.row = op.extra[0] = op.extra[1] = op.extra_weight = op.extra_bias = -1;
    op.scale = 1;
    return op;
}

class ProgramBuilder {
  public:
    ProgramBuilder(Shape in, int row_width) : in_(in), row_width_(row_width) {
        operators_.push_back(make_operator(UNETRT_INPUT, add_map(in), -1));
    }

    int add_map(Shape shape) {
        maps_.push_back(shape);
        return static_cast<int>(maps_.size()) - 1;
    }

    int32_t add_weights(int count) {
        weights_ += count;
        return weights_ - count;
    }

    void add(const unetrt_operator& op) { operators_.push_back(op); }

    // Ends the program: its words.
    std::vector<int32_t> end(int output) {
        add(make_operator(UNETRT_OUTPUT, -1, output));
        std::vector<int32_t> words = {UNETRT_MAGIC,
                                      UNETRT_FORMAT,
                                      static_cast<int32_t>(maps_.size()),
                                      static_cast<int32_t>(operators_.size()),
                                      in_.channels,
                                      maps_[static_cast<size_t>(output)].channels,
                                      row_width_,
                                      weights_};
        for (const Shape& map : maps_) {
            int32_t scale;
            std::memcpy(&scale, &map.scale, sizeof scale);
            words.insert(words.end(), {map.channels, map.height, map.width, scale, map.zero});
        }
        const auto first = reinterpret_cast<const int32_t*>(operators_.data());
        words.insert(words.end(), first, first + operators_.size() * sizeof(unetrt_operator) / sizeof(int32_t));
        return words;
    }

    int32_t weights() const { return weights_; }

  private:
    Shape in_;
    int row_width_;
    std::vector<Shape> maps_;
    std::vector<unetrt_operator> operators_;
    int32_t weights_ = 0;
};

inline std::vector<float> random_floats(size_t count, unsigned seed, float amplitude = 1) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0, amplitude);
    std::vector<float> values(count);
    for (float& value : values) value = normal(generator);
    return values;
}

// Aligned as engines need it.
class Packed {
  public:
    explicit Packed(uint64_t bytes)
        : bytes_(bytes), data_(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 64) / 64 * 64), std::free) {}
    void* data() const { return data_.get(); }
    uint64_t bytes() const { return bytes_; }

  private:
    uint64_t bytes_;
    std::unique_ptr<void, void (*)(void*)> data_;
};

// Of fp32 and of bf16, that this library and CPU have.
inline std::vector<int> instruction_sets() {
    std::vector<int> found;
    for (int isa = UNETRT_ISA_PORTABLE; isa <= unetrt_best_isa(UNETRT_FP32); ++isa) found.push_back(isa);
    for (int isa = UNETRT_ISA_AVX512_BF16; isa <= unetrt_best_isa(UNETRT_BF16); ++isa) found.push_back(isa);
    return found;
}

inline int failures = 0;

inline void expect(bool holds, const char* what) {
    if (holds) return;
    ++failures;
    std::printf("FAILED: %s (last error: %s)\n", what, unetrt_last_error());
}

}  // namespace unetrt::check
