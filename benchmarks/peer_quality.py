"""Whether contenders make images of equal quality: the same ones by DDIM, as well read ones by DDPM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import Check
from engine.bundle.folder import Bundle
from engine.files import file_sha256
from recipes.evaluator import load_evaluator, read_digits
from recipes.guidance_table import psnr
from recipes.quality import EVALUATOR

ASSETS = EVALUATOR.parent
LEAST_PSNR_DB = {"fp32": 40.0}
LEAST_HALF_PSNR_DB = 25.0
"""Of images in half precision beside those of fp32 from the same x_T; two fp32 libraries agree to 60 dB and better."""
SIGNIFICANCE = 0.02
"""Small enough for an alarm to mean something, large enough for four images against four: 1 in 70."""
_Z = 2.5758
"""Of 99 %."""


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How many of count digits the evaluator reads as the class asked for."""

    right: int
    count: int

    @property
    def share(self) -> float:
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """In which the share lies with 99 % confidence; Wilson, Probable inference (1927)."""
        n, p, z2 = self.count, self.share, _Z**2
        centre, half = p + z2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
        return max(0.0, low), min(1.0, high)


def is_digits(bundle: Bundle) -> bool:
    """Whether a bundle was made of the shipped digits model, which the evaluator can read."""
    path = ASSETS / "digits.pt"
    return path.is_file() and file_sha256(path) == bundle.manifest.checkpoint_sha256


def accuracy(images: Tensor, classes: Sequence[int], evaluator: Path = EVALUATOR) -> Accuracy:
    """Of digits [N, 1, 32, 32] in [-1, 1] that were asked to be these classes."""
    logits, _ = read_digits(load_evaluator(evaluator), images)
    return Accuracy(int((logits.argmax(dim=1) == torch.tensor(classes)).sum()), len(images))


def chance_of_fewer(found: Accuracy, wanted: Accuracy) -> float:
    """The probability that chance alone gives found.right or fewer, were both equally good; Fisher's exact test."""
    right, total = found.right + wanted.right, found.count + wanted.count
    ways = sum(
        math.comb(found.count, k) * math.comb(wanted.count, right - k)
        for k in range(max(0, right - wanted.count), found.right + 1)
    )
    return ways / math.comb(total, right)


def same_images(name: str, precision: str, images: Tensor, wanted: Tensor) -> tuple[float, Check]:
    """The PSNR in dB of DDIM's images beside those of fp32 from the same x_T, and that it is high enough."""
    value = psnr(images, wanted) if bool(torch.isfinite(images).all()) else -math.inf
    limit = LEAST_PSNR_DB.get(precision, LEAST_HALF_PSNR_DB)
    return value, Check(
        f"{name}: the same images as ours in fp32, dB ({precision})",
        value >= limit,
        value,
        limit,
        "it does not do the same work, so its time says nothing; compare its schedule, clipping and weights",
    )


def as_well_read(name: str, found: Accuracy, ours: Accuracy) -> Check:
    """That the evaluator reads a contender's digits as well as ours, within the noise of so many."""
    chance = chance_of_fewer(found, ours)
    return Check(
        f"{name}: {found.right} of {found.count} digits read as asked for, ours {ours.right} of {ours.count}; chance",
        chance >= SIGNIFICANCE,
        chance,
        SIGNIFICANCE,
        "its images are worse than ours, so its time says nothing; compare its schedule, variance and weights",
    )
