// Pixels as tokens, for both kinds of attention.
//
// A chunk of queries is turned into columns, [channels][queries]: each lane of a register is a query. So the softmax of
// a query never sums across lanes, and keys and values are read one float at a time, as they lie in a map.
#pragma once

#include "kernels_common.h"

namespace unetrt::UNETRT_ISA {

#if UNETRT_LANES == 16
constexpr int kTile = 8, kMostVectors = 2;  // 16 of 32 registers accumulate, which 2 units of latency 4 ask for.
#else
constexpr int kTile = 4, kMostVectors = 3;  // 12 of 16.
#endif
constexpr int kMostQueries = kMostVectors * kLanes;
constexpr int kEach = kBlock / kLanes;

#if UNETRT_LANES == 16
#define UNETRT_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define UNETRT_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif UNETRT_LANES == 8
#define UNETRT_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define UNETRT_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define UNETRT_LOW 0, 4, 1, 5
#define UNETRT_HIGH 2, 6, 3, 7
#endif
#if defined(__clang__)
#define UNETRT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define UNETRT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif

// A square of kLanes rows, transposed by log2(kLanes) perfect shuffles of all its elements.
UNETRT_INLINE void transpose_square(const float* in, int64_t in_row, float* out, int64_t out_row) {
    Vec rows[kLanes], shuffled[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = load(in + i * in_row);
#pragma GCC unroll 4
    for (int round = 1; round < kLanes; round *= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < kLanes / 2; ++i) {
            shuffled[2 * i] = UNETRT_SHUFFLE(rows[i], rows[i + kLanes / 2], UNETRT_LOW);
            shuffled[2 * i + 1] = UNETRT_SHUFFLE(rows[i], rows[i + kLanes / 2], UNETRT_HIGH);
        }
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) rows[i] = shuffled[i];
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) store(out + i * out_row, rows[i]);
}

#undef UNETRT_LOW
#undef UNETRT_HIGH
#undef UNETRT_SHUFFLE

// in [rows][columns], a multiple of kLanes each, as out [columns][rows].
static inline void transpose(const float* in, int rows, int columns, float* out) {
    for (int r = 0; r < rows; r += kLanes)
        for (int c = 0; c < columns; c += kLanes) {
            transpose_square(in + r * columns + c, columns, out + c * rows + r, rows);
        }
}

UNETRT_INLINE int pixels_of(const Map& map) { return map.height * map.width; }
UNETRT_INLINE int round_up(int a, int b) { return divide_up(a, b) * b; }

// Channels [channel, channel + count) of an image, at most a block.
struct Channels {
    const Map& map;
    int image, channel, count;

    bool is_block() const { return channel % kBlock == 0 && count == kBlock; }
};

UNETRT_INLINE Element* find(const Channels& from, int channel, int y, int x) {
    return at(from.map, channel / kBlock, y, x) + from.image * kBlock + channel % kBlock;
}

// Pixels [first, first + count) in out [count][kBlock], with zeros where there are fewer channels.
static inline void gather(const Channels& from, int first, int count, float* out) {
    const int width = from.map.width;
    const int64_t step = static_cast<int64_t>(from.map.images) * kBlock;
    for (int run; count > 0; count -= run, first += run, out += run * kBlock) {
        const int y = first / width, x = first % width;
        run = least(width - x, count);
        if (from.is_block()) {
            const Element* in = find(from, from.channel, y, x);
            for (int i = 0; i < run; ++i)
                for (int v = 0; v < kBlock; v += kLanes) store(out + i * kBlock + v, load(in + i * step + v));
            continue;
        }
        fill_zero(out, static_cast<int64_t>(run) * kBlock);
        for (int c = 0; c < from.count; ++c) {
            const Element* in = find(from, from.channel + c, y, x);
            for (int i = 0; i < run; ++i) out[i * kBlock + c] = to_float(in[i * step]);
        }
    }
}

