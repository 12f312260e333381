// softmax(q k^T) v with products of bfloat16: phase 0 packs the keys and values of each head as weights, phase 1 does a
// chunk of 32 queries after the other. Scores, their maximum and the sum of their exponentials are floats.
#include "kernels_attention.h"

#include "kernels_keys.h"
#include "products.h"

namespace unetrt::UNETRT_ISA {

namespace {

static_assert(kProductRows == kMostQueries, "gather() and scatter() stage as many");

int padded_tokens(const AttentionArgs& args) { return round_up(tokens_of(args), kBlock); }
int padded_dim(const AttentionArgs& args) { return blocks_of(args) * kBlock; }

// Of one image and head: keys [tokens / 16][blocks of dim], then values [tokens / 32][dim / 16], a tile each.
int64_t half_of_head(const AttentionArgs& args) { return static_cast<int64_t>(padded_tokens(args)) * padded_dim(args); }
Element* find_packed(const AttentionArgs& args, int image, int head) {
    const int64_t index = static_cast<int64_t>(image) * args.heads + head;
    return reinterpret_cast<Element*>(args.workspace) + index * 2 * half_of_head(args);
}

// A block of 16 tokens' keys as a tile: [pair of channels][token][2].
void pack_keys(const float* keys, Element* tile) {
    alignas(64) Element lines[kTileElements];
    for (int i = 0; i < kTileElements; i += kLanes) store(lines + i, load(keys + i));
    transpose_square(reinterpret_cast<const float*>(lines), kLanes, reinterpret_cast<float*>(tile), kLanes);
}

UNETRT_INLINE Ints round_to_bits(Vec v) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    return __builtin_convertvector(reinterpret_cast<Halves>(rounded), Ints);
}

// 16 channels of 32 tokens' values, [32][kBlock], as a tile: [pair of tokens][channel][2].
void pack_values(const float* values, Element* tile) {
    for (int pair = 0; pair < kLanes; ++pair) {
        const float* row = values + 2 * pair * kBlock;
        const Ints words = round_to_bits(load(row)) | round_to_bits(load(row + kBlock)) << 16;
        store(reinterpret_cast<float*>(tile) + pair * kLanes, reinterpret_cast<Vec>(words));
    }
}

}  // namespace

void pack_tokens(const AttentionArgs& args, int item, float* scratch) {
    const int blocks = blocks_of(args), images = args.qkv.images, packed = images * args.heads * blocks;
    if (item >= packed) return clear_border(args.dst, item - packed, 0, args.dst.height);
    const int image = item % images, block = item / images % blocks, head = item / images / blocks;
    const int tokens = padded_tokens(args);
    float* staged = scratch + kStagingFloats;
    Element* keys = find_packed(args, image, head);
    Element* values = keys + half_of_head(args);
    gather_tokens(args, kKeys, image, head, block * kBlock, tokens, staged);
    if (args.scale != 0.0f) normalise_keys(args, image, head, block * kBlock, scratch, staged);
    for (int t = 0; t < tokens; t += kLanes) {
        pack_keys(staged + t * kBlock, keys + (static_cast<int64_t>(t / kLanes) * blocks + block) * kTileElements);
    }
    gather_tokens(args, kValues, image, head, block * kBlock, tokens, staged);
    for (int t = 0; t < tokens; t += kBlock)
        for (int half = 0; half < 2; ++half) {
            const int64_t tile = static_cast<int64_t>(t / kBlock) * 2 * blocks + 2 * block + half;
            pack_values(staged + t * kBlock + half * kLanes, values + tile * kTileElements);
        }
}

namespace {

// scores [32][padded tokens] as weights exp(score - largest); one over their sum.
float exponentiate_row(float* scores, int tokens, int padded, Element* weights) {
    for (int t = tokens; t < padded; ++t) scores[t] = -__builtin_inff();
    Vec most = load(scores), total{};
    for (int t = kLanes; t < padded; t += kLanes) most = larger(load(scores + t), most);
    const Vec largest_score = splat(largest(most));
    for (int t = 0; t < padded; t += kLanes) {
        const Vec e = approximate_exp(load(scores + t) - largest_score);
        store(weights + t, e);
        total += e;
    }
    return 1.0f / sum(total);
}

// Where one thread keeps a chunk: queries [blocks of dim][32] lines, scores and the result, floats, and weights.
struct Chunk {
    float* staging;
    Element* queries;
    float *scores, *result;
    Element* weights;

