// Gradient of o = p v, p = softmax(q k^T), in float32, an image and head an item:
// dv = p^T do, ds = p (do v^T - the sum over keys of p times it), dq = ds k, dk = ds^T q.
#include "kernels_gradient.h"
#include "kernels_tokens.h"

namespace unetrt::UNETRT_ISA {

namespace {

constexpr int kRows = 8;  // Queries that are done together.

int padded_dim(const AttentionGradientArgs& args) { return round_up(args.dim, kBlock); }
int padded_tokens(const AttentionGradientArgs& args) { return round_up(pixels_of(args.src), kLanes); }

// a [rows][depth], element (i, k) at i * row + k * column.
struct Left {
    const float* data;
    int64_t row, column;
};

template <int kHeight, int kWidth>
UNETRT_INLINE void multiply_tile(const Left& a, const float* b, int64_t b_row, int depth, bool adds, float* out,
                                 int64_t out_row) {
    Vec sums[kHeight][kWidth];
    for (int i = 0; i < kHeight; ++i)
        for (int v = 0; v < kWidth; ++v) sums[i][v] = adds ? load(out + i * out_row + v * kLanes) : Vec{};
    for (int k = 0; k < depth; ++k) {
        Vec columns[kWidth];
        for (int v = 0; v < kWidth; ++v) columns[v] = load(b + k * b_row + v * kLanes);
        for (int i = 0; i < kHeight; ++i) {
            const Vec x = splat(a.data[i * a.row + k * a.column]);
            for (int v = 0; v < kWidth; ++v) sums[i][v] += x * columns[v];
        }
    }
    for (int i = 0; i < kHeight; ++i)
        for (int v = 0; v < kWidth; ++v) store(out + i * out_row + v * kLanes, sums[i][v]);
}

// out [rows][width] (+)= a [rows][depth] b [depth][width]; width: a multiple of kLanes, rows of b and out as far apart.
void multiply_matrices(Left a, const float* b, int rows, int depth, int width, bool adds, float* out) {
    constexpr int kHeight = kLanes == 16 ? 8 : 4;
    for (int i = 0; i < rows;) {
        const bool is_whole = rows - i >= kHeight;
        for (int j = 0; j < width;) {
            const bool is_wide = width - j >= 2 * kLanes;
            float* to = out + static_cast<int64_t>(i) * width + j;
            if (is_whole && is_wide) multiply_tile<kHeight, 2>(a, b + j, width, depth, adds, to, width);
            if (is_whole && !is_wide) multiply_tile<kHeight, 1>(a, b + j, width, depth, adds, to, width);
            if (!is_whole && is_wide) multiply_tile<1, 2>(a, b + j, width, depth, adds, to, width);
            if (!is_whole && !is_wide) multiply_tile<1, 1>(a, b + j, width, depth, adds, to, width);
            j += is_wide ? 2 * kLanes : kLanes;
        }
        const int done = is_whole ? kHeight : 1;
        a.data += done * a.row;
        i += done;
    }
}

// Where a thread keeps a head: matrices [padded tokens][padded dim], two of them transposed too, and a few rows of scores.
struct Head {
    int64_t matrix, row;
    float *staging, *q, *k, *v, *result, *k_columns, *v_columns, *dq, *dk, *dv, *p, *ds;

    Head(const AttentionGradientArgs& args, float* scratch)
        : matrix(static_cast<int64_t>(padded_tokens(args)) * padded_dim(args)),
          row(padded_tokens(args)),
          staging(scratch),
          q(staging + row * kBlock),
          k(q + matrix),
          v(k + matrix),
          result(v + matrix),
          k_columns(result + matrix),
          v_columns(k_columns + matrix),
          dq(v_columns + matrix),
          dk(dq + matrix),
          dv(dk + matrix),
          p(dv + matrix),
          ds(p + kRows * row) {}

