#include "pack.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

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

constexpr float kLevels = 127;

// The largest |w| of an output channel; NaN where one is.
float find_largest(const ConvStep& step, const float* weights, int32_t out) {
    float most = 0;
    for (const Tap& tap : step.taps)
        for (int32_t c = 0; c < tap.channels; ++c) {
            const float size = std::fabs(sum_places(tap.weights, weights, out, c));
            if (std::isnan(size)) return size;
            most = std::max(most, size);
        }
    return most;
}

int8_t round_to_level(float value, float scale) {
    // All of a channel whose weights are zeros or no numbers.
    if (!(scale > 0 && std::isfinite(scale))) return 0;
    return static_cast<int8_t>(std::max(-kLevels, std::min(kLevels, std::nearbyint(value / scale))));
}

// As pack_pairs, a row for each four channels; adds each channel's levels to sums.
void pack_fours(const ConvStep& step, const Tap& tap, const float* weights, const float* scales, int32_t out,
                int32_t in, int8_t* rows, int32_t* sums) {
    for (int32_t c = in; c < in + kBytesBlock; c += 4)
        for (int32_t o = out; o < out + kHalfPanel; ++o)
            for (int32_t i = c; i < c + 4; ++i, ++rows) {
                const bool is_there = o < step.out_channels && i < tap.channels;
                *rows = is_there ? round_to_level(sum_places(tap.weights, weights, o, i), scales[o]) : int8_t{0};
                sums[o] += *rows;
            }
}

// Sources hold bytes q for (q - zero) * scale, so that a sum of weight levels w stands for
// (sum(q w) - zero sum(w)) * scale * the channel's own scale.
void pack_conv_of_bytes(const Layout& layout, const ConvStep& step, const float* weights, float* packed) {
    const PlacedMap& source = layout.maps[static_cast<size_t>(step.taps.front().map)];
    const int32_t padded = round_up(step.out_channels, layout.kernels->panel);
    std::vector<float> scales(static_cast<size_t>(padded));
    std::vector<int32_t> sums(static_cast<size_t>(padded));
    for (int32_t o = 0; o < step.out_channels; ++o) {
        scales[static_cast<size_t>(o)] = find_largest(step, weights, o) / kLevels;
        packed[step.factors + o] = scales[static_cast<size_t>(o)] * source.scale;
    }
    auto* panel = reinterpret_cast<int8_t*>(packed + step.weights);
    for (int32_t first = 0; first < padded; first += layout.kernels->panel)
        for (const Tap& tap : step.taps)
            for (int32_t c = 0; c < tap.channels; c += kBytesBlock)
                for (int32_t o = first; o < first + layout.kernels->panel;
                     o += kHalfPanel, panel += kHalfPanel * kBytesBlock) {
                    pack_fours(step, tap, weights, scales.data(), o, c, panel, sums.data());
                }
    for (int32_t& sum : sums) sum *= -source.zero;
    std::memcpy(packed + step.offsets, sums.data(), static_cast<size_t>(step.out_channels) * sizeof(int32_t));
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

void pack_weights(const Layout& layout, const float* weights, float* packed) {
    std::fill(packed, packed + layout.packed, 0.0f);
    for (const Step& step : layout.steps) {
        const auto* conv = std::get_if<ConvStep>(&step);
        if (conv == nullptr) continue;
        if (conv->factors == -1) {
            pack_conv(*conv, *layout.kernels, weights, packed);
        } else {
            pack_conv_of_bytes(layout, *conv, weights, packed);
        }
    }
    for (const PackedVector& vector : layout.vectors) {
        for (int32_t i = 0; vector.place != -1 && i < vector.count; ++i) {
            packed[vector.packed + i] += weights[vector.place + i];
        }
    }
}

}  // namespace unetrt