    Chunk(const AttentionArgs& args, float* scratch)
        : staging(scratch),
          queries(reinterpret_cast<Element*>(staging + kStagingFloats)),
          scores(staging + kStagingFloats + kProductRows * padded_dim(args) / 2),
          result(scores + kProductRows * padded_tokens(args)),
          weights(reinterpret_cast<Element*>(result + kProductRows * padded_dim(args))) {}

    static int64_t floats(const AttentionArgs& args) {
        return kStagingFloats + kProductRows * (3 * static_cast<int64_t>(padded_dim(args)) / 2 +
                                                3 * static_cast<int64_t>(padded_tokens(args)) / 2);
    }
};

void load_queries(const AttentionArgs& args, const Queries& queries, const Chunk& chunk) {
    fill_zero(chunk.staging + queries.count * kBlock, static_cast<int64_t>(kProductRows - queries.count) * kBlock);
    for (int c = 0; c < args.dim; c += kBlock) {
        gather(channels_of(args, kQueries, queries.image, queries.head, c), queries.first, queries.count,
               chunk.staging);
        Element* lines = chunk.queries + c * kProductRows;
        for (int i = 0; i < kProductRows * kBlock; i += kLanes) store(lines + i, load(chunk.staging + i));
    }
}

void store_result(const AttentionArgs& args, const Queries& queries, const Chunk& chunk, const float* inverse) {
    for (int c = 0; c < args.dim; c += kBlock) {
        for (int i = 0; i < queries.count; ++i)
            for (int v = 0; v < kBlock; v += kLanes) {
                const Vec value = load(chunk.result + static_cast<int64_t>(i) * padded_dim(args) + c + v);
                store(chunk.staging + i * kBlock + v, value * inverse[i]);
            }
        const Channels to{args.dst, queries.image, queries.head * args.dim + c, least(kBlock, args.dim - c)};
        scatter(chunk.staging, queries.first, queries.count, to);
    }
    pad_last_block(args, queries, chunk.staging);
}

}  // namespace

void attend_chunk(const AttentionArgs& args, int item, float* scratch) {
    const Products products;
    const int pixels = pixels_of(args.qkv), chunks = divide_up(pixels, kProductRows), tokens = padded_tokens(args);
    const int first = item % chunks * kProductRows, head = item / chunks % args.heads, blocks = blocks_of(args);
    const Queries queries{item / chunks / args.heads, head, first, least(kProductRows, pixels - first)};
    const Element* keys = find_packed(args, queries.image, head);
    const Element* values = keys + half_of_head(args);
    const Chunk chunk(args, scratch);
    load_queries(args, queries, chunk);
    const int64_t of_tokens = blocks * kTileElements;
    for (int t = 0; t < tokens; t += kBlock) {
        multiply_rows(chunk.queries, kBlock, kProductRows * kBlock, keys + t / kLanes * of_tokens, of_tokens,
                      kTileElements, blocks, chunk.scores + t, tokens);
    }
    float inverse[kProductRows];
    for (int i = 0; i < kProductRows; ++i) {
        float* scores = chunk.scores + static_cast<int64_t>(i) * tokens;
        inverse[i] =
            exponentiate_row(scores, tokens_of(args), tokens, chunk.weights + static_cast<int64_t>(i) * tokens);
    }
    for (int b = 0; b < blocks; ++b) {
        multiply_rows(chunk.weights, tokens, kBlock, values + 2 * b * kTileElements, kTileElements, 2 * of_tokens,
                      tokens / kBlock, chunk.result + b * kBlock, padded_dim(args));
    }
    store_result(args, queries, chunk, inverse);
}

int64_t attention_workspace(const AttentionArgs& args) {
    return static_cast<int64_t>(args.qkv.images) * args.heads * half_of_head(args);
}

int64_t attention_scratch(const AttentionArgs& args) {
    const int64_t of_pack = kStagingFloats + static_cast<int64_t>(padded_tokens(args)) * kBlock;
    return of_pack > Chunk::floats(args) ? of_pack : Chunk::floats(args);
}

}  // namespace unetrt::UNETRT_ISA
