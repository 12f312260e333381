// What several kernels do with maps.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace unetrt::UNETRT_ISA {

UNETRT_INLINE int divide_up(int a, int b) { return (a + b - 1) / b; }
UNETRT_INLINE int least(int a, int b) { return a < b ? a : b; }

UNETRT_INLINE void fill_zero(float* p, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) store(p + i, Vec{});
}

// Zeros beside rows [from, to) of a block, and above and below the image where these are its first and last rows.
UNETRT_INLINE void clear_border(const Map& map, int block, int from, int to) {
    if (map.border == 0) return;
    const int64_t side = static_cast<int64_t>(map.border) * map.images * kBlock;
    float* plane = map.data + block * map.plane();
    if (from == 0) fill_zero(plane, map.border * map.row());
    for (int y = from; y < to; ++y) {
        float* row = plane + (y + map.border) * map.row();
        fill_zero(row, side);
        fill_zero(row + map.row() - side, side);
    }
    if (to == map.height) fill_zero(plane + (map.height + map.border) * map.row(), map.border * map.row());
}

}  // namespace unetrt::UNETRT_ISA
