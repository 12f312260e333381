"""What several test files share: tolerances with their reasons, and small random checkpoints."""

from __future__ import annotations

# One fp32 forward call of a U-Net whose output is of order 1 to 4 differs by up to this between convolution kernels,
# thread counts and processors (measured on the golden cases: 0.3e-6 to 1.2e-6, with AVX2 kernels up to 3e-6).
FP32_FORWARD_ROUNDING = 3e-6

# The same float64 schedule with its sums and products in another order: an ulp a factor over up to 4000 of them.
FLOAT64_PRODUCT = 1e-11
