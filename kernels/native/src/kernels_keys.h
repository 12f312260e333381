// Keys and values of a head as floats, [tokens][kBlock] for each block of its channels; learned tokens come first.
#pragma once

#include "kernels_tokens.h"

namespace unetrt::UNETRT_ISA {

UNETRT_INLINE int tokens_of(const AttentionArgs& args) { return args.memory + pixels_of(args.qkv); }
UNETRT_INLINE int blocks_of(const AttentionArgs& args) { return divide_up(args.dim, kBlock); }

// Tokens [padded][kBlock] of a head's keys or values, channels from `channel` on.
static inline void gather_tokens(const AttentionArgs& args, Part part, int image, int head, int channel, int padded,
                                 float* out) {
    const int tokens = tokens_of(args);
    gather_learned(args, part, head, channel, 0, args.memory, out);
    const Channels from = channels_of(args, part, image, head, channel);
    gather(from, 0, pixels_of(args.qkv), out + args.memory * kBlock);
    fill_zero(out + tokens * kBlock, static_cast<int64_t>(padded - tokens) * kBlock);
}

// Adds a sum over tokens [count][kBlock], so that long sums are sums of short ones.
static inline void add_squares(const float* tokens, int count, Vec (&total)[kEach]) {
    for (int v = 0; v < kEach; ++v) {
        Vec squares{};
        for (int t = 0; t < count; ++t) {
            const Vec x = load(tokens + t * kBlock + v * kLanes);
            squares += x * x;
        }
        total[v] += squares;
    }
}

UNETRT_INLINE float length_of(float squares) {
    const float length = __builtin_sqrtf(squares);
    return length > 1e-12f ? length : 1e-12f;
}

// Keys times scale / (|q| |k|): the queries' lengths too, so that queries are read as they are.
static inline void normalise_keys(const AttentionArgs& args, int image, int head, int channel, float* staging,
                                  float* keys) {
    const Channels queries = channels_of(args, kQueries, image, head, channel);
    const int pixels = pixels_of(args.qkv), tokens = tokens_of(args);
    Vec of_queries[kEach]{}, of_keys[kEach]{};
    for (int t = 0; t < pixels; t += kMostQueries) {
        const int count = least(kMostQueries, pixels - t);
        gather(queries, t, count, staging);
        add_squares(staging, count, of_queries);
    }
    for (int t = 0; t < tokens; t += kMostQueries) {
        add_squares(keys + t * kBlock, least(kMostQueries, tokens - t), of_keys);
    }
    for (int v = 0; v < kEach; ++v) {
        Vec factor;
        for (int i = 0; i < kLanes; ++i) {
            factor[i] = args.scale / (length_of(of_queries[v][i]) * length_of(of_keys[v][i]));
        }
        for (int t = 0; t < tokens; ++t) {
            float* key = keys + t * kBlock + v * kLanes;
            store(key, load(key) * factor);
        }
    }
}

}  // namespace unetrt::UNETRT_ISA
