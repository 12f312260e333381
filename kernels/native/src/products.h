// Products of matrices of bfloat16 with sums of float32, 32 rows and columns at a time, on tiles or on vectors.
#pragma once

#include "vec.h"
#ifdef UNETRT_TILES
#include "tiles.h"
#endif

namespace unetrt::UNETRT_ISA {

constexpr int kProductRows = 32;
// Of a weight's tile: [16 pairs][16 columns][2].
constexpr int64_t kTileElements = 16 * kBlock;

// sums [32][32], `row` floats apart. a: 32 rows, a_row elements apart, of `depth` blocks, a_step apart. b: `depth` blocks,
// b_step apart, of two tiles, b_second apart.
#ifdef UNETRT_TILES

using Products = Tiles;

static inline void multiply_rows(const Element* a, int64_t a_row, int64_t a_step, const Element* b, int64_t b_second,
                                 int64_t b_step, int depth, float* sums, int64_t row) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t lower = kTileRows * a_row, a_bytes = a_row * static_cast<int64_t>(sizeof(Element));
    for (int k = 0; k < depth; ++k, a += a_step, b += b_step) {
        _tile_loadd(4, a, a_bytes);
        _tile_loadd(6, b, kLineBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + b_second, kLineBytes);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + lower, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    const int64_t row_bytes = row * 4;
    _tile_stored(0, sums, row_bytes);
    _tile_stored(1, sums + kTileRows, row_bytes);
    _tile_stored(2, sums + kTileRows * row, row_bytes);
    _tile_stored(3, sums + kTileRows * row + kTileRows, row_bytes);
}

#else

struct Products {
    Products() {}
    ~Products() {}
};

static inline void multiply_rows(const Element* a, int64_t a_row, int64_t a_step, const Element* b, int64_t b_second,
                                 int64_t b_step, int depth, float* sums, int64_t row) {
    constexpr int kRows = 8;
    for (int first = 0; first < kProductRows; first += kRows, a += kRows * a_row, sums += kRows * row) {
        Vec total[kRows][2]{};
        for (int k = 0; k < depth; ++k)
            for (int pair = 0; pair < kBlock / 2; ++pair) {
                const Element* weights = b + k * b_step + pair * kBlock;
                const Pairs w[2] = {load_pairs(weights), load_pairs(weights + b_second)};
#pragma GCC unroll 8
                for (int r = 0; r < kRows; ++r) {
                    const Pairs x = splat_pair(a + r * a_row + k * a_step + 2 * pair);
                    total[r][0] = add_products(x, w[0], total[r][0]);
                    total[r][1] = add_products(x, w[1], total[r][1]);
                }
            }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            store(sums + r * row, total[r][0]);
            store(sums + r * row + kLanes, total[r][1]);
        }
    }
}

#endif

}  // namespace unetrt::UNETRT_ISA
