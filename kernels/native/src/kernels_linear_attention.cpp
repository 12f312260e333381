// scale * softmax_dim(q) (softmax_tokens(k)^T v), whose right factor is the context [dim][dim] of a head.
//
// Phase 0 makes the context of each piece of the tokens, without dividing, relative to that piece's largest keys. Phase
// 1 merges them, as sums of exp(k - most) for different `most` can be, and multiplies a piece of the queries by the
// result. Where the pieces begin follows from the number of pixels alone.
#include "kernels_linear_attention.h"

#include "kernels_tokens.h"

namespace unetrt::UNETRT_ISA {

namespace {

// Pieces of a head's pixels.
constexpr int kLeastPixels = 256, kMostPieces = 16;
// Tokens that are added up before they reach the context.
constexpr int kChunk = 128;
constexpr int64_t kChunkFloats = int64_t{kChunk} * kBlock;

int blocks_of(const AttentionArgs& args) { return divide_up(args.dim, kBlock); }
int padded_dim(const AttentionArgs& args) { return blocks_of(args) * kBlock; }

// Of a context's block of value channels, [dim][kBlock].
int64_t block_floats(const AttentionArgs& args) { return static_cast<int64_t>(args.dim) * kBlock; }
int64_t context_floats(const AttentionArgs& args) { return blocks_of(args) * block_floats(args); }

int piece_pixels(const AttentionArgs& args) {
    const int share = divide_up(pixels_of(args.qkv), kMostPieces);
    return round_up(share > kLeastPixels ? share : kLeastPixels, kMostQueries);
}
int pieces_of(const AttentionArgs& args) { return divide_up(pixels_of(args.qkv), piece_pixels(args)); }

// Learned tokens are a piece of their own, in front of the pixels'.
struct Piece {
    int first, count;
    bool is_learned;
};

int parts_of(const AttentionArgs& args) { return pieces_of(args) + (args.memory > 0 ? 1 : 0); }

Piece find_piece(const AttentionArgs& args, int index) {
    if (args.memory > 0 && index == 0) return {0, args.memory, true};
    const int first = (args.memory > 0 ? index - 1 : index) * piece_pixels(args);
    return {first, least(piece_pixels(args), pixels_of(args.qkv) - first), false};
}

// What phase 0 leaves of one part of a head's tokens: for each key channel the largest key and the sum of
// exp(k - most), [padded dim] each, and the sums of exp(k - most) v, [blocks of value channels][dim of keys][kBlock].
struct Partial {
    float *most, *total, *context;
};

int64_t partial_floats(const AttentionArgs& args) { return 2 * padded_dim(args) + context_floats(args); }

Partial find_partial(const AttentionArgs& args, int image, int head, int part) {
    const int64_t index = (static_cast<int64_t>(image) * args.heads + head) * parts_of(args) + part;
    float* floats = args.workspace + index * partial_floats(args);
    return {floats, floats + padded_dim(args), floats + 2 * padded_dim(args)};
}

struct Head {
    int image, head;
};

// Tokens [from, from + count) of a piece.
void gather_piece(const AttentionArgs& args, Part part, const Head& head, int channel, const Piece& piece, int from,
                  int count, float* out) {
    if (piece.is_learned) {
        gather_learned(args, part, head.head, channel, from, count, out);
    } else {
        gather(channels_of(args, part, head.image, head.head, channel), piece.first + from, count, out);
    }
}

void find_largest_keys(const AttentionArgs& args, const Head& head, const Piece& piece, float* staging, float* most) {
    for (int channel = 0; channel < args.dim; channel += kBlock) {
        Vec largest[kEach];
        for (int v = 0; v < kEach; ++v) largest[v] = splat(-__builtin_inff());
        for (int t = 0; t < piece.count; t += kChunk) {
            const int count = least(kChunk, piece.count - t);
            gather_piece(args, kKeys, head, channel, piece, t, count, staging);
            Vec of_chunk[kEach];
            find_largest(staging, count, of_chunk);
            for (int v = 0; v < kEach; ++v) largest[v] = larger(of_chunk[v], largest[v]);
        }
        for (int v = 0; v < kEach; ++v) store(most + channel + v * kLanes, largest[v]);
    }
}

// Keys of a chunk as weights [blocks of dim][kChunk][kBlock], whose sums are added to those of the piece.
void load_weights(const AttentionArgs& args, const Head& head, const Piece& piece, int from, int count,
                  const Partial& partial, float* weights) {
    for (int channel = 0; channel < args.dim; channel += kBlock, weights += kChunkFloats) {
        gather_piece(args, kKeys, head, channel, piece, from, count, weights);
        Vec most[kEach], total[kEach];
        for (int v = 0; v < kEach; ++v) most[v] = load(partial.most + channel + v * kLanes);
        for (int v = 0; v < kEach; ++v) total[v] = load(partial.total + channel + v * kLanes);
        exponentiate(weights, count, most, total);
        for (int v = 0; v < kEach; ++v) store(partial.total + channel + v * kLanes, total[v]);
    }
}

// context [rows][kBlock] += factor * weights^T values; weights and values [count][kBlock].
void add_products(const float* weights, const float* values, int count, float factor, int rows, float* context) {
    constexpr int kRows = kLanes == 16 ? 16 / kEach : 4;
    for (int r = 0; r < rows; r += kRows) {
        Vec sums[kRows][kEach]{};
        for (int i = 0; i < count; ++i) multiply<1>(weights + i * kBlock + r, values + i * kBlock, sums);
        for (int i = 0; i < least(kRows, rows - r); ++i)
            for (int v = 0; v < kEach; ++v) {
                float* out = context + (r + i) * kBlock + v * kLanes;
                store(out, load(out) + sums[i][v] * factor);
            }
    }
}

void make_partial(const AttentionArgs& args, int item, float* weights) {
    const int parts = parts_of(args), images = args.qkv.images, made = images * args.heads * parts;
    if (item >= made) return clear_border(args.dst, item - made, 0, args.dst.height);
    const Head head{item % images, item / images % args.heads};
    const int part = item / images / args.heads;
    const Piece piece = find_piece(args, part);
    const Partial partial = find_partial(args, head.image, head.head, part);
    float* values = weights + blocks_of(args) * kChunkFloats;
    find_largest_keys(args, head, piece, values, partial.most);
    fill_zero(partial.total, padded_dim(args) + context_floats(args));
    for (int t = 0; t < piece.count; t += kChunk) {
        const int count = least(kChunk, piece.count - t);
        load_weights(args, head, piece, t, count, partial, weights);
        for (int b = 0; b < blocks_of(args); ++b) {
            gather_piece(args, kValues, head, b * kBlock, piece, t, count, values);
            const float factor = piece.is_learned ? 1.0f : args.value_scale;
            for (int channel = 0; channel < args.dim; channel += kBlock) {
                float* context = partial.context + b * block_floats(args) + channel * kBlock;
                const float* own = weights + channel / kBlock * kChunkFloats;
                add_products(own, values, count, factor, least(kBlock, args.dim - channel), context);
            }
        }
    }
}

// Of a block of key channels: their largest keys over all parts, and one over the sums of exp(k - most).
void merge_totals(const AttentionArgs& args, const Head& head, int channel, Vec (&most)[kEach], Vec (&inverse)[kEach]) {
    for (int v = 0; v < kEach; ++v) {
        const int lane = channel + v * kLanes;
        most[v] = splat(-__builtin_inff());
        Vec total{};
        for (int p = 0; p < parts_of(args); ++p) {
            most[v] = larger(load(find_partial(args, head.image, head.head, p).most + lane), most[v]);
        }
        for (int p = 0; p < parts_of(args); ++p) {
            const Partial partial = find_partial(args, head.image, head.head, p);
            total += load(partial.total + lane) * exp_of_negative(load(partial.most + lane) - most[v]);
        }
        inverse[v] = 1.0f / total;
    }
}

// context [blocks of value channels][dim of keys][kBlock]
void merge_contexts(const AttentionArgs& args, const Head& head, float* context) {
    fill_zero(context, context_floats(args));
    for (int channel = 0; channel < args.dim; channel += kBlock) {
        const int rows = least(kBlock, args.dim - channel);
        Vec most[kEach], inverse[kEach];
        merge_totals(args, head, channel, most, inverse);
        for (int p = 0; p < parts_of(args); ++p) {
            const Partial partial = find_partial(args, head.image, head.head, p);
            alignas(64) float factor[kBlock];
            for (int v = 0; v < kEach; ++v) {
                const Vec own = load(partial.most + channel + v * kLanes);
                store(factor + v * kLanes, exp_of_negative(own - most[v]) * inverse[v]);
            }
            for (int b = 0; b < blocks_of(args); ++b) {
                const int64_t first = b * block_floats(args) + channel * kBlock;
                for (int i = 0; i < rows * kBlock; i += kLanes) {
                    const Vec value = load(partial.context + first + i) * factor[i / kBlock];
                    store(context + first + i, load(context + first + i) + value);
                }
            }
        }
    }
}

template <int kVectors>
void apply(const AttentionArgs& args, const float* context, float* columns, float* result) {
    weigh_by_softmax<kVectors>(columns, args.dim, args.scale, context, block_floats(args), args.dim, result);
}

void apply_to_chunk(const AttentionArgs& args, const Queries& queries, const float* context, float* staging) {
    float* columns = staging + kStagingFloats;
    float* result = columns + static_cast<int64_t>(padded_dim(args)) * kMostQueries;
    load_columns(args, queries, staging, columns);
    switch (queries.vectors()) {
        case 1: apply<1>(args, context, columns, result); break;
        case 2: apply<2>(args, context, columns, result); break;
        default: apply<kMostVectors>(args, context, columns, result);
    }
    store_columns(args, queries, staging, result);
}

void apply_to_piece(const AttentionArgs& args, int item, float* context) {
    const int pieces = pieces_of(args), first = item % pieces * piece_pixels(args);
    const int end = least(first + piece_pixels(args), pixels_of(args.qkv));
    const Head head{item / pieces / args.heads, item / pieces % args.heads};
    merge_contexts(args, head, context);
    for (int t = first; t < end; t += kMostQueries) {
        const Queries queries{head.image, head.head, t, least(kMostQueries, end - t)};
        apply_to_chunk(args, queries, context, context + context_floats(args));
    }
}

}  // namespace

int64_t linear_workspace(const AttentionArgs& args) {
    return static_cast<int64_t>(args.qkv.images) * args.heads * parts_of(args) * partial_floats(args);
}

int64_t linear_scratch(const AttentionArgs& args) {
    const int64_t of_partial = (blocks_of(args) + 1) * kChunkFloats;
    const int64_t columns = 2 * static_cast<int64_t>(padded_dim(args)) * kMostQueries;
    const int64_t of_result = context_floats(args) + kStagingFloats + columns;
    return of_partial > of_result ? of_partial : of_result;
}

int linear_items(const AttentionArgs& args, int phase) {
    const int heads = args.qkv.images * args.heads;
    return phase == 0 ? heads * parts_of(args) + args.dst.blocks() : heads * pieces_of(args);
}

void linear(const AttentionArgs& args, int phase, int item, float* scratch) {
    if (phase == 0) {
        make_partial(args, item, scratch);
    } else {
        apply_to_piece(args, item, scratch);
    }
}

}  // namespace unetrt::UNETRT_ISA
