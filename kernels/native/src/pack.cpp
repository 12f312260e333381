#include "pack.h"

#include <algorithm>
#include <cstring>

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

// Rounded to the nearest bfloat16, ties to even.
uint16_t round_to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return static_cast<uint16_t>(bits >> 16 | 0x40);
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr int32_t kHalfPanel = 16;

// A block of a tap's input channels, from channel `in` on, for half of a panel: a row for each pair of them.
void pack_pairs(const ConvStep& step, const Tap& tap, const float* weights, int32_t out, int32_t in, int32_t block,
                uint16_t* rows) {
    for (int32_t c = in; c < in + block; c += 2)
        for (int32_t o = out; o < out + kHalfPanel; ++o)
            for (int32_t i = c; i < c + 2; ++i) {
                const bool is_there = o < step.out_channels && i < tap.channels;
                *rows++ = is_there ? round_to_bf16(sum_places(tap.weights, weights, o, i)) : uint16_t{0};
            }
}

// The same in bfloat16, the last block of each tap filled up with zeros.
void pack_panel_of_pairs(const ConvStep& step, const float* weights, int32_t first, int32_t width, int32_t block,
                         uint16_t* panel) {
    for (const Tap& tap : step.taps)
        for (int32_t c = 0; c < tap.channels; c += block)
            for (int32_t o = first; o < first + width; o += kHalfPanel, panel += kHalfPanel * block) {
                pack_pairs(step, tap, weights, o, c, block, panel);
            }
}

void pack_conv(const ConvStep& step, const Kernels& kernels, const float* weights, float* packed) {
    const int32_t padded = round_up(step.out_channels, kernels.block);
    float* panel = packed + step.weights;
    for (int32_t first = 0; first < padded; first += kernels.panel, panel += step.panel_floats) {
        const int32_t width = std::min(kernels.panel, padded - first);
        if (kernels.takes_pairs) {
            pack_panel_of_pairs(step, weights, first, width, kernels.block, reinterpret_cast<uint16_t*>(panel));
        } else {
            pack_panel(step, weights, first, width, panel);
        }
    }
}

}  // namespace

void pack_weights(const Plan& plan, const float* weights, float* packed) {
    std::fill(packed, packed + plan.packed, 0.0f);
    for (const Step& step : plan.steps) {
        if (const auto* conv = std::get_if<ConvStep>(&step)) pack_conv(*conv, *plan.kernels, weights, packed);
    }
    for (const PackedVector& vector : plan.vectors) {
        for (int32_t i = 0; vector.place != -1 && i < vector.count; ++i) {
            packed[vector.packed + i] += weights[vector.place + i];
        }
    }
}

}  // namespace unetrt
