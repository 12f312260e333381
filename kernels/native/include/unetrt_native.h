/* The C interface of the CPU engine: a network as a list of operators in, images out.
 *
 * A program is an array of int32 words:
 *
 *     header   magic, format, maps, operators, input channels, output channels, row width, weights
 *     maps     {channels, height, width, scale, zero} each, scale the bits of a float
 *     operators  24 words each, in the order of unetrt_operator's fields, executed one after the other
 *
 * A map is an image [channels, height, width] for each image of the batch; an operator writes one map and reads others
 * that were written before. -1 stands for "none" in every field that names a map, a weight or a column of rows.
 * A map with a scale of 0 (and zero 0) holds numbers in the precision of the instruction set; one with another holds
 * bytes q, round(x / scale) + zero within 0 to 255, that stand for (q - zero) * scale. A norm writes it, a convolution of
 * mode plain and stride 1 reads it, with weights in 8 bits too (round(w / s) for s = largest |w| / 127 of an output
 * channel) and sums of integers, of at most 66000 products; it needs an instruction set for bf16.
 * Weights are one array of floats; a field that names one holds the index of its first float.
 * Rows are [batch][row width] floats given with each call: the time projections of each image.
 *
 * Functions that can fail return NULL or a status other than 0, and unetrt_last_error() says what, got and expected.
 */
#ifndef UNETRT_NATIVE_H
#define UNETRT_NATIVE_H

#include <stdint.h>

#if defined(__GNUC__)
#define UNETRT_API __attribute__((visibility("default")))
#else
#define UNETRT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define UNETRT_MAGIC 0x54524e55 /* "UNRT" */
#define UNETRT_FORMAT 2         /* of programs and of packed weights */

enum unetrt_code {
    /* dst = the network's input, [input channels, height, width]. */
    UNETRT_INPUT = 0,
    /* The network's output = src[0]. */
    UNETRT_OUTPUT = 1,
    /* dst = (conv(cat(src)) + bias + rows[row : row + out channels] + conv1x1(cat(extra)) + extra_bias + add) * scale.
     * kernel: 1 to 7 pixels square. pad: zeros above and left; below and right as many as dst's size needs.
     * mode plain: stride 1 or 2, weight [out][in][kernel][kernel].
     * mode upsampled: of src repeated 2 x 2 (nearest); kernel 3, stride 1, pad 1.
     * mode transposed: kernel 4, stride 2, pad 1, weight [in][out][4][4].
     * extra: at dst's size; extra_weight [out][extra channels]; only with mode plain and stride 1. */
    UNETRT_CONV = 2,
    /* dst = (activation(norm(cat(src)) * (1 + rows[row : row + C]) + rows[row + C : row + 2 C]) + add) * scale, without
     * the factor and the shift where row is -1. kind: of normalisation; weight [C] (kind none: -1); bias [C] or -1. */
    UNETRT_NORM = 3,
    /* dst [heads * dim] = softmax(q k^T) v of src[0] [3 * heads * dim] = q, k, v, each [heads][dim]; 1 / sqrt(dim) is
     * part of q. memory: learned tokens before the pixels', weight [2][heads][memory][dim] (keys, values).
     * scale: 0, or q and k (memory included in k) are divided by their length over all tokens, channel by channel (at
     * least 1e-12), and the scores are multiplied by scale. */
    UNETRT_ATTENTION = 4,
    /* dst [heads * dim] = scale * softmax_dim(q) (softmax_tokens(k)^T v), tokens with memory as above; pixels' values are
     * multiplied by eps before. */
    UNETRT_LINEAR_ATTENTION = 5,
    /* dst = (resampled src[0] + add) * scale; how: kind. */
    UNETRT_RESAMPLE = 6,
    /* dst = (src[0] + src[1]) * scale. */
    UNETRT_ADD = 7,
    /* dst = cat(src). */
    UNETRT_CONCAT = 8,
    /* dst [C, 1, pixels + 1] = the mean of src[0]'s pixels, then its pixels row by row; + weight [C][pixels + 1] or -1. */
    UNETRT_TOKENS = 9,
    /* Its gradient: each pixel of dst = src[0]'s [C, 1, pixels + 1] token of it + the first token / pixels. */
    UNETRT_PIXELS = 10,
    /* logits = weight [groups][C] src[0]'s first pixel + bias [groups]; rows[row] is a label, rows[row + 1] a factor.
     * dst's first pixel = factor * weight^T (onehot(label) - softmax(logits)), the gradient of factor * log p(label); its
     * others are 0. log p(label) is the second output. At most once in a program. */
    UNETRT_CLASSIFY = 11,
    /* dst = (the gradient of NORM's src[0] + add) * scale, src[1] being that of its result; the other fields as there.
     * kind group; activation identity, silu or relu. */
    UNETRT_NORM_GRADIENT = 12,
    /* dst [3 * heads * dim] = the gradient of ATTENTION's src[0], src[1] [heads * dim] being that of its result; memory
     * and scale 0. */
    UNETRT_ATTENTION_GRADIENT = 13
};

