// A program as steps for one instruction set: every convolution a sum over taps of stride 1, every map at its place in
// an arena, every weight at its place in the packed array. Sizes are for one image; a batch multiplies them.
#pragma once

#include <cstdint>
#include <variant>
#include <vector>

#include "kernels.h"
#include "program.h"

namespace unetrt {

struct PlacedMap {
    int32_t channels, height, width, border;
    // As in MapShape, and the channels of a line.
    float scale;
    int32_t zero, block;
    // First line in the arena, and lines, of one image.
    int64_t offset, size;
    // The steps that write it and that read it last.
    int32_t first, last;
    // First float of one image's statistics; -1: nobody needs them.
    int64_t statistics;
};

// Weights of one tap: w[o][c] = the sum over `count` places of weights[place + o * out_stride + c * in_stride].
// Several places: pixels of the kernel that meet the same pixel of a map that is repeated.
struct TapWeights {
    int64_t place[4];
    int32_t count;
    int64_t out_stride, in_stride;
};

// Output pixel (y, x) reads `channels` channels of pixel (y + dy, x + dx) of a map, from block `block` on.
struct Tap {
    int32_t map, block, channels, dy, dx;
    TapWeights weights;
};

// Floats of the packed array that are not convolution weights: `count` of the source from `place` on, or where place is
// -1 zeros, padded with zeros to `padded`. Vectors with the same `packed` are added up.
struct PackedVector {
    int64_t packed;
    int64_t place;
    int32_t count, padded;
};

struct ConvStep {
    std::vector<Tap> taps;
    int32_t dst, height, width, step, y0, x0;
    int32_t add;
    float scale;
    int32_t out_channels;
    bool clears_border, measures;
    // In the packed array and in the padded rows; row -1: none.
    int64_t weights, bias, row;
    int64_t panel_floats;
    // Of a source of bytes: what ConvArgs needs of it, in the packed array; -1: it has none.
    int64_t offsets, factors;
};

struct NormStep {
    int32_t src[2], dst, add;
    float scale, eps;
    int32_t kind, groups, activation;
    // -1: none.
    int64_t weight, bias, row;
};

// Statistics of a map that no convolution measures as it writes it.
struct MeasureStep {
    int32_t map;
};

struct AttentionStep {
    bool is_linear;
    int32_t src, dst, heads, dim, memory;
    float scale, value_scale;
    int64_t learned;
};

struct NormGradientStep {
    NormStep norm;
    int32_t gradient;
};

struct AttentionGradientStep {
    int32_t src, gradient, dst, heads, dim;
};

struct TokensStep {
    int32_t pixels, tokens;
    int64_t learned;
    bool is_gradient;
};

struct ClassifyStep {
    int32_t src, dst, classes;
    int64_t weight, bias, row;
};

struct ResampleStep {
    int32_t src, dst, add, kind, pad;
    float scale;
};

struct CopyStep {
    int32_t src[2], dst, add;
    float scale;
    bool splits;
};

struct PlanarStep {
    int32_t map;
    bool is_input;
};

using Step = std::variant<ConvStep, MeasureStep, NormStep, AttentionStep, NormGradientStep, AttentionGradientStep,
                          TokensStep, ClassifyStep, ResampleStep, CopyStep, PlanarStep>;

// Columns of the caller's rows, copied to a padded place.
struct RowCopy {
    int32_t column, count;
    int64_t padded;
};

struct Layout {
    const Kernels* kernels;
    int32_t in_channels, out_channels, row_width;
    // Of one image's output.
    int64_t output_floats;
    int64_t weights;
    std::vector<PlacedMap> maps;
    std::vector<Step> steps;
    // Of the program, for each step.
    std::vector<int32_t> operators;
    int32_t operator_count;
    std::vector<PackedVector> vectors;
    std::vector<RowCopy> rows;
    // Floats of the packed array, of one image's padded rows and of its maps' statistics; lines of its maps.
    int64_t packed, padded_rows, statistics, arena;
};

Layout make_layout(const Program& program, const Kernels& kernels);

inline int32_t round_up(int32_t value, int32_t unit) { return (value + unit - 1) / unit * unit; }

// Places of all maps in an arena, maps that are never needed together sharing one; sets offsets, returns its size.
int64_t place_maps(std::vector<PlacedMap>& maps);

}  // namespace unetrt
