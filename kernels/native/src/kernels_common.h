// What several kernels do with maps.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace unetrt::UNETRT_ISA {

UNETRT_INLINE int divide_up(int a, int b) { return (a + b - 1) / b; }
UNETRT_INLINE int least(int a, int b) { return a < b ? a : b; }

// Image 0 of a pixel of a map.
UNETRT_INLINE Element* at(const Map& map, int block, int y, int x) {
    return static_cast<Element*>(map.at(block, y, x));
}

// Elements of a row.
UNETRT_INLINE int64_t row_of(const Map& map) { return map.row() * kBlock; }

UNETRT_INLINE void fill(float* p, int64_t count, Vec value) {
    for (int64_t i = 0; i < count; i += kLanes) store(p + i, value);
}
UNETRT_INLINE void fill_zero(float* p, int64_t count) { fill(p, count, Vec{}); }

// Of whole lines.
UNETRT_INLINE void copy_lines(const Element* from, int64_t count, Element* to) {
    const auto* in = reinterpret_cast<const float*>(from);
    auto* out = reinterpret_cast<float*>(to);
    for (int64_t i = 0; i < count * kLineFloats; i += kLanes) store(out + i, load(in + i));
}

UNETRT_INLINE void fill_lines(void* lines, int64_t count, Vec value) {
    fill(static_cast<float*>(lines), count * kLineFloats, value);
}

UNETRT_INLINE void clear_lines(void* lines, int64_t count) { fill_lines(lines, count, Vec{}); }

// `value` beside rows [from, to) of a block, and above and below the image where these are its first and last rows.
UNETRT_INLINE void fill_border(const Map& map, int block, int from, int to, Vec value) {
    if (map.border == 0) return;
    const int64_t side = static_cast<int64_t>(map.border) * map.images;
    if (from == 0) fill_lines(map.at(block, -map.border, -map.border), map.border * map.row(), value);
    for (int y = from; y < to; ++y) {
        fill_lines(map.at(block, y, -map.border), side, value);
        fill_lines(map.at(block, y, map.width), side, value);
    }
    if (to == map.height) fill_lines(map.at(block, map.height, -map.border), map.border * map.row(), value);
}

UNETRT_INLINE void clear_border(const Map& map, int block, int from, int to) {
    fill_border(map, block, from, to, Vec{});
}

}  // namespace unetrt::UNETRT_ISA
