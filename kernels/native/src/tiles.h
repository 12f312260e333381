// AMX: eight tiles of 16 rows of 64 bytes, and sums of products of pairs of bfloat16 or fours of bytes. A test build has them in plain C++,
// for processors that lack them.
#pragma once

#include <immintrin.h>

#include "vec.h"

namespace unetrt::UNETRT_ISA {

constexpr int kTileRows = 16;

#ifdef UNETRT_EMULATED_TILES
// GCC defines them, as macros, for every processor.
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd

struct EmulatedTile {
    uint32_t words[kTileRows][16];
};
inline thread_local EmulatedTile emulated_tiles[8];

UNETRT_INLINE void _tile_zero(int t) { emulated_tiles[t] = {}; }
UNETRT_INLINE void _tile_loadd(int t, const void* from, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r) {
        __builtin_memcpy(emulated_tiles[t].words[r], static_cast<const char*>(from) + r * stride, 64);
    }
}
UNETRT_INLINE void _tile_stored(int t, void* to, int64_t stride) {
    for (int r = 0; r < kTileRows; ++r) {
        __builtin_memcpy(static_cast<char*>(to) + r * stride, emulated_tiles[t].words[r], 64);
    }
}
UNETRT_INLINE float half_of(uint32_t word, bool is_upper) {
    return to_float({static_cast<uint16_t>(is_upper ? word >> 16 : word)});
}
UNETRT_INLINE void _tile_dpbf16ps(int sums, int a, int b) {
    for (int r = 0; r < kTileRows; ++r)
        for (int k = 0; k < 16; ++k)
            for (int c = 0; c < 16; ++c) {
                const uint32_t x = emulated_tiles[a].words[r][k], y = emulated_tiles[b].words[k][c];
                float sum;
                __builtin_memcpy(&sum, &emulated_tiles[sums].words[r][c], sizeof sum);
                for (int upper = 0; upper < 2; ++upper) sum += half_of(x, upper != 0) * half_of(y, upper != 0);
                __builtin_memcpy(&emulated_tiles[sums].words[r][c], &sum, sizeof sum);
            }
}

UNETRT_INLINE void _tile_dpbusd(int sums, int a, int b) {
    for (int r = 0; r < kTileRows; ++r)
        for (int k = 0; k < 16; ++k)
            for (int c = 0; c < 16; ++c) {
                const uint32_t x = emulated_tiles[a].words[r][k], y = emulated_tiles[b].words[k][c];
                int32_t sum = 0;
                for (int i = 0; i < 32; i += 8) {
                    sum += static_cast<int32_t>(x >> i & 0xff) * static_cast<int8_t>(y >> i & 0xff);
                }
                emulated_tiles[sums].words[r][c] += static_cast<uint32_t>(sum);
            }
}

// For as long as it lives a thread may use its tiles.
struct Tiles {
    Tiles() {}
    ~Tiles() {}
};

#else

struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// For as long as it lives a thread may use its tiles.
struct Tiles {
    Tiles() {
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

#endif

}  // namespace unetrt::UNETRT_ISA
