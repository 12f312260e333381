// What the engine asks of an instruction set: plain functions over plain structs.
//
// kernels_*.cpp are compiled once for each instruction set, with other flags. They include this file and vec.h only, and
// no template or inline function of the standard library: the linker keeps one copy of each such function, which could
// be the one for a newer processor.
#pragma once

#include <cstdint>

namespace unetrt {

// Of a pixel's channels, 16 float, 32 bfloat16 or 64 bytes, a block, lie together in a line.
constexpr int kLineBytes = 64;
constexpr int kLineFloats = kLineBytes / 4;

// [blocks][height + 2 border][width + 2 border][images] lines; the border holds zeros, as do channels of the last block
// that the map lacks, unless they are bytes. Kernels may read kSlackLines behind a map, and then leave aside what they
// computed of it.
struct Map {
    void* data;
    int channels, height, width, border, images, block;

    int blocks() const { return (channels + block - 1) / block; }
    // In lines.
    int64_t row() const { return static_cast<int64_t>(width + 2 * border) * images; }
    int64_t plane() const { return (height + 2 * border) * row(); }
    // Image 0 of pixel (y, x), which may lie in the border; the other images follow, a line apart.
    void* at(int b, int y, int x) const {
        const int64_t line = b * plane() + (y + border) * row() + static_cast<int64_t>(x + border) * images;
        return static_cast<char*>(data) + line * kLineBytes;
    }
};

constexpr int kSlackLines = 32;
constexpr int32_t kBytesBlock = kLineBytes;

// An operand made of one map, or of two whose channels follow one another; count 0: none.
struct Maps {
    Map part[2];
    int count;
};

enum class Activation : int32_t { kIdentity, kSilu, kRelu, kMish, kGelu };

// A run of input channels that one tap of a convolution multiplies. Output pixel (y, x) of image n reads the line
// block * plane + y * row + x * images + n from base on; of the last block only the first `last` channels are used.
struct Segment {
    const void* base;
    int64_t plane, row;
    int32_t blocks, last;
};

// One convolution of stride 1 as a sum over segments. Its output (y, x) is pixel (y * step + y0, x * step + x0) of dst.
struct ConvArgs {
    const Segment* segments;
    int32_t segment_count;
    // Panels of 32 (AVX2: 16) output channels: [input channel of each segment][panel width] floats, or
    // [block of each segment][half of the panel][16 pairs of channels][16][2] bfloat16, or for bytes
    // [block of each segment][half of the panel][16 fours of channels][16][4] int8.
    const float* weights;
    int64_t panel_floats;
    // Of sources of bytes, [padded channels of dst] each: what is added to the integer sums, and what these stand for.
    const int32_t* offsets;
    const float* factors;
    // [padded channels of dst] floats; rows: [images][row_stride] at the operator's first channel, or null.
    const float* bias;
    const float* rows;
    int64_t row_stride;
    Map dst;
    // Of the outputs of this convolution; smaller than dst where step is 2.
    int32_t height, width, step, y0, x0;
    // Data null: none.
    Map add;
    float scale;
    // The work is cut into pieces of `piece_rows` output rows times panels.
    int32_t piece_rows, panels;
    // Whether this one writes dst's border, which the four convolutions of an upsampling share.
    bool clears_border;
    // Of dst's rows, where it measures them; else null.
    float* statistics;
};

// Mean and sum of squared deviations of each row of a map, [blocks][height][images][2][block] floats.
struct MeasureArgs {
    Map src;
    float* statistics;
};

struct NormArgs {
    Maps src;
    Map dst;
    Map add;
    float scale, eps;
    // Where dst holds bytes: steps a unit, and the byte of 0; else 0.
    float steps;
    int32_t zero;
    int32_t kind, groups;
    Activation activation;
    // Of two sources the first has whole blocks of channels.
    // [padded channels] floats each; bias may be null.
    const float* weight;
    const float* bias;
    // [images][row_stride]: padded factors, then padded shifts; or null.
    const float* rows;
    int64_t row_stride;
    // Of the rows of each source, for group norm.
    const float* statistics[2];
    // norm_workspace() floats. Layer and RMS norm: mean and factor of pixels, [height][images][width][2].
    float* workspace;
};

struct AttentionArgs {
    Map qkv, dst;
    int32_t heads, dim, memory;
    // [2][heads][memory][dim], null where memory is 0.
    const float* learned;
    // Attention: 0 or the factor on normalised scores. Linear attention: factor on the queries.
    float scale;
    // Linear attention: factor on the pixels' values.
    float value_scale;
    // Shared between the phases of a call, attention_workspace() floats.
    float* workspace;
};

// src and gradient as in UNETRT_NORM_GRADIENT; norm: the fields of NormArgs, dst and add those of the gradient.
struct NormGradientArgs {
    NormArgs norm;
    Map gradient;
};

// src: queries, keys and values; gradient: of the result.
struct AttentionGradientArgs {
    Map src, gradient, dst;
    int32_t heads, dim;
};

// pixels: a map; tokens: one row of its mean and its pixels. learned: [channels][tokens] to add, or null.
struct TokensArgs {
    Map pixels, tokens;
    const float* learned;
};

// weight [classes][channels of src], bias [classes], rows [images][row_stride]: label, factor. log_p: [images].
struct ClassifyArgs {
    Map src, dst;
    int32_t classes;
    const float* weight;
    const float* bias;
    const float* rows;
    int64_t row_stride;
    float* log_p;
};

struct ResampleArgs {
    Map src, dst;
    Map add;
    float scale;
    int32_t kind, pad;
};

// dst = (cat(src) + add) * scale; split: dst's blocks are the four phases of src[0] (row parity, then column parity).
struct CopyArgs {
    Maps src;
    Map dst;
    Map add;
    float scale;
};

// [images][channels][height][width] floats on one side, a map on the other.
struct PlanarArgs {
    float* planar;
    Map map;
};

// Every function does item `item` of as many as its *_items function says; items may run in any order and on any thread,
// and give the same values whatever the number of images. Where an operator has phases, all items of one are done before
// the next begins. scratch: of the thread, scratch_floats() long.
struct Kernels {
    const char* name;
    // Output channels of a convolution that are computed together, and channels of a line.
    int32_t panel, block;
    // Whether maps and the weights of convolutions are bfloat16, whose products are summed in pairs of channels; a panel
    // then is a block, and maps may hold bytes.
    bool takes_pairs;

