// What the checks of kernels share: maps that own their floats, seeded values, comparison with doubles.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "unetrt_native.h"

namespace unetrt::check {

constexpr int kSkipped = 77;  // Exit status: this CPU lacks the instruction set.

#define UNETRT_NAME_(x) #x
#define UNETRT_NAME(x) UNETRT_NAME_(x)

inline bool has_instruction_set() {
    for (int isa = UNETRT_ISA_PORTABLE; isa <= UNETRT_ISA_AMX_BF16; ++isa) {
        const Kernels* kernels = find_kernels(isa);
        if (kernels != nullptr && std::strcmp(kernels->name, UNETRT_NAME(UNETRT_ISA)) == 0) return true;
    }
    return false;
}

// Values in [-1, 1) of a linear congruential generator.
class Random {
  public:
    explicit Random(uint32_t seed) : state_(seed) {}

    float next() {
        state_ = state_ * 1664525u + 1013904223u;
        return static_cast<float>(state_ >> 8) / 8388608.0f - 1.0f;
    }

  private:
    uint32_t state_;
};

struct Shape {
    int channels, height, width, border, images;
};

#ifdef UNETRT_ELEMENT_BF16
using Stored = uint16_t;
#else
using Stored = float;
#endif
constexpr int kBlock = kLineBytes / sizeof(Stored);

// One value of a map, as a float.
class Cell {
  public:
    explicit Cell(Stored* place) : place_(place) {}
    Cell(const Cell&) = default;
    operator float() const {
        uint32_t bits = 0;
        // bfloat16 is the upper half of a float.
        std::memcpy(reinterpret_cast<char*>(&bits) + sizeof bits - sizeof(Stored), place_, sizeof(Stored));
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    Cell& operator=(float value) {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof bits);
        if (sizeof(Stored) == 2 && value == value) bits += 0x7fff + (bits >> 16 & 1);
        std::memcpy(place_, reinterpret_cast<const char*>(&bits) + sizeof bits - sizeof(Stored), sizeof(Stored));
        return *this;
    }
    Cell& operator=(const Cell&) = delete;
    Cell& operator*=(float factor) { return *this = *this * factor; }

  private:
    Stored* place_;
};

class OwnedMap {
  public:
    OwnedMap(const Shape& shape, float fill)
        : map_{nullptr, shape.channels, shape.height, shape.width, shape.border, shape.images, kBlock},
          stored_(static_cast<size_t>(map_.blocks() * map_.plane() * kBlock)) {
        map_.data = stored_.data();
        for (size_t i = 0; i < stored_.size(); ++i) Cell{stored_.data() + i} = fill;
    }
    OwnedMap(const OwnedMap&) = delete;
    OwnedMap& operator=(const OwnedMap&) = delete;

    const Map& map() const { return map_; }
    Cell at(int image, int channel, int y, int x) const {
        return Cell(static_cast<Stored*>(map_.at(channel / kBlock, y, x)) + image * kBlock + channel % kBlock);
    }

    // Every channel of every image; of factor * [-1, 1).
    void randomise(uint32_t seed, float factor) const {
        Random random(seed);
        for (int n = 0; n < map_.images; ++n)
            for (int c = 0; c < map_.channels; ++c)
                for (int y = 0; y < map_.height; ++y)
                    for (int x = 0; x < map_.width; ++x) at(n, c, y, x) = factor * random.next();
    }

  private:
    Map map_;
    std::vector<Stored> stored_;
};

constexpr float kUnwritten = std::numeric_limits<float>::quiet_NaN();

// Whether the padding of a map, its border and its missing channels, is 0.
inline bool has_zero_padding(const OwnedMap& owned) {
    const Map& map = owned.map();
    for (int n = 0; n < map.images; ++n)
        for (int c = 0; c < map.blocks() * kBlock; ++c)
            for (int y = -map.border; y < map.height + map.border; ++y)
                for (int x = -map.border; x < map.width + map.border; ++x) {
                    const bool is_inside = y >= 0 && y < map.height && x >= 0 && x < map.width && c < map.channels;
                    if (!is_inside && !(owned.at(n, c, y, x) == 0.0f)) return false;
                }
    return true;
}

// [images][channels][height][width] doubles that a map should hold.
class Expected {
  public:
    explicit Expected(const Map& map)
        : channels_(map.channels),
          height_(map.height),
          width_(map.width),
          values_(static_cast<size_t>(map.images * map.channels * map.height * map.width)) {}

    double& at(int image, int channel, int y, int x) {
        const size_t row = (static_cast<size_t>(image) * channels_ + channel) * height_ + y;
        return values_[row * width_ + x];
    }

  private:
    size_t channels_, height_, width_;
    std::vector<double> values_;
};

// What a value of a map may be wrong by the rounding to bfloat16 alone, relative to it.
constexpr double kRounding = sizeof(Stored) == 2 ? 1.0 / 256 : 0.0;

// The largest difference beyond that; infinite where a value was not written.
inline double largest_error(const OwnedMap& owned, Expected& expected) {
    const Map& map = owned.map();
    double most = 0;
    for (int n = 0; n < map.images; ++n)
        for (int c = 0; c < map.channels; ++c)
            for (int y = 0; y < map.height; ++y)
                for (int x = 0; x < map.width; ++x) {
                    const double value = expected.at(n, c, y, x);
                    const double error = std::fabs(owned.at(n, c, y, x) - value) - kRounding * std::fabs(value);
                    most = error <= most ? most : std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
                }
    return most;
}

// Whether image `image` of a map is bit for bit the only image of another.
inline bool is_same_image(const OwnedMap& many, int image, const OwnedMap& one) {
    const Map& map = many.map();
    for (int c = 0; c < map.channels; ++c)
        for (int y = 0; y < map.height; ++y)
            for (int x = 0; x < map.width; ++x) {
                const float a = many.at(image, c, y, x), b = one.at(0, c, y, x);
                if (std::memcmp(&a, &b, sizeof a) != 0) return false;
            }
    return true;
}

// Prints a failure and returns 1, or returns 0.
inline int report(bool is_right, const char* what, const char* name, double error, double limit) {
    if (!is_right) std::printf("FAIL %s: %s, error %g, limit %g\n", name, what, error, limit);
    return is_right ? 0 : 1;
}

}  // namespace unetrt::check