// The inverse of gather(), which leaves the other channels of a map as they are.
static inline void scatter(const float* in, int first, int count, const Channels& to) {
    const int width = to.map.width;
    const int64_t step = static_cast<int64_t>(to.map.images) * kBlock;
    for (int run; count > 0; count -= run, first += run, in += run * kBlock) {
        const int y = first / width, x = first % width;
        run = least(width - x, count);
        if (to.is_block()) {
            Element* out = find(to, to.channel, y, x);
            for (int i = 0; i < run; ++i)
                for (int v = 0; v < kBlock; v += kLanes) store(out + i * step + v, load(in + i * kBlock + v));
            continue;
        }
        for (int c = 0; c < to.count; ++c) {
            Element* out = find(to, to.channel + c, y, x);
            for (int i = 0; i < run; ++i) out[i * step] = to_element(in[i * kBlock + c]);
        }
    }
}

enum Part { kQueries, kKeys, kValues };

// A block of channels from `channel` on, fewer at its end, of a head's queries, keys or values.
UNETRT_INLINE Channels channels_of(const AttentionArgs& args, Part part, int image, int head, int channel) {
    const int first = (part * args.heads + head) * args.dim;
    return {args.qkv, image, first + channel, least(kBlock, args.dim - channel)};
}

// Learned tokens [first, first + count) of a head's keys or values in out [count][kBlock], channels as above.
static inline void gather_learned(const AttentionArgs& args, Part part, int head, int channel, int first, int count,
                                  float* out) {
    const int used = least(kBlock, args.dim - channel);
    fill_zero(out, static_cast<int64_t>(count) * kBlock);
    for (int t = 0; t < count; ++t) {
        const int64_t row = (static_cast<int64_t>(part - kKeys) * args.heads + head) * args.memory + first + t;
        for (int c = 0; c < used; ++c) out[t * kBlock + c] = args.learned[row * args.dim + channel + c];
    }
}

// Queries of a head that one item does together.
struct Queries {
    int image, head, first, count;

    int vectors() const { return (count + kLanes - 1) / kLanes; }
};

constexpr int64_t kStagingFloats = static_cast<int64_t>(kMostQueries) * kBlock;

// Queries as columns [padded dim][vectors * kLanes]; lanes without a query hold zeros. staging: kStagingFloats.
static inline void load_columns(const AttentionArgs& args, const Queries& queries, float* staging, float* columns) {
    const int width = queries.vectors() * kLanes;
    fill_zero(staging + queries.count * kBlock, static_cast<int64_t>(width - queries.count) * kBlock);
    for (int c = 0; c < args.dim; c += kBlock) {
        gather(channels_of(args, kQueries, queries.image, queries.head, c), queries.first, queries.count, staging);
        transpose(staging, width, kBlock, columns + c * width);
    }
}

// Zeros in the channels that dst's last block lacks, by the last head.
static inline void pad_last_block(const AttentionArgs& args, const Queries& queries, float* staging) {
    const int end = args.heads * args.dim, missing = args.dst.blocks() * kBlock - end;
    if (queries.head + 1 < args.heads || missing == 0) return;
    fill_zero(staging, kStagingFloats);
    scatter(staging, queries.first, queries.count, {args.dst, queries.image, end, missing});
}

// Columns [padded dim][vectors * kLanes] as the head's channels of dst; the last head pads dst's last block.
static inline void store_columns(const AttentionArgs& args, const Queries& queries, float* staging,
                                 const float* columns) {
    const int width = queries.vectors() * kLanes, first = queries.head * args.dim;
    for (int c = 0; c < args.dim; c += kBlock) {
        transpose(columns + c * width, kBlock, width, staging);
        const Channels to{args.dst, queries.image, first + c, least(kBlock, args.dim - c)};
        scatter(staging, queries.first, queries.count, to);
    }
    pad_last_block(args, queries, staging);
}

