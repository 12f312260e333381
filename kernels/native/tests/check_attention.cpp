// Both kinds of attention of one instruction set against plain loops in double precision.
#include <algorithm>

#include "check_maps.h"
#include "kernels_attention.h"
#include "kernels_linear_attention.h"

namespace unetrt::check {
namespace {

namespace isa = unetrt::UNETRT_ISA;

struct Case {
    const char* name;
    bool is_linear;
    int heads, dim, memory, height, width, images, src_border, dst_border;
    // Of the inputs' magnitude, of AttentionArgs.
    float amplitude, scale, value_scale;
};

// Chunks of queries are 12 to 32, tiles of keys 4 or 8, chunks of a linear attention's tokens 128.
constexpr Case kCases[] = {
    {"one block", false, 1, 16, 0, 4, 8, 1, 0, 0, 1, 0, 1},
    {"two heads, borders", false, 2, 32, 0, 8, 8, 3, 1, 1, 1, 0, 1},
    {"16 x 16", false, 3, 32, 0, 16, 16, 2, 0, 1, 1, 0, 1},
    {"wide head", false, 1, 256, 0, 16, 16, 1, 0, 0, 1, 0, 1},
    {"odd size", false, 1, 48, 0, 5, 7, 2, 1, 0, 1, 0, 1},
    {"one pixel", false, 1, 16, 0, 1, 1, 2, 0, 1, 1, 0, 1},
    {"heads of half a block", false, 3, 8, 0, 7, 5, 2, 0, 1, 1, 0, 1},
    {"heads of 24", false, 3, 24, 0, 8, 8, 2, 1, 0, 1, 0, 1},
    {"heads of 40", false, 2, 40, 0, 4, 4, 2, 0, 0, 1, 0, 1},
    {"heads of 5", false, 3, 5, 2, 3, 11, 2, 0, 1, 1, 0, 1},
    {"memory", false, 4, 32, 4, 8, 8, 2, 0, 0, 1, 0, 1},
    {"scores that overflow exp", false, 2, 16, 0, 8, 8, 2, 0, 0, 16, 0, 1},
    {"cosine", false, 4, 32, 0, 8, 8, 2, 0, 1, 1, 10, 1},
    {"cosine of channels of length 0", false, 1, 16, 0, 4, 4, 1, 0, 0, 0, 10, 1},
    {"cosine, memory", false, 2, 24, 3, 9, 9, 2, 1, 1, 3, 8, 1},
    {"linear", true, 4, 32, 0, 16, 16, 2, 0, 1, 1, 0.1767767f, 1},
    {"linear, borders", true, 2, 16, 0, 13, 11, 3, 1, 0, 1, 0.25f, 1},
    {"linear, divided values", true, 4, 32, 4, 16, 20, 2, 0, 0, 1, 0.1767767f, 1.0f / 320},
    {"linear, heads of 24", true, 3, 24, 5, 8, 8, 2, 0, 1, 1, 0.2f, 0.5f},
    {"linear, heads of 5", true, 3, 5, 2, 3, 11, 2, 0, 1, 1, 0.4f, 1},
    {"linear, keys that overflow exp", true, 2, 32, 0, 8, 8, 2, 0, 0, 200, 0.5f, 1},
    {"linear, much memory", true, 1, 64, 150, 32, 32, 1, 0, 0, 1, 0.125f, 1},
    {"linear, 16 pieces", true, 1, 16, 0, 80, 64, 2, 0, 1, 1, 0.25f, 1},
    {"linear, one pixel", true, 2, 8, 0, 1, 1, 1, 0, 0, 1, 0.5f, 1},
};

// Tokens of one image and head as doubles, [tokens][dim] each; queries of pixels only.
struct Tokens {
    std::vector<double> queries, keys, values;
    size_t pixels, tokens, dim;
};

Tokens read_tokens(const Case& c, const OwnedMap& qkv, const std::vector<float>& learned, int image, int head) {
    Tokens tokens{{}, {}, {}, static_cast<size_t>(c.height * c.width), 0, static_cast<size_t>(c.dim)};
    for (int part = 0; part < 3; ++part) {
        std::vector<double>& out = part == 0 ? tokens.queries : part == 1 ? tokens.keys : tokens.values;
        const double factor = part == 2 && c.is_linear ? static_cast<double>(c.value_scale) : 1.0;
        for (int i = 0; part > 0 && i < c.memory * c.dim; ++i) {
            out.push_back(learned[static_cast<size_t>(((part - 1) * c.heads + head) * c.memory * c.dim + i)]);
        }
        for (int y = 0; y < c.height; ++y)
            for (int x = 0; x < c.width; ++x)
                for (int i = 0; i < c.dim; ++i) {
                    out.push_back(qkv.at(image, (part * c.heads + head) * c.dim + i, y, x) * factor);
                }
    }
    tokens.tokens = tokens.pixels + static_cast<size_t>(c.memory);
    return tokens;
}

void normalise_channels(std::vector<double>& rows, size_t dim, double factor) {
    for (size_t c = 0; c < dim; ++c) {
        double squares = 0;
        for (size_t i = c; i < rows.size(); i += dim) squares += rows[i] * rows[i];
        const double length = std::max(std::sqrt(squares), 1e-12);
        for (size_t i = c; i < rows.size(); i += dim) rows[i] *= factor / length;
    }
}

// Softmax over `count` values that lie `step` apart.
void softmax(double* values, size_t count, size_t step) {
    double most = values[0], total = 0;
    for (size_t i = 0; i < count; ++i) most = std::max(most, values[i * step]);
    for (size_t i = 0; i < count; ++i) total += values[i * step] = std::exp(values[i * step] - most);
    for (size_t i = 0; i < count; ++i) values[i * step] /= total;
}

// a [rows][inner] times b [inner][columns].
std::vector<double> product(const std::vector<double>& a, const std::vector<double>& b, size_t inner) {
    const size_t rows = a.size() / inner, columns = b.size() / inner;
    std::vector<double> out(rows * columns, 0.0);
    for (size_t r = 0; r < rows; ++r)
        for (size_t i = 0; i < inner; ++i)
            for (size_t c = 0; c < columns; ++c) out[r * columns + c] += a[r * inner + i] * b[i * columns + c];
    return out;
}

std::vector<double> transposed(const std::vector<double>& a, size_t columns) {
    const size_t rows = a.size() / columns;
    std::vector<double> out(a.size());
    for (size_t r = 0; r < rows; ++r)
        for (size_t c = 0; c < columns; ++c) out[c * rows + r] = a[r * columns + c];
    return out;
}

// [pixels][dim]
std::vector<double> attend(const Case& c, Tokens tokens) {
    if (c.is_linear) {
        for (size_t i = 0; i < tokens.dim; ++i) softmax(&tokens.keys[i], tokens.tokens, tokens.dim);
        for (size_t i = 0; i < tokens.pixels; ++i) softmax(&tokens.queries[i * tokens.dim], tokens.dim, 1);
        for (double& q : tokens.queries) q *= static_cast<double>(c.scale);
        const auto context = product(transposed(tokens.keys, tokens.dim), tokens.values, tokens.tokens);
        return product(tokens.queries, context, tokens.dim);
    }
    if (c.scale != 0.0f) {
        normalise_channels(tokens.queries, tokens.dim, static_cast<double>(c.scale));
        normalise_channels(tokens.keys, tokens.dim, 1.0);
    }
    auto scores = product(tokens.queries, transposed(tokens.keys, tokens.dim), tokens.dim);
    for (size_t i = 0; i < tokens.pixels; ++i) softmax(&scores[i * tokens.tokens], tokens.tokens, 1);
    return product(scores, tokens.values, tokens.tokens);
}

Expected expect(const Case& c, const OwnedMap& qkv, const std::vector<float>& learned, const Map& dst) {
    Expected expected(dst);
    for (int n = 0; n < c.images; ++n)
        for (int h = 0; h < c.heads; ++h) {
            const auto rows = attend(c, read_tokens(c, qkv, learned, n, h));
            for (int t = 0; t < c.height * c.width; ++t)
                for (int i = 0; i < c.dim; ++i) {
                    expected.at(n, h * c.dim + i, t / c.width, t % c.width) = rows[static_cast<size_t>(t * c.dim + i)];
                }
        }
    return expected;
}

// The items of each phase in order, or in reverse.
void run(const Case& c, AttentionArgs args, bool in_reverse) {
    const int64_t shared = c.is_linear ? isa::linear_workspace(args) : isa::attention_workspace(args);
    const int64_t own = c.is_linear ? isa::linear_scratch(args) : isa::attention_scratch(args);
    std::vector<float> workspace(static_cast<size_t>(shared), kUnwritten);
    std::vector<float> scratch(static_cast<size_t>(own), kUnwritten);
    args.workspace = workspace.data();
    for (int phase = 0; phase < kAttentionPhases; ++phase) {
        const int items = c.is_linear ? isa::linear_items(args, phase) : isa::attention_items(args, phase);
        for (int i = 0; i < items; ++i) {
            const int item = in_reverse ? items - 1 - i : i;
            c.is_linear ? isa::linear(args, phase, item, scratch.data())
                        : isa::attention(args, phase, item, scratch.data());
        }
    }
}

// By 1 / sqrt(dim), as a network's projection does.
void scale_queries(const Case& c, const OwnedMap& qkv) {
    for (int n = 0; n < c.images; ++n)
        for (int i = 0; i < c.heads * c.dim; ++i)
            for (int y = 0; y < c.height; ++y)
                for (int x = 0; x < c.width; ++x) qkv.at(n, i, y, x) *= 1 / std::sqrt(static_cast<float>(c.dim));
}

int check(const Case& c) {
    const Shape in{3 * c.heads * c.dim, c.height, c.width, c.src_border, c.images};
    const Shape out{c.heads * c.dim, c.height, c.width, c.dst_border, c.images};
    const OwnedMap qkv(in, 0), dst(out, kUnwritten);
    qkv.randomise(1, c.amplitude);
    if (!c.is_linear) scale_queries(c, qkv);
    std::vector<float> learned(static_cast<size_t>(2 * c.heads * c.memory * c.dim));
    Random random(2);
    for (float& x : learned) x = c.amplitude * random.next();
    AttentionArgs args{qkv.map(), dst.map(), c.heads, c.dim, c.memory, learned.data(), c.scale, c.value_scale, nullptr};
    run(c, args, false);

    Expected expected = expect(c, qkv, learned, dst.map());
    const double error = largest_error(dst, expected);
    // A weight's relative error is the absolute one of its score, which grows with the square of the inputs.
    const double amplitude = static_cast<double>(c.amplitude), score = c.is_linear ? amplitude : amplitude * amplitude;
    // Keys and weights are bfloat16 where maps are, which is wrong by 2^-9 on average.
    const double of_weights = c.is_linear || sizeof(Stored) == 4 ? 0 : 1.0 / 512;
    const double limit = (3e-6 + of_weights) * amplitude * std::max(score, 1.0);
    int failures = report(error <= limit, "wrong values", c.name, error, limit);
    failures += report(has_zero_padding(dst), "padding not zero", c.name, 0, 0);

    const int last = c.images - 1;
    const OwnedMap one_qkv({in.channels, in.height, in.width, in.border, 1}, 0);
    const OwnedMap one_dst({out.channels, out.height, out.width, out.border, 1}, kUnwritten);
    for (int channel = 0; channel < in.channels; ++channel)
        for (int y = 0; y < c.height; ++y)
            for (int x = 0; x < c.width; ++x)
                one_qkv.at(0, channel, y, x) = static_cast<float>(qkv.at(last, channel, y, x));
    args.qkv = one_qkv.map();
    args.dst = one_dst.map();
    run(c, args, true);
    return failures + report(is_same_image(dst, last, one_dst), "an image depends on the others", c.name, 0, 0);
}

}  // namespace
}  // namespace unetrt::check

int main() {
    using namespace unetrt::check;
    if (!has_instruction_set()) return kSkipped;
    int failures = 0;
    for (const Case& c : kCases) failures += check(c);
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
