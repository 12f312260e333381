// Vectors of floats by the compiler's vector extensions: the same source for every instruction set. What maps hold is an
// Element: a float, or a bfloat16 that is a float in registers.
#pragma once

#include <cstdint>

#ifdef UNETRT_ELEMENT_BF16
#include <immintrin.h>
#endif

#ifndef UNETRT_ISA
#error "kernels are compiled with UNETRT_ISA (a namespace) and UNETRT_LANES (floats a register)"
#endif

#define UNETRT_INLINE static inline __attribute__((always_inline))

namespace unetrt::UNETRT_ISA {

constexpr int kLanes = UNETRT_LANES;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef float VecUnaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

UNETRT_INLINE Vec load(const float* p) { return *reinterpret_cast<const VecUnaligned*>(p); }
UNETRT_INLINE void store(float* p, Vec v) { *reinterpret_cast<VecUnaligned*>(p) = v; }
// x - 0 is x, also for -0, which the compiler knows.
#ifdef UNETRT_ELEMENT_BF16
struct Element {
    uint16_t bits;
};
UNETRT_INLINE Vec load(const Element* p) {
    typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
    return reinterpret_cast<Vec>(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Ints) << 16);
}
// Rounded to the nearest, ties to even.
UNETRT_INLINE void store(Element* p, Vec v) {
    const __m256bh rounded = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(rounded));
}
// Two channels in each lane, whose products are summed.
using Pairs = __m512bh;
UNETRT_INLINE Pairs load_pairs(const Element* p) { return reinterpret_cast<Pairs>(_mm512_loadu_si512(p)); }
UNETRT_INLINE Pairs splat_pair(const Element* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return reinterpret_cast<Pairs>(_mm512_set1_epi32(pair));
}
UNETRT_INLINE Vec add_products(Pairs a, Pairs b, Vec sum) {
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
}
// Four channels in each lane, of unsigned bytes and of signed ones, whose products are summed.
using Fours = __m512i;
UNETRT_INLINE Fours load_fours(const int8_t* p) { return _mm512_loadu_si512(p); }
UNETRT_INLINE Fours splat_four(const uint8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return _mm512_set1_epi32(four);
}
UNETRT_INLINE Ints add_products(Fours unsigned_bytes, Fours signed_bytes, Ints sum) {
    return reinterpret_cast<Ints>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), unsigned_bytes, signed_bytes));
}
UNETRT_INLINE float to_float(Element x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}
UNETRT_INLINE Element to_element(float x) {
    const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(x));
    return {static_cast<uint16_t>(_mm_extract_epi16(reinterpret_cast<__m128i>(rounded), 0))};
}
#else
using Element = float;
UNETRT_INLINE float to_float(Element x) { return x; }
UNETRT_INLINE Element to_element(float x) { return x; }
#endif
// Channels of a line.
constexpr int kBlock = 64 / sizeof(Element);
UNETRT_INLINE Vec splat(float x) { return x - Vec{}; }
UNETRT_INLINE Ints load(const int32_t* p) {
    typedef int32_t IntsUnaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
    return *reinterpret_cast<const IntsUnaligned*>(p);
}
UNETRT_INLINE Vec pick(Ints mask, Vec a, Vec b) { return mask ? a : b; }
UNETRT_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
UNETRT_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }

UNETRT_INLINE float sum(Vec v) {
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += v[i];
    return total;
}

UNETRT_INLINE float largest(Vec v) {
    float most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

// exp(x) = p * 2^n for an integer n; shifted = n + 1.5 * 2^23, whose low bits hold n.
struct Exponential {
    Vec p, shifted;
};

// For x in [-87.3365, 88.7228]: Cody-Waite reduction by ln 2 in two parts, then the minimax polynomial of degree 6 on
// [-ln(2)/2, ln(2)/2].
UNETRT_INLINE Exponential reduce_exp(Vec x) {
    const Vec magic = splat(12582912.0f);
    const Vec shifted = x * 1.44269504f + magic;
    const Vec n = shifted - magic;
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    Vec p = splat(1.3888889e-3f);
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    return {p * r * r + r + 1.0f, shifted};
}

// exp(x) within 2 ulp for x in [-87, 88], 0 below and inf above; NaN stays.
UNETRT_INLINE Vec exp(Vec x) {
    const auto [p, shifted] = reduce_exp(larger(smaller(x, splat(88.7228f)), splat(-87.3365f)));
    // 2^n as two factors, because n may be 128.
    const Ints k = reinterpret_cast<Ints>(shifted) - 0x4b400000;
    const Ints half = k >> 1;
    const Vec low = reinterpret_cast<Vec>((half + 127) << 23);
    const Vec high = reinterpret_cast<Vec>((k - half + 127) << 23);
    Vec y = p * low * high;
    y = pick(x < -87.3365f, Vec{}, y);
    y = pick(x > 88.7228f, splat(__builtin_inff()), y);
    return pick(x != x, x, y);
}

#ifdef UNETRT_ELEMENT_BF16
// Rounded to the nearest byte, ties to even; NaN becomes 0.
UNETRT_INLINE void store_bytes(uint8_t* p, Vec v, Ints zero) {
    // Held where an int32 has it; what is no number becomes the smallest integer.
    const Vec held = pick(v > 1024.0f, splat(1024.0f), v);
    const Ints whole = reinterpret_cast<Ints>(_mm512_maskz_cvtps_epi32(0xffff, reinterpret_cast<__m512>(held)));
    const Ints byte = (whole < -1024 ? -zero : whole) + zero;
    const Ints positive = byte < 0 ? Ints{} : byte;
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm512_maskz_cvtusepi32_epi8(0xffff, reinterpret_cast<__m512i>(positive)));
}

// exp(x) for x held in [-86, 86], within 3e-6 of itself; NaN stays. 2^r on [-1/2, 1/2] by a minimax polynomial of degree 4.
UNETRT_INLINE Vec approximate_exp(Vec x) {
    const Vec magic = splat(12582912.0f);
    const Vec held = pick(x > 86.0f, splat(86.0f), pick(x < -86.0f, splat(-86.0f), x)) * 1.44269504f;
    const Vec shifted = held + magic;
    const Vec r = held - (shifted - magic);
    Vec p = splat(9.5701e-3f);
    p = p * r + 5.591786e-2f;
    p = p * r + 2.4024745e-1f;
    p = p * r + 6.9312181e-1f;
    p = p * r + 9.9999926e-1f;
    return p * reinterpret_cast<Vec>((reinterpret_cast<Ints>(shifted) << 23) + 0x3f800000);
}

// 1 / x within 2^-14 of itself.
UNETRT_INLINE Vec approximate_inverse(Vec x) {
    return reinterpret_cast<Vec>(_mm512_maskz_rcp14_ps(0xffff, reinterpret_cast<__m512>(x)));
}
#endif

}  // namespace unetrt::UNETRT_ISA
