"""Where images begin: between two noises, or part of the way up from an image."""

from __future__ import annotations

import math

from torch import Tensor


def great_circle(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """The point at share `weight` of the angle from one noise to another, same shape; DDIM (2021), eq. 67."""
    a, b = first.double(), second.double()
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return first
    at_first, at_second = (math.sin(share * angle) / math.sin(angle) for share in (1 - weight, weight))
    return (at_first * a + at_second * b).to(first.dtype)


def noised(images: Tensor, abar: float, noise: Tensor) -> Tensor:
    """images at the level alphas_cumprod = abar: sqrt(abar) x0 + sqrt(1 - abar) z; DDPM (2020), eq. 4."""
    return math.sqrt(abar) * images + math.sqrt(1 - abar) * noise
