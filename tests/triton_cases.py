"""How the Triton kernels are judged: against the reference in float32, beside torch in the kernel's precision."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""On a GPU the same tests run the compiled kernels."""

FLOORS = {torch.float32: 1e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative to the largest magnitude of the exact result, and added to twice torch's error: half a unit in the last
place of the 16-bit types, since torch may round an element well by luck; for float32 other orders of summation."""


def assert_as_good_as_torch(ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
    """ours is at most twice as far from exact as torch's result in the same precision, plus the type's floor."""
    assert ours.dtype is torchs.dtype
    assert ours.shape == exact.shape
    allowed = 2 * largest_error(torchs, exact) + FLOORS[ours.dtype] * float(exact.abs().max())
    assert largest_error(ours, exact) <= allowed


def largest_error(values: Tensor, exact: Tensor) -> float:
    error = float((values.double() - exact.double()).abs().max())
    assert error == error, "not a number"
    return error
