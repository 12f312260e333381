// Convolution as a matrix product that reads the map in place: pixels times channels by channels times output channels.
#include "kernels_conv.h"

#include "kernels_common.h"

namespace unetrt::UNETRT_ISA {

namespace {

template <int kVectors>
UNETRT_INLINE void finish(const ConvArgs& args, int block, int y, int position, const Vec* sums) {
    const int images = args.dst.images;
    const int x = position / images, image = position % images;
    const int out_y = y * args.step + args.y0, out_x = x * args.step + args.x0;
    constexpr int kEach = kBlock / kLanes;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const int part = block + v / kEach, lane = v % kEach * kLanes, channel = part * kBlock + lane;
        Vec value = sums[v] + load(args.bias + channel);
        if (args.rows != nullptr) value += load(args.rows + image * args.row_stride + channel);
        if (args.add.data != nullptr) value += load(at(args.add, part, out_y, out_x) + image * kBlock + lane);
        store(at(args.dst, part, out_y, out_x) + image * kBlock + lane, value * args.scale);
    }
}

#ifdef UNETRT_AMX

// Tiles 0 to 3: sums of 2 x 16 positions times 2 x 16 outputs; 4 and 5: positions, 6 and 7: weights of 32 channels.
struct alignas(64) TileConfig {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr int kTilePositions = 16;
constexpr int64_t kTileElements = kTilePositions * kBlock;

// sums [16 kTiles][panel] of as many positions of the sources, from line `first` behind each segment's base on.
template <int kTiles>
void sum_tiles(const ConvArgs& args, const Element* w, int y, int64_t first, float* sums) {
    constexpr int kRowBytes = kPanel * 4;  // Of weights, and of sums.
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int s = 0; s < args.segment_count; ++s) {
        const Segment& segment = args.segments[s];
        const Element* a = static_cast<const Element*>(segment.base) + (y * segment.row + first) * kBlock;
        for (int b = 0; b < segment.blocks; ++b, a += segment.plane * kBlock, w += kBlock * kPanel) {
            _tile_loadd(4, a, kLineBytes);
            _tile_loadd(6, w, kRowBytes);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, w + kPanel, kRowBytes);
            _tile_dpbf16ps(1, 4, 7);
            if constexpr (kTiles == 2) {
                _tile_loadd(5, a + kTileElements, kLineBytes);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
        }
    }
    _tile_stored(0, sums, kRowBytes);
    _tile_stored(1, sums + kLanes, kRowBytes);
    if constexpr (kTiles == 2) {
        _tile_stored(2, sums + kTilePositions * kPanel, kRowBytes);
        _tile_stored(3, sums + kTilePositions * kPanel + kLanes, kRowBytes);
    }
}

// `count` positions that follow one another in the sources, `pitch` a row, of which the first `length` are outputs.
void run_of_positions(const ConvArgs& args, int block, const Element* w, int y, int count, int length, int64_t pitch) {
    alignas(64) float sums[2 * kTilePositions * kPanel];
    for (int first = 0; first < count; first += 2 * kTilePositions) {
        const int done = least(2 * kTilePositions, count - first);
        if (done > kTilePositions) {
            sum_tiles<2>(args, w, y, first, sums);
        } else {
            sum_tiles<1>(args, w, y, first, sums);
        }
        int row = static_cast<int>(first / pitch), position = static_cast<int>(first % pitch);
        for (int i = 0; i < done; ++i, ++position) {
            if (position == pitch) ++row, position = 0;
            if (position >= length) continue;
            const Vec values[2] = {load(sums + i * kPanel), load(sums + i * kPanel + kLanes)};
            finish<2>(args, block, y + row, position, values);
        }
    }
}

// What rows of all sources are apart; 0 where that differs.
int64_t common_pitch(const ConvArgs& args) {
    for (int s = 1; s < args.segment_count; ++s) {
        if (args.segments[s].row != args.segments[0].row) return 0;
    }
    return args.segments[0].row;
}

// Rows one by one, or with the border between them as one run where that takes fewer tiles.
void piece(const ConvArgs& args, int block, int, const Element* w, int from, int to) {
    const TileConfig config;
    _tile_loadconfig(&config);
    const int length = args.width * args.dst.images, rows = to - from;
    const int64_t pitch = common_pitch(args), whole = (rows - 1) * pitch + length;
    if (pitch != 0 && divide_up(static_cast<int>(whole), kTilePositions) < rows * divide_up(length, kTilePositions)) {
        run_of_positions(args, block, w, from, static_cast<int>(whole), length, pitch);
    } else {
        for (int y = from; y < to; ++y) run_of_positions(args, block, w, y, length, length, length);
    }
    _tile_release();
}

#else

#if UNETRT_LANES == 16
constexpr int kTile = 14;  // 28 of 32 registers accumulate.
#elif UNETRT_LANES == 8
constexpr int kTile = 6;  // 12 of 16.
#else
constexpr int kTile = 2;  // 8 of 16.
#endif
constexpr int kMostRows = 4;

struct Place {
    int y, first;  // output row; position x * images + n in it
};

#ifdef UNETRT_ELEMENT_BF16
constexpr int kTogether = 2;  // Channels that one operation sums.
using Weights = __m512bh;
UNETRT_INLINE Weights load_weights(const Element* w) { return reinterpret_cast<Weights>(_mm512_loadu_si512(w)); }
UNETRT_INLINE Weights splat_channels(const Element* a) {
    int32_t pair;
    __builtin_memcpy(&pair, a, sizeof pair);
    return reinterpret_cast<Weights>(_mm512_set1_epi32(pair));
}
UNETRT_INLINE Vec multiply_add(Weights x, Weights w, Vec sum) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), x, w));
}
#else
constexpr int kTogether = 1;
using Weights = Vec;
UNETRT_INLINE Weights load_weights(const Element* w) { return load(w); }
UNETRT_INLINE Weights splat_channels(const Element* a) { return splat(*a); }
UNETRT_INLINE Vec multiply_add(Weights x, Weights w, Vec sum) { return sum + x * w; }
#endif

