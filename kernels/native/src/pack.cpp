#include "pack.h"

#include <algorithm>

namespace unetrt {

namespace {

float sum_places(const TapWeights& tap, const float* weights, int32_t out, int32_t in) {
    float total = 0;
    for (int32_t i = 0; i < tap.count; ++i) total += weights[tap.place[i] + out * tap.out_stride + in * tap.in_stride];
    return total;
}

// One panel of `width` output channels from channel `first` on: for each tap, for each input channel, a row.
void pack_panel(const ConvStep& step, const float* weights, int32_t first, int32_t width, float* panel) {
    for (const Tap& tap : step.taps)
        for (int32_t c = 0; c < tap.channels; ++c)
            for (int32_t o = first; o < first + width; ++o) {
                *panel++ = o < step.out_channels ? sum_places(tap.weights, weights, o, c) : 0.0f;
            }
}

void pack_conv(const ConvStep& step, int32_t panel, const float* weights, float* packed) {
    int64_t inputs = 0;
    for (const Tap& tap : step.taps) inputs += tap.channels;
    const int32_t padded = pad_channels(step.out_channels);
    for (int32_t first = 0; first < padded; first += panel) {
        const int32_t width = std::min(panel, padded - first);
        pack_panel(step, weights, first, width, packed + step.weights + first * inputs);
    }
}

}  // namespace

void pack_weights(const Plan& plan, const float* weights, float* packed) {
    std::fill(packed, packed + plan.packed, 0.0f);
    for (const Step& step : plan.steps) {
        if (const auto* conv = std::get_if<ConvStep>(&step)) pack_conv(*conv, plan.kernels->panel, weights, packed);
    }
    for (const PackedVector& vector : plan.vectors) {
        for (int32_t i = 0; vector.place != -1 && i < vector.count; ++i) {
            packed[vector.packed + i] += weights[vector.place + i];
        }
    }
}

}  // namespace unetrt