    int (*conv_items)(const ConvArgs&);
    void (*conv)(const ConvArgs&, int item);

    int (*measure_items)(const MeasureArgs&);
    void (*measure)(const MeasureArgs&, int item);

    int64_t (*norm_workspace)(const NormArgs&);
    int (*norm_items)(const NormArgs&);
    void (*norm)(const NormArgs&, int item);

    int64_t (*attention_workspace)(const AttentionArgs&);
    int64_t (*attention_scratch)(const AttentionArgs&);
    int (*attention_items)(const AttentionArgs&, int phase);
    void (*attention)(const AttentionArgs&, int phase, int item, float* scratch);

    int64_t (*linear_workspace)(const AttentionArgs&);
    int64_t (*linear_scratch)(const AttentionArgs&);
    int (*linear_items)(const AttentionArgs&, int phase);
    void (*linear)(const AttentionArgs&, int phase, int item, float* scratch);

    int64_t (*norm_gradient_workspace)(const NormGradientArgs&);
    int (*norm_gradient_items)(const NormGradientArgs&);
    void (*norm_gradient)(const NormGradientArgs&, int phase, int item);

    int64_t (*attention_gradient_scratch)(const AttentionGradientArgs&);
    int (*attention_gradient_items)(const AttentionGradientArgs&);
    void (*attention_gradient)(const AttentionGradientArgs&, int item, float* scratch);

    int (*tokens_items)(const TokensArgs&);
    void (*to_tokens)(const TokensArgs&, int item);
    int (*pixels_items)(const TokensArgs&);
    void (*to_pixels)(const TokensArgs&, int item);

    int64_t (*classify_scratch)(const ClassifyArgs&);
    int (*classify_items)(const ClassifyArgs&);
    void (*classify)(const ClassifyArgs&, int item, float* scratch);

    int (*resample_items)(const ResampleArgs&);
    void (*resample)(const ResampleArgs&, int item);

    int (*copy_items)(const CopyArgs&);
    void (*copy)(const CopyArgs&, int item);
    int (*split_items)(const CopyArgs&);
    void (*split)(const CopyArgs&, int item);

    int (*planar_items)(const PlanarArgs&);
    void (*from_planar)(const PlanarArgs&, int item);
    void (*to_planar)(const PlanarArgs&, int item);
};

constexpr int kAttentionPhases = 2, kNormGradientPhases = 2;

const Kernels& portable_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& avx512_bf16_kernels();
const Kernels& amx_bf16_kernels();

}  // namespace unetrt
