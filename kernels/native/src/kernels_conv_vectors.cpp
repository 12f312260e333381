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

// What sources hold: kTogether channels are one operand of a product, and a line has kChannels.
struct OfElements {
    using Input = Element;
    using Sum = Vec;
    static constexpr int kChannels = kBlock;
#ifdef UNETRT_ELEMENT_BF16
    static constexpr int kTogether = 2;
    using Weights = Pairs;
    // Vector v of the row of a pair of channels; a panel's halves lie behind one another.
    static Weights load_weights(const Input* w, int channel, int, int v) {
        return load_pairs(w + v * kChannels * kLanes + channel * kLanes);
    }
    // Of a segment's block, which the weights have whole, and for a whole panel.
    static int weights_of(int, int) { return kChannels * kPanel; }
    static Weights splat_channels(const Input* a) { return splat_pair(a); }
    static void multiply_add(Weights x, Weights w, Sum& sum) { sum = add_products(x, w, sum); }
#else
    static constexpr int kTogether = 1;
    using Weights = Vec;
    // Vector v of a channel's row.
    static Weights load_weights(const Input* w, int channel, int vectors, int v) {
        return load(w + (channel * vectors + v) * kLanes);
    }
    // Of so many channels of a segment's block.
    static int weights_of(int channels, int vectors) { return channels * vectors * kLanes; }
    static Weights splat_channels(const Input* a) { return splat(*a); }
    static void multiply_add(Weights x, Weights w, Sum& sum) { sum += x * w; }
#endif
    static Vec to_value(const ConvArgs&, int, Sum sum) { return sum; }
};

#ifdef UNETRT_ELEMENT_BF16
struct OfBytes {
    using Input = uint8_t;
    using Sum = Ints;
    using Weights = Fours;
    static constexpr int kChannels = kBytesBlock, kTogether = 4;
    static Weights load_weights(const Input* w, int channel, int, int v) {
        return load_fours(reinterpret_cast<const int8_t*>(w) + v * kChannels * kLanes + channel * kLanes);
    }
    static int weights_of(int, int) { return kChannels * kPanel; }
    static Weights splat_channels(const Input* a) { return splat_four(a); }
    static void multiply_add(Weights x, Weights w, Sum& sum) { sum = add_products(x, w, sum); }
    // Of output channel `channel` on.
    static Vec to_value(const ConvArgs& args, int channel, Sum sum) {
        return __builtin_convertvector(sum + load(args.offsets + channel), Vec) * load(args.factors + channel);
    }
};
#endif

template <typename Of, int kVectors>
UNETRT_INLINE void finish(const ConvArgs& args, int block, int y, int position, const typename Of::Sum* sums) {
    const int images = args.dst.images;
    const int x = position / images, image = position % images;
    const int out_y = y * args.step + args.y0, out_x = x * args.step + args.x0;
    constexpr int kEach = kBlock / kLanes;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const int part = block + v / kEach, lane = v % kEach * kLanes, channel = part * kBlock + lane;
        Vec value = Of::to_value(args, channel, sums[v]) + load(args.bias + channel);
        if (args.rows != nullptr) value += load(args.rows + image * args.row_stride + channel);
        if (args.add.data != nullptr) value += load(at(args.add, part, out_y, out_x) + image * kBlock + lane);
        store(at(args.dst, part, out_y, out_x) + image * kBlock + lane, value * args.scale);
    }
    if constexpr (kVectors < kEach) store(at(args.dst, block, out_y, out_x) + image * kBlock + kLanes, Vec{});
}

template <typename Of, int kPixels, int kRows, int kVectors>
UNETRT_INLINE void multiply(const typename Of::Input* a, int64_t row, int channels, const typename Of::Input* w,
                            typename Of::Sum (&sums)[kRows * kPixels][kVectors]) {
    for (int c = 0; c < channels; c += Of::kTogether) {
        typename Of::Weights weights[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) weights[v] = Of::load_weights(w, c, kVectors, v);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
            for (int p = 0; p < kPixels; ++p) {
                const auto x = Of::splat_channels(a + r * row + p * Of::kChannels + c);
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v) Of::multiply_add(x, weights[v], sums[r * kPixels + p][v]);
            }
    }
}

