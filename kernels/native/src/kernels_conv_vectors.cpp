// Convolution on vectors: pixels times channels by channels times output channels.
#include "kernels_conv.h"

#include "kernels_common.h"

namespace unetrt::UNETRT_ISA {

namespace {

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
using Weights = Pairs;
// Vector v of the row of a pair of channels; a panel's halves lie behind one another.
UNETRT_INLINE Weights load_weights(const Element* w, int channel, int, int v) {
    return load_pairs(w + v * kBlock * kLanes + channel * kLanes);
}
// Of so many channels of a segment's block, which the weights have whole.
UNETRT_INLINE int weights_of(int, int vectors) { return kBlock * vectors * kLanes; }
UNETRT_INLINE Weights splat_channels(const Element* a) { return splat_pair(a); }
UNETRT_INLINE Vec multiply_add(Weights x, Weights w, Vec sum) { return add_products(x, w, sum); }
#else
constexpr int kTogether = 1;
using Weights = Vec;
// Vector v of a channel's row.
UNETRT_INLINE Weights load_weights(const Element* w, int channel, int vectors, int v) {
    return load(w + (channel * vectors + v) * kLanes);
}
// Of so many channels of a segment's block.
UNETRT_INLINE int weights_of(int channels, int vectors) { return channels * vectors * kLanes; }
UNETRT_INLINE Weights splat_channels(const Element* a) { return splat(*a); }
UNETRT_INLINE Vec multiply_add(Weights x, Weights w, Vec sum) { return sum + x * w; }
#endif

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

template <int kPixels, int kRows, int kVectors>
UNETRT_INLINE void multiply(const Element* a, int64_t row, int channels, const Element* w,
                            Vec (&sums)[kRows * kPixels][kVectors]) {
    for (int c = 0; c < channels; c += kTogether) {
        Weights weights[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) weights[v] = load_weights(w, c, kVectors, v);
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
            w += weights_of(kBlock, kVectors);
        }
        multiply<kPixels, kRows, kVectors>(a, row, segment.last, w, sums);
        w += weights_of(segment.last, kVectors);
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

}  // namespace

void conv_piece(const ConvArgs& args, int block, int blocks, const void* weights, int from, int to) {
    constexpr int kPanelBlocks = kPanel / kBlock, kEach = kBlock / kLanes;
    const auto* w = static_cast<const Element*>(weights);
    if (blocks == kPanelBlocks) {
        rows_of_tiles<kPanelBlocks * kEach>(args, block, w, from, to);
    } else {
        rows_of_tiles<kEach>(args, block, w, from, to);
    }
}

}  // namespace unetrt::UNETRT_ISA