// sums[i][v] += a[i * kStride] * b[v]
template <int kStride, int kRows, int kVectors>
UNETRT_INLINE void multiply(const float* a, const float* b, Vec (&sums)[kRows][kVectors]) {
    Vec columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
        const Vec x = splat(a[i * kStride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] += x * columns[v];
    }
}

// Zeros, or what out [kTile][kVectors * kLanes] holds.
template <int kVectors>
UNETRT_INLINE void start_sums(const float* out, bool adds, Vec (&sums)[kTile][kVectors]) {
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[i][v] = adds ? load(out + (i * kVectors + v) * kLanes) : Vec{};
}

template <int kVectors>
UNETRT_INLINE void store_sums(const Vec (&sums)[kTile][kVectors], float* out) {
#pragma GCC unroll 8
    for (int i = 0; i < kTile; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(out + (i * kVectors + v) * kLanes, sums[i][v]);
}

// exp() where x <= 0, in half the operations: no more than 4.5e-38 wrong below -86, where exp() still falls.
UNETRT_INLINE Vec exp_of_negative(Vec x) {
    const auto [p, shifted] = reduce_exp(pick(x < -86.0f, splat(-86.0f), x));
    return p * reinterpret_cast<Vec>((reinterpret_cast<Ints>(shifted) << 23) + 0x3f800000);
}

// The largest of columns [count][kVectors * kLanes].
template <int kVectors>
UNETRT_INLINE void find_largest(const float* columns, int count, Vec (&most)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) most[v] = load(columns + v * kLanes);
    for (int i = 1; i < count; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) most[v] = larger(load(columns + (i * kVectors + v) * kLanes), most[v]);
}

// columns [count][kVectors * kLanes] = exp(columns - most), and their sum is added to total.
template <int kVectors>
static inline void exponentiate(float* columns, int count, const Vec (&most)[kVectors], Vec (&total)[kVectors]) {
    Vec sum[kVectors]{};
    for (int i = 0; i < count; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            float* column = columns + (i * kVectors + v) * kLanes;
            const Vec e = exp_of_negative(load(column) - most[v]);
            store(column, e);
            sum[v] += e;
        }
    for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
}

// Of one block of values, so that its weights stay in the first cache.
constexpr int kDepth = 128;

// out [padded dim][kVectors * kLanes] (+)= values^T weights; weights [count][kVectors * kLanes], values [blocks of dim]
// [block / kBlock][kBlock].
template <int kVectors>
static inline void weigh(const float* weights, int count, const float* values, int64_t block, int dim, bool adds,
                         float* out) {
    constexpr int kWidth = kVectors * kLanes;
    for (int c = 0; c < dim; c += kTile) {
        const float* a = values + c / kBlock * block + c % kBlock;
        Vec sums[kTile][kVectors];
        start_sums(out + c * kWidth, adds, sums);
        for (int i = 0; i < count; ++i) multiply<1>(a + i * kBlock, weights + i * kWidth, sums);
        store_sums(sums, out + c * kWidth);
    }
}

// out [padded dim][kVectors * kLanes] = factor * values^T softmax(columns); columns [count][kVectors * kLanes], which
// become weights, values as above.
template <int kVectors>
static inline void weigh_by_softmax(float* columns, int count, float factor, const float* values, int64_t block,
                                    int dim, float* out) {
    constexpr int kWidth = kVectors * kLanes;
    Vec most[kVectors], total[kVectors]{};
    find_largest(columns, count, most);
    for (int i = 0; i < count; i += kDepth) {
        const int depth = least(kDepth, count - i);
        exponentiate(columns + i * kWidth, depth, most, total);
        weigh<kVectors>(columns + i * kWidth, depth, values + i * kBlock, block, dim, i > 0, out);
    }
    for (int v = 0; v < kVectors; ++v) total[v] = factor / total[v];
    for (int c = 0; c < dim; ++c)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            float* column = out + c * kWidth + v * kLanes;
            store(column, load(column) * total[v]);
        }
}

}  // namespace unetrt::UNETRT_ISA