template <int kPixels, int kRows, int kVectors>
UNETRT_INLINE void multiply(const Element* a, int64_t row, int channels, const Element*& w,
                            Vec (&sums)[kRows * kPixels][kVectors]) {
    for (int c = 0; c < channels; c += kTogether, w += kVectors * kLanes * kTogether) {
        Weights weights[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) weights[v] = load_weights(w + v * kLanes * kTogether);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
            for (int p = 0; p < kPixels; ++p) {
                const Weights x = splat_channels(a + r * row + p * kBlock + c);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) {
                    Vec& sum = sums[r * kPixels + p][v];
                    sum = multiply_add(x, weights[v], sum);
                }
            }
    }
}

// Weights of channels that a segment's last block lacks, which only pairs of them have.
template <int kVectors>
UNETRT_INLINE int padding(int last) {
    return kTogether == 1 ? 0 : (kBlock - divide_up(last, kTogether) * kTogether) * kVectors * kLanes;
}

template <int kPixels, int kRows, int kVectors>
void tile(const ConvArgs& args, int block, const Element* w, Place place) {
    Vec sums[kRows * kPixels][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kPixels; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] = Vec{};
    for (int s = 0; s < args.segment_count; ++s) {
        const Segment& segment = args.segments[s];
        const Element* a = static_cast<const Element*>(segment.base) + (place.y * segment.row + place.first) * kBlock;
        const int64_t row = segment.row * kBlock;
        for (int b = 0; b + 1 < segment.blocks; ++b, a += segment.plane * kBlock) {
            multiply<kPixels, kRows, kVectors>(a, row, kBlock, w, sums);
        }
        multiply<kPixels, kRows, kVectors>(a, row, segment.last, w, sums);
        w += padding<kVectors>(segment.last);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
            finish<kVectors>(args, block, place.y + r, place.first + p, sums[r * kPixels + p]);
        }
}

using Tile = void (*)(const ConvArgs&, int, const Element*, Place);

// The tile of kPixels to 1 pixels by kRows rows.
template <int kPixels, int kRows, int kVectors>
Tile find_tile(int pixels) {
    if (pixels == kPixels) return tile<kPixels, kRows, kVectors>;
    if constexpr (kPixels > 1) {
        return find_tile<kPixels - 1, kRows, kVectors>(pixels);
    } else {
        return nullptr;
    }
}

template <int kVectors>
Tile find_tile(int pixels, int rows) {
    if (rows == 1) return find_tile<kTile, 1, kVectors>(pixels);
    if constexpr (kTile >= 4) {
        if (rows == 2) return find_tile<kTile / 2, 2, kVectors>(pixels);
        if (rows == 3) return find_tile<kTile / 3, 3, kVectors>(pixels);
    }
    if constexpr (kTile >= 8) {
        if (rows == 4) return find_tile<kTile / 4, 4, kVectors>(pixels);
    }
    return nullptr;
}

// How many rows of `length` pixels one tile takes.
int rows_of_tile(int length) {
    int rows = kTile / (length < kTile ? length : kTile);
    const int most = kTile >= 8 ? kMostRows : kTile >= 4 ? 3 : 1;
    return rows < most ? rows : most;
}

template <int kVectors>
void rows_of_tiles(const ConvArgs& args, int block, const Element* w, int from, int to) {
    const int length = args.width * args.dst.images;
    const int columns = divide_up(length, kTile);
    for (int y = from; y < to;) {
        const int bands = divide_up(to - y, rows_of_tile(length));
        const int rows = divide_up(to - y, bands);
        for (int c = 0; c < columns; ++c) {
            const int first = static_cast<int>(static_cast<int64_t>(length) * c / columns);
            const int end = static_cast<int>(static_cast<int64_t>(length) * (c + 1) / columns);
            find_tile<kVectors>(end - first, rows)(args, block, w, {y, first});
        }
        y += rows;
    }
}

void piece(const ConvArgs& args, int block, int blocks, const Element* w, int from, int to) {
    constexpr int kPanelBlocks = kPanel / kBlock, kEach = kBlock / kLanes;
    if (blocks == kPanelBlocks) {
        rows_of_tiles<kPanelBlocks * kEach>(args, block, w, from, to);
    } else {
        rows_of_tiles<kEach>(args, block, w, from, to);
    }
}

#endif

}  // namespace

int conv_items(const ConvArgs& args) { return divide_up(args.height, args.piece_rows) * args.panels; }

void conv(const ConvArgs& args, int item) {
    constexpr int kPanelBlocks = kPanel / kBlock;
    const int panel = item % args.panels;
    const int from = item / args.panels * args.piece_rows, to = least(from + args.piece_rows, args.height);
    const int block = panel * kPanelBlocks, blocks = least(kPanelBlocks, args.dst.blocks() - block);
    const auto* w = reinterpret_cast<const Element*>(args.weights + panel * args.panel_floats);
    piece(args, block, blocks, w, from, to);
    if (!args.clears_border) return;
    for (int b = block; b < block + blocks; ++b) clear_border(args.dst, b, from * args.step, to * args.step);
}

}  // namespace unetrt::UNETRT_ISA