    static int64_t floats(const AttentionGradientArgs& args) {
        const Head head(args, nullptr);
        return head.row * kBlock + 9 * head.matrix + 2 * kRows * head.row;
    }
};

struct Item {
    int image, head;
};

Channels of_head(const AttentionGradientArgs& args, const Map& map, int part, const Item& item, int channel) {
    const int first = (part * args.heads + item.head) * args.dim;
    return {map, item.image, first + channel, least(kBlock, args.dim - channel)};
}

// A head's channels of a map as rows of tokens, padded with zeros.
void load_rows(const AttentionGradientArgs& args, const Map& map, int part, const Item& item, float* staging,
               float* rows) {
    const int dim = padded_dim(args), tokens = pixels_of(args.src);
    fill_zero(staging, static_cast<int64_t>(padded_tokens(args)) * kBlock);
    for (int c = 0; c < args.dim; c += kBlock) {
        gather(of_head(args, map, part, item, c), 0, tokens, staging);
        for (int t = 0; t < padded_tokens(args); ++t)
            for (int i = 0; i < kBlock; i += kLanes) {
                store(rows + static_cast<int64_t>(t) * dim + c + i,
                      load(staging + static_cast<int64_t>(t) * kBlock + i));
            }
    }
}

void store_rows(const AttentionGradientArgs& args, int part, const Item& item, const float* rows, float* staging) {
    const int dim = padded_dim(args), tokens = pixels_of(args.src);
    for (int c = 0; c < args.dim; c += kBlock) {
        for (int t = 0; t < tokens; ++t)
            for (int i = 0; i < kBlock; i += kLanes) {
                store(staging + static_cast<int64_t>(t) * kBlock + i,
                      load(rows + static_cast<int64_t>(t) * dim + c + i));
            }
        scatter(staging, 0, tokens, of_head(args, args.dst, part, item, c));
    }
}

// p, a row of scores, becomes its softmax, and ds, the gradient of that, the gradient of the scores.
void derive_softmax(float* p, float* ds, int tokens, int padded) {
    for (int t = tokens; t < padded; ++t) p[t] = -__builtin_inff();
    Vec most = load(p);
    for (int t = kLanes; t < padded; t += kLanes) most = larger(load(p + t), most);
    const Vec largest_score = splat(largest(most));
    Vec total{};
    for (int t = 0; t < padded; t += kLanes) {
        const Vec e = exp(load(p + t) - largest_score);
        store(p + t, e);
        total += e;
    }
    const Vec inverse = splat(1.0f / sum(total));
    Vec products{};
    for (int t = 0; t < padded; t += kLanes) {
        const Vec share = load(p + t) * inverse;
        store(p + t, share);
        products += share * load(ds + t);
    }
    const Vec mean = splat(sum(products));
    for (int t = 0; t < padded; t += kLanes) store(ds + t, load(p + t) * (load(ds + t) - mean));
}

void do_head(const AttentionGradientArgs& args, const Item& item, float* scratch) {
    const Head head(args, scratch);
    const int tokens = pixels_of(args.src), padded = padded_tokens(args), dim = padded_dim(args);
    load_rows(args, args.src, kQueries, item, head.staging, head.q);
    load_rows(args, args.src, kKeys, item, head.staging, head.k);
    load_rows(args, args.src, kValues, item, head.staging, head.v);
    load_rows(args, args.gradient, 0, item, head.staging, head.result);
    transpose(head.k, padded, dim, head.k_columns);
    transpose(head.v, padded, dim, head.v_columns);
    fill_zero(head.dk, head.matrix);
    fill_zero(head.dv, head.matrix);
    for (int first = 0; first < tokens; first += kRows) {
        const int rows = least(kRows, tokens - first);
        const float* q = head.q + static_cast<int64_t>(first) * dim;
        const float* result = head.result + static_cast<int64_t>(first) * dim;
        multiply_matrices({q, dim, 1}, head.k_columns, rows, args.dim, padded, false, head.p);
        multiply_matrices({result, dim, 1}, head.v_columns, rows, args.dim, padded, false, head.ds);
        for (int i = 0; i < rows; ++i) derive_softmax(head.p + i * head.row, head.ds + i * head.row, tokens, padded);
        multiply_matrices({head.ds, padded, 1}, head.k, rows, tokens, dim, false,
                          head.dq + static_cast<int64_t>(first) * dim);
        multiply_matrices({head.ds, 1, padded}, q, tokens, rows, dim, true, head.dk);
        multiply_matrices({head.p, 1, padded}, result, tokens, rows, dim, true, head.dv);
    }
    store_rows(args, kQueries, item, head.dq, head.staging);
    store_rows(args, kKeys, item, head.dk, head.staging);
    store_rows(args, kValues, item, head.dv, head.staging);
    const int end = 3 * args.heads * args.dim, missing = args.dst.blocks() * kBlock - end;
    if (item.head + 1 < args.heads || missing == 0) return;
    fill_zero(head.staging, static_cast<int64_t>(padded) * kBlock);
    scatter(head.staging, 0, tokens, {args.dst, item.image, end, missing});
}

}  // namespace

int64_t attention_gradient_scratch(const AttentionGradientArgs& args) { return Head::floats(args); }

int attention_gradient_items(const AttentionGradientArgs& args) {
    return args.src.images * args.heads + args.dst.blocks();
}

void attention_gradient(const AttentionGradientArgs& args, int item, float* scratch) {
    const int heads = args.src.images * args.heads;
    if (item >= heads) return clear_border(args.dst, item - heads, 0, args.dst.height);
    do_head(args, {item / args.heads, item % args.heads}, scratch);
}

}  // namespace unetrt::UNETRT_ISA
