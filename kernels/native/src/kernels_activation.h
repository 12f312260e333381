// Pointwise non-linearities of vectors.
#pragma once

#include <cmath>

#include "kernels.h"
#include "vec.h"

namespace unetrt::UNETRT_ISA {

UNETRT_INLINE Vec gelu(Vec x) {
    Vec y;
    for (int i = 0; i < kLanes; ++i) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
    return y;
}

// x tanh(log(1 + e)) with e = exp(x) is x n / (n + 2), n = e (e + 2); from 20 on it is x in float.
UNETRT_INLINE Vec mish(Vec x) {
    const Vec e = exp(smaller(x, splat(20.0f)));
    const Vec n = e * (e + 2.0f);
    return x * n / (n + 2.0f);
}

UNETRT_INLINE Vec silu(Vec x) {
#ifdef UNETRT_ELEMENT_BF16
    // Within 2^-13 of itself: bfloat16 rounds it by 2^-9.
    return x * approximate_inverse(1.0f + approximate_exp(-x));
#else
    return x / (1.0f + exp(-x));
#endif
}

template <Activation kActivation>
UNETRT_INLINE Vec activate(Vec x) {
    if constexpr (kActivation == Activation::kSilu) return silu(x);
    if constexpr (kActivation == Activation::kRelu) return pick(x < 0.0f, Vec{}, x);
    if constexpr (kActivation == Activation::kMish) return mish(x);
    if constexpr (kActivation == Activation::kGelu) return gelu(x);
    return x;
}

// d activate(x) / d x, of those that a norm's gradient takes.
template <Activation kActivation>
UNETRT_INLINE Vec derive(Vec x) {
    if constexpr (kActivation == Activation::kSilu) {
#ifdef UNETRT_ELEMENT_BF16
        const Vec s = approximate_inverse(1.0f + approximate_exp(-x));
#else
        const Vec s = 1.0f / (1.0f + exp(-x));
#endif
        return s * (1.0f + x * (1.0f - s));
    }
    if constexpr (kActivation == Activation::kRelu) return pick(x > 0.0f, splat(1.0f), Vec{});
    return splat(1.0f);
}

}  // namespace unetrt::UNETRT_ISA
