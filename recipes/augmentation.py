"""Small random changes of digits, so that a training never sees the same image twice."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def augment(images: Tensor, generator: torch.Generator, degrees: float, scale: float, shift: float) -> Tensor:
    """Random small rotation, scale, shear and shift of each image [B, 1, 32, 32]; black outside.

    degrees: largest rotation and shear; scale: largest relative change of size; shift: in pixels.
    """
    n = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * limit

    angle, shear, size = uniform(degrees * np.pi / 180), uniform(degrees * np.pi / 180), 1 + uniform(scale)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = size * angle.cos(), -size * (angle + shear).sin()
    theta[:, 1, 0], theta[:, 1, 1] = size * angle.sin(), size * (angle + shear).cos()
    theta[:, :, 2] = torch.stack([uniform(shift * 2 / 32), uniform(shift * 2 / 32)], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # Bicubic keeps the strokes crisp; its overshoot is clamped back into the data range.
    moved = F.grid_sample(images + 1, grid, mode="bicubic", align_corners=False) - 1
    return moved.clamp(-1, 1)
