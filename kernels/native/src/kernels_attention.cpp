// softmax(q k^T) v: phase 0 packs the keys and values of each head, phase 1 does a chunk of queries after the other.
#include "kernels_attention.h"

#include "kernels_keys.h"

namespace unetrt::UNETRT_ISA {

namespace {

int padded_tokens(const AttentionArgs& args) { return round_up(tokens_of(args), kTile); }
int64_t block_floats(const AttentionArgs& args) { return static_cast<int64_t>(padded_tokens(args)) * kBlock; }

// Keys of one image and head, then values: [blocks of dim][padded tokens][kBlock] each, zeros where there is none.
int64_t head_floats(const AttentionArgs& args) { return 2 * blocks_of(args) * block_floats(args); }
float* find_packed(const AttentionArgs& args, int image, int head) {
    return args.workspace + (static_cast<int64_t>(image) * args.heads + head) * head_floats(args);
}

}  // namespace

void pack_tokens(const AttentionArgs& args, int item, float* scratch) {
    const int blocks = blocks_of(args), images = args.qkv.images, packed = images * args.heads * blocks;
    if (item >= packed) return clear_border(args.dst, item - packed, 0, args.dst.height);
    const int image = item % images, block = item / images % blocks, head = item / images / blocks;
    float* keys = find_packed(args, image, head) + block * block_floats(args);
    float* values = keys + blocks * block_floats(args);
    gather_tokens(args, kKeys, image, head, block * kBlock, padded_tokens(args), keys);
    gather_tokens(args, kValues, image, head, block * kBlock, padded_tokens(args), values);
    if (args.scale != 0.0f) normalise_keys(args, image, head, block * kBlock, scratch, keys);
}

namespace {

// scores [padded tokens][kVectors * kLanes] (+)= keys queries of channels [from, to); queries are columns.
template <int kVectors>
void score(const AttentionArgs& args, const float* keys, const float* queries, int from, int to, float* scores) {
    constexpr int kWidth = kVectors * kLanes;
    for (int t = 0; t < padded_tokens(args); t += kTile) {
        Vec sums[kTile][kVectors];
        start_sums(scores + t * kWidth, from > 0, sums);
        const float* q = queries + from * kWidth;
        for (int channel = from; channel < to; channel += kBlock) {
            const float* k = keys + channel / kBlock * block_floats(args) + t * kBlock;
            const int used = least(kBlock, to - channel);
            for (int c = 0; c < used; ++c, q += kWidth) multiply<kBlock>(k + c, q, sums);
        }
        store_sums(sums, scores + t * kWidth);
    }
}

// The columns of queries become those of the result.
template <int kVectors>
void attend(const AttentionArgs& args, const float* packed, float* columns, float* scores) {
    for (int c = 0; c < args.dim; c += kDepth) {
        score<kVectors>(args, packed, columns, c, least(c + kDepth, args.dim), scores);
    }
    const float* values = packed + blocks_of(args) * block_floats(args);
    weigh_by_softmax<kVectors>(scores, tokens_of(args), 1.0f, values, block_floats(args), args.dim, columns);
}

}  // namespace

void attend_chunk(const AttentionArgs& args, int item, float* staging) {
    const int pixels = pixels_of(args.qkv), chunks = divide_up(pixels, kMostQueries);
    const int first = item % chunks * kMostQueries, head = item / chunks % args.heads;
    const Queries queries{item / chunks / args.heads, head, first, least(kMostQueries, pixels - first)};
    const float* packed = find_packed(args, queries.image, head);
    float* columns = staging + kStagingFloats;
    float* scores = columns + static_cast<int64_t>(blocks_of(args)) * kBlock * kMostQueries;
    load_columns(args, queries, staging, columns);
    switch (queries.vectors()) {
        case 1: attend<1>(args, packed, columns, scores); break;
        case 2: attend<2>(args, packed, columns, scores); break;
        default: attend<kMostVectors>(args, packed, columns, scores);
    }
    store_columns(args, queries, staging, columns);
}

int64_t attention_workspace(const AttentionArgs& args) {
    return static_cast<int64_t>(args.qkv.images) * args.heads * head_floats(args);
}

int64_t attention_scratch(const AttentionArgs& args) {
    const int64_t columns = static_cast<int64_t>(blocks_of(args)) * kBlock + padded_tokens(args);
    return kStagingFloats + columns * kMostQueries;
}

}  // namespace unetrt::UNETRT_ISA