template <typename Of, int kPixels, int kRows, int kVectors>
void tile(const ConvArgs& args, int block, const void* weights, Place place) {
    using Input = typename Of::Input;
    const auto* w = static_cast<const Input*>(weights);
    typename Of::Sum sums[kRows * kPixels][kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < kRows * kPixels; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] = typename Of::Sum{};
    for (int s = 0; s < args.segment_count; ++s) {
        const Segment& segment = args.segments[s];
        const int64_t line = place.y * segment.row + place.first, row = segment.row * Of::kChannels;
        const Input* a = static_cast<const Input*>(segment.base) + line * Of::kChannels;
        for (int b = 0; b + 1 < segment.blocks; ++b, a += segment.plane * Of::kChannels) {
            multiply<Of, kPixels, kRows, kVectors>(a, row, Of::kChannels, w, sums);
            w += Of::weights_of(Of::kChannels, kVectors);
        }
        multiply<Of, kPixels, kRows, kVectors>(a, row, segment.last, w, sums);
        w += Of::weights_of(segment.last, kVectors);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
        for (int p = 0; p < kPixels; ++p) {
            finish<Of, kVectors>(args, block, place.y + r, place.first + p, sums[r * kPixels + p]);
        }
}

using Tile = void (*)(const ConvArgs&, int, const void*, Place);

// The tile of kPixels to 1 pixels by kRows rows.
template <typename Of, int kPixels, int kRows, int kVectors>
Tile find_tile(int pixels) {
    if (pixels == kPixels) return tile<Of, kPixels, kRows, kVectors>;
    if constexpr (kPixels > 1) {
        return find_tile<Of, kPixels - 1, kRows, kVectors>(pixels);
    } else {
        return nullptr;
    }
}

template <typename Of, int kVectors>
Tile find_tile(int pixels, int rows) {
    if (rows == 1) return find_tile<Of, kTile, 1, kVectors>(pixels);
    if constexpr (kTile >= 4) {
        if (rows == 2) return find_tile<Of, kTile / 2, 2, kVectors>(pixels);
        if (rows == 3) return find_tile<Of, kTile / 3, 3, kVectors>(pixels);
    }
    if constexpr (kTile >= 8) {
        if (rows == 4) return find_tile<Of, kTile / 4, 4, kVectors>(pixels);
    }
    return nullptr;
}

// How many rows of `length` pixels one tile takes.
int rows_of_tile(int length) {
    int rows = kTile / (length < kTile ? length : kTile);
    const int most = kTile >= 8 ? kMostRows : kTile >= 4 ? 3 : 1;
    return rows < most ? rows : most;
}

template <typename Of, int kVectors>
void rows_of_tiles(const ConvArgs& args, int block, const void* weights, int from, int to) {
    const int length = args.width * args.dst.images;
    const int columns = divide_up(length, kTile);
    for (int y = from; y < to;) {
        const int bands = divide_up(to - y, rows_of_tile(length));
        const int rows = divide_up(to - y, bands);
        for (int c = 0; c < columns; ++c) {
            const int first = static_cast<int>(static_cast<int64_t>(length) * c / columns);
            const int end = static_cast<int>(static_cast<int64_t>(length) * (c + 1) / columns);
            find_tile<Of, kVectors>(end - first, rows)(args, block, weights, {y, first});
        }
        y += rows;
    }
}

}  // namespace

void conv_piece(const ConvArgs& args, int block, int blocks, const void* weights, int from, int to) {
    constexpr int kPanelBlocks = kPanel / kBlock, kEach = kBlock / kLanes;
#ifdef UNETRT_ELEMENT_BF16
    // Half of a block, where that is all that dst has.
    const bool is_narrow = args.dst.channels - block * kBlock <= kLanes;
    if (is_narrow) return rows_of_tiles<OfElements, 1>(args, block, weights, from, to);
#endif
    if (blocks == kPanelBlocks) {
        rows_of_tiles<OfElements, kPanelBlocks * kEach>(args, block, weights, from, to);
    } else {
        rows_of_tiles<OfElements, kEach>(args, block, weights, from, to);
    }
}

#ifdef UNETRT_ELEMENT_BF16
void conv_piece_of_bytes(const ConvArgs& args, int block, const void* weights, int from, int to) {
    rows_of_tiles<OfBytes, kPanel / kLanes>(args, block, weights, from, to);
}
#endif

}  // namespace unetrt::UNETRT_ISA