enum unetrt_mode { UNETRT_PLAIN = 0, UNETRT_UPSAMPLED = 1, UNETRT_TRANSPOSED = 2 };

/* group: over each group's channels and all pixels. rms: x / max(|x|, 1e-12) * sqrt(C) * weight at each pixel, |x| over
 * channels. layer: (x - mean) / sqrt(var + eps) * weight at each pixel. affine: x * weight + bias. */
enum unetrt_norm { UNETRT_GROUP = 0, UNETRT_RMS = 1, UNETRT_LAYER = 2, UNETRT_AFFINE = 3, UNETRT_NO_NORM = 4 };

/* gelu: the exact one, x * (1 + erf(x / sqrt(2))) / 2. mish: x * tanh(log(1 + exp(x))). */
enum unetrt_activation { UNETRT_IDENTITY = 0, UNETRT_SILU = 1, UNETRT_RELU = 2, UNETRT_MISH = 3, UNETRT_GELU = 4 };

/* nearest: each pixel 2 x 2 times. average: of 2 x 2 pixels, odd rows and columns left out. fir: (1, 3, 3, 1) each way,
 * kernels/reference.py. space to depth: channel c * 4 + 2 * row + column of each 2 x 2 patch. pad: `pad` zeros on every
 * side, or a crop where it is negative. */
enum unetrt_resample {
    UNETRT_NEAREST_UP = 0,
    UNETRT_AVERAGE_DOWN = 1,
    UNETRT_FIR_UP = 2,
    UNETRT_FIR_DOWN = 3,
    UNETRT_SPACE_TO_DEPTH = 4,
    UNETRT_PAD = 5
};

typedef struct unetrt_operator {
    int32_t code;
    int32_t dst;
    int32_t src[2];
    int32_t add;
    int32_t weight, bias;
    int32_t row;
    int32_t kernel, stride, pad, mode;
    int32_t extra[2];
    int32_t extra_weight, extra_bias;
    int32_t kind, groups, activation;
    int32_t heads, dim, memory;
    float scale, eps;
} unetrt_operator;

/* What maps and the weights of convolutions are kept in; sums, norms and attention are float32 in all. int8: bf16, and
 * bytes where the program has them. */
enum unetrt_precision { UNETRT_FP32 = 0, UNETRT_BF16 = 1, UNETRT_INT8 = 2 };

/* Instruction sets, those for fp32 and then those for bf16, each the slowest first; a network is packed for one. */
enum unetrt_isa {
    UNETRT_ISA_PORTABLE = 0,
    UNETRT_ISA_AVX2 = 1,
    UNETRT_ISA_AVX512 = 2,
    UNETRT_ISA_AVX512_BF16 = 3,
    UNETRT_ISA_AMX_BF16 = 4
};

typedef struct unetrt_network unetrt_network;
typedef struct unetrt_engine unetrt_engine;

/* What went wrong in the last call of this thread that failed. */
UNETRT_API const char* unetrt_last_error(void);

/* The fastest instruction set of this library and CPU for a precision; -1: it has none. */
UNETRT_API int unetrt_best_isa(int precision);

/* A checked program, for an instruction set that this CPU has. */
UNETRT_API unetrt_network* unetrt_network_create(const int32_t* words, uint64_t count, int isa);
UNETRT_API void unetrt_network_destroy(unetrt_network*);

/* Size of the weights as this network's instruction set reads them, and the weights written so. */
UNETRT_API uint64_t unetrt_network_packed_bytes(const unetrt_network*);
UNETRT_API int unetrt_network_pack(const unetrt_network*, const float* weights, uint64_t count, void* packed,
                                   uint64_t bytes);

/* An engine with threads of its own, the caller's included. packed: 64-byte aligned, read only, and alive as long as the
 * engine; the network may be destroyed before. */
UNETRT_API unetrt_engine* unetrt_engine_create(const unetrt_network*, const void* packed, uint64_t bytes, int threads);
/* An engine on the threads of another one, for two whose calls follow one another: threads of their own would wait for
 * the cores on which the other's still look for work. Calls of the two run one after the other. */
UNETRT_API unetrt_engine* unetrt_engine_create_beside(const unetrt_network*, const void* packed, uint64_t bytes,
                                                      const unetrt_engine* other);
UNETRT_API void unetrt_engine_destroy(unetrt_engine*);

/* x [batch][input channels][height][width], rows [batch][row width] (NULL where that is 0), out [batch][output
 * channels][height][width], and behind it log p [batch] where the program classifies. Calls from several threads run one after the other. An image's output does not depend on
 * the rest of the batch, nor on the number of threads. */
UNETRT_API int unetrt_engine_run(unetrt_engine*, int batch, const float* x, const float* rows, float* out);

/* The same, and how long each operator of the program took, its threads' waiting for one another included. seconds:
 * [operators of the program]. */
UNETRT_API int unetrt_engine_profile(unetrt_engine*, int batch, const float* x, const float* rows, float* out,
                                     double* seconds, uint64_t operators);

#ifdef __cplusplus
}
#endif

#endif
