// The end of a classifier: pixels as a row of tokens with their mean in front, and logits with the gradient of a label's
// log-probability.
#include "kernels_classify.h"

#include <cmath>

#include "kernels_common.h"

namespace unetrt::UNETRT_ISA {

namespace {

constexpr int kEach = kBlock / kLanes;

// What is learned of a block's channels for one token.
void load_learned(const TokensArgs& args, int block, int token, float* learned) {
    for (int i = 0; i < kBlock; ++i) {
        const int channel = block * kBlock + i;
        const bool is_there = args.learned != nullptr && channel < args.tokens.channels;
        learned[i] = is_there ? args.learned[static_cast<int64_t>(channel) * args.tokens.width + token] : 0.0f;
    }
}

// log of the sum of exponentials.
float sum_exponentials(const float* logits, int count, float most) {
    float total = 0;
    for (int k = 0; k < count; ++k) total += expf(logits[k] - most);
    return most + logf(total);
}

}  // namespace

int tokens_items(const TokensArgs& args) { return args.tokens.blocks(); }

void to_tokens(const TokensArgs& args, int item) {
    const Map &pixels = args.pixels, &tokens = args.tokens;
    const float share = 1.0f / static_cast<float>(tokens.width - 1);
    Vec learned[kEach];
    alignas(64) float row[kBlock];
    for (int n = 0; n < pixels.images; ++n) {
        Vec total[kEach]{};
        for (int token = 1; token < tokens.width; ++token) {
            const Element* in = at(pixels, item, (token - 1) / pixels.width, (token - 1) % pixels.width) + n * kBlock;
            Element* out = at(tokens, item, 0, token) + n * kBlock;
            load_learned(args, item, token, row);
            for (int v = 0; v < kEach; ++v) {
                const Vec value = load(in + v * kLanes);
                total[v] += value;
                store(out + v * kLanes, value + load(row + v * kLanes));
            }
        }
        load_learned(args, item, 0, row);
        for (int v = 0; v < kEach; ++v) {
            learned[v] = load(row + v * kLanes);
            store(at(tokens, item, 0, 0) + n * kBlock + v * kLanes, total[v] * share + learned[v]);
        }
    }
    clear_border(tokens, item, 0, 1);
}

int pixels_items(const TokensArgs& args) { return args.pixels.blocks(); }

void to_pixels(const TokensArgs& args, int item) {
    const Map &pixels = args.pixels, &tokens = args.tokens;
    const float share = 1.0f / static_cast<float>(tokens.width - 1);
    for (int n = 0; n < pixels.images; ++n) {
        Vec first[kEach];
        for (int v = 0; v < kEach; ++v) first[v] = load(at(tokens, item, 0, 0) + n * kBlock + v * kLanes) * share;
        for (int token = 1; token < tokens.width; ++token) {
            const Element* in = at(tokens, item, 0, token) + n * kBlock;
            Element* out = at(pixels, item, (token - 1) / pixels.width, (token - 1) % pixels.width) + n * kBlock;
            for (int v = 0; v < kEach; ++v) store(out + v * kLanes, load(in + v * kLanes) + first[v]);
        }
    }
    clear_border(pixels, item, 0, pixels.height);
}

int64_t classify_scratch(const ClassifyArgs& args) {
    return args.classes + 2 * static_cast<int64_t>(args.src.channels);
}

int classify_items(const ClassifyArgs& args) { return args.src.images; }

void classify(const ClassifyArgs& args, int item, float* scratch) {
    const int channels = args.src.channels, classes = args.classes;
    float *logits = scratch, *features = logits + classes, *gradient = features + channels;
    for (int c = 0; c < channels; ++c) {
        features[c] = to_float(at(args.src, c / kBlock, 0, 0)[item * kBlock + c % kBlock]);
        gradient[c] = 0;
    }
    float most = -__builtin_inff();
    for (int k = 0; k < classes; ++k) {
        const float* weight = args.weight + static_cast<int64_t>(k) * channels;
        float total = args.bias[k];
        for (int c = 0; c < channels; ++c) total += weight[c] * features[c];
        logits[k] = total;
        most = total > most ? total : most;
    }
    const float whole = sum_exponentials(logits, classes, most);
    const float label = args.rows[item * args.row_stride], factor = args.rows[item * args.row_stride + 1];
    args.log_p[item] = __builtin_nanf("");
    for (int k = 0; k < classes; ++k) {
        const bool is_label = static_cast<float>(k) == label;
        if (is_label) args.log_p[item] = logits[k] - whole;
        const float g = factor * ((is_label ? 1.0f : 0.0f) - expf(logits[k] - whole));
        const float* weight = args.weight + static_cast<int64_t>(k) * channels;
        for (int c = 0; c < channels; ++c) gradient[c] += g * weight[c];
    }
    for (int b = 0; b < args.dst.blocks(); ++b)
        for (int y = 0; y < args.dst.height; ++y)
            for (int x = 0; x < args.dst.width; ++x)
                for (int i = 0; i < kBlock; ++i) {
                    const int c = b * kBlock + i;
                    const bool is_there = x == 0 && y == 0 && c < channels;
                    at(args.dst, b, y, x)[item * kBlock + i] = to_element(is_there ? gradient[c] : 0.0f);
                }
    if (item > 0) return;
    for (int b = 0; b < args.dst.blocks(); ++b) clear_border(args.dst, b, 0, args.dst.height);
}

}  // namespace unetrt::UNETRT_ISA
