// Convolution on tiles: 32 positions times 32 output channels at a time. A position is a pixel of an image, and sources
// keep those of a row behind one another, so that 16 of them are a tile as they lie.
#include "kernels_conv.h"

#include "kernels_common.h"
#include "tiles.h"

namespace unetrt::UNETRT_ISA {

namespace {

constexpr int kRowBytes = kPanel * 4;  // Of sums.
constexpr int kMostPositions = 2 * kTileRows;
constexpr int64_t kTileBytes = kTileRows * kLineBytes;

// Output positions [first, first + count) of row y.
struct Run {
    int y, first, count;
};

// What sources hold, and what sums of them stand for, of the panel's channel `lane` on.
struct OfElements {
    static constexpr bool kHasBytes = false;
    OfElements(const ConvArgs&, int) {}
    Vec to_value(const float* sums, int lane) const { return load(sums + lane); }
};

struct OfBytes {
    static constexpr bool kHasBytes = true;
    OfBytes(const ConvArgs& args, int channel) : offsets(args.offsets + channel), factors(args.factors + channel) {}
    Vec to_value(const float* sums, int lane) const {
        const Ints whole = reinterpret_cast<Ints>(load(sums + lane)) + load(offsets + lane);
        return __builtin_convertvector(whole, Vec) * load(factors + lane);
    }
    const int32_t* offsets;
    const float* factors;
};

// Of tiles a (positions) and b (weights). A macro, because tiles are named by literals.
#define UNETRT_ADD_PRODUCTS(sums, a, b) \
    if constexpr (Of::kHasBytes) {      \
        _tile_dpbusd(sums, a, b);       \
    } else {                            \
        _tile_dpbf16ps(sums, a, b);     \
    }

// sums [16 kTiles][panel] of as many positions of the sources, from line `first` of row y behind each segment's base on;
// integers where these hold bytes.
template <typename Of, int kTiles>
void sum_tiles(const ConvArgs& args, const char* w, int y, int64_t first, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTiles == 2) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int s = 0; s < args.segment_count; ++s) {
        const Segment& segment = args.segments[s];
        const char* a = static_cast<const char*>(segment.base) + (y * segment.row + first) * kLineBytes;
        for (int b = 0; b < segment.blocks; ++b, a += segment.plane * kLineBytes, w += 2 * kTileBytes) {
            _tile_loadd(4, a, kLineBytes);
            _tile_loadd(6, w, kLineBytes);
            UNETRT_ADD_PRODUCTS(0, 4, 6)
            _tile_loadd(7, w + kTileBytes, kLineBytes);
            UNETRT_ADD_PRODUCTS(1, 4, 7)
            if constexpr (kTiles == 2) {
                _tile_loadd(5, a + kTileBytes, kLineBytes);
                UNETRT_ADD_PRODUCTS(2, 5, 6)
                UNETRT_ADD_PRODUCTS(3, 5, 7)
            }
        }
    }
    _tile_stored(0, sums, kRowBytes);
    _tile_stored(1, sums + kLanes, kRowBytes);
    if constexpr (kTiles == 2) {
        _tile_stored(2, sums + kTileRows * kPanel, kRowBytes);
        _tile_stored(3, sums + kTileRows * kPanel + kLanes, kRowBytes);
    }
}

// Sums of positions that follow one another as the outputs that they are.
template <typename Of>
void finish(const ConvArgs& args, int block, const Run& run, const float* sums) {
    const Of of(args, block * kBlock);
    const int images = args.dst.images, y = run.y * args.step + args.y0;
    const float* bias = args.bias + block * kBlock;
    const float* rows = args.rows == nullptr ? nullptr : args.rows + block * kBlock;
    Element* out = at(args.dst, block, y, 0);
    const Element* add = args.add.data == nullptr ? nullptr : at(args.add, block, y, 0);
    const Vec biases[2] = {load(bias), load(bias + kLanes)};
    int x = run.first / images, image = run.first % images;
    for (int i = 0; i < run.count; ++i, sums += kPanel) {
        const int64_t place = (static_cast<int64_t>(x * args.step + args.x0) * images + image) * kBlock;
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            Vec value = of.to_value(sums, v * kLanes) + biases[v];
            if (rows != nullptr) value += load(rows + image * args.row_stride + v * kLanes);
            if (add != nullptr) value += load(add + place + v * kLanes);
            store(out + place + v * kLanes, value * args.scale);
        }
        if (++image == images) image = 0, ++x;
    }
}

// `count` positions from row y on, `pitch` a row, of which the first `length` are outputs.
template <typename Of>
void do_positions(const ConvArgs& args, int block, const char* w, int y, int count, int length, int pitch) {
    alignas(64) float sums[kMostPositions * kPanel];
    for (int first = 0; first < count; first += kMostPositions) {
        const int done = least(kMostPositions, count - first);
        if (done > kTileRows) {
            sum_tiles<Of, 2>(args, w, y, first, sums);
        } else {
            sum_tiles<Of, 1>(args, w, y, first, sums);
        }
        for (int i = 0; i < done;) {
            const int position = (first + i) % pitch, left = least(pitch - position, done - i);
            const int outputs = least(left, length - position);
            if (outputs > 0) finish<Of>(args, block, {y + (first + i) / pitch, position, outputs}, sums + i * kPanel);
            i += left;
        }
    }
}

// What rows of all sources are apart; 0 where that differs.
int common_pitch(const ConvArgs& args) {
    for (int s = 1; s < args.segment_count; ++s) {
        if (args.segments[s].row != args.segments[0].row) return 0;
    }
    return static_cast<int>(args.segments[0].row);
}

// Rows one by one, or with the border between them as one run where that takes fewer tiles.
template <typename Of>
void do_piece(const ConvArgs& args, int block, const void* weights, int from, int to) {
    const Tiles tiles;
    const auto* w = static_cast<const char*>(weights);
    const int length = args.width * args.dst.images, rows = to - from, pitch = common_pitch(args);
    const int whole = (rows - 1) * pitch + length;
    if (pitch != 0 && divide_up(whole, kTileRows) < rows * divide_up(length, kTileRows)) {
        do_positions<Of>(args, block, w, from, whole, length, pitch);
    } else {
        for (int y = from; y < to; ++y) do_positions<Of>(args, block, w, y, length, length, length);
    }
}

}  // namespace

void conv_piece(const ConvArgs& args, int block, int, const void* weights, int from, int to) {
    do_piece<OfElements>(args, block, weights, from, to);
}

void conv_piece_of_bytes(const ConvArgs& args, int block, const void* weights, int from, int to) {
    do_piece<OfBytes>(args, block, weights, from, to);
}

}  // namespace unetrt::UNETRT_ISA
