"""Guidance: what pulls a sample towards a label beyond the network's own conditioning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.errors import RequestError
from engine.networks.config import ClassifierConfig

Interval = tuple[float, float]
"""First and last training timestep at which guidance acts, both included; log-SNR for continuous time."""

EVERYWHERE: Interval = (-math.inf, math.inf)


class Guide(Protocol):
    """A noise-conditioned classifier's input gradient."""

    @property
    def config(self) -> ClassifierConfig:
        """The classifier's description."""
        ...

    def __call__(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x_t [B, C, H, W], timestep [B] fp32, label [B] int64, scale [B] fp32 -> grad [B, C, H, W], log_p [B].

        grad = scale * d log p(label | x_t, t) / d x_t.
        """
        ...


@dataclass(frozen=True, slots=True)
class ClassifierGuidance:
    """Classifier guidance (Dhariwal & Nichol, 2021): algorithm 1 with a DDPM table, algorithm 2 with the others.

    guide: gives the classifier's gradient. scale: of that gradient, s in the paper; 0 switches guidance off. interval:
    training timesteps (log-SNR in continuous time) at which it acts, ends included; at others an image is not guided,
    and a batch of such images calls no classifier. Raises RequestError for an interval that ends before it begins.
    """

    guide: Guide
    scale: float = 1.0
    interval: Interval = EVERYWHERE

    def __post_init__(self) -> None:
        _check_interval(self.interval)


@dataclass(frozen=True, slots=True)
class ClassifierFreeGuidance:
    """Classifier-free guidance (Ho & Salimans, 2022), eq. 6, on the network's own prediction, be it eps, x0 or v.

        update = with_label - without_label, of which `parallel` of the component along with_label is kept
        out    = with_label + (scale - 1) update
        out    = out (rescale std(with_label) / std(out) + 1 - rescale)

    scale: 1 is the labelled network alone, without a second call; 0 the unlabelled one. rescale: Lin et al., Common
    diffusion noise schedules (2023), eq. 15 and 16. parallel: Sadat et al., Eliminating oversaturation (2024), eq. 8.
    interval: training timesteps (log-SNR in continuous time) at which it acts, ends included (Kynkaanniemi et al.,
    Applying guidance in a limited interval, 2024). plus_plus: a DDIM step goes to the x0 of the guided out along the
    eps of the unlabelled one (Chung et al., CFG++, 2024, algorithm 2). Sums run over one image. Raises RequestError
    for values out of range.
    """

    scale: float = 1.0
    rescale: float = 0.0
    parallel: float = 1.0
    interval: Interval = EVERYWHERE
    plus_plus: bool = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise RequestError(f"the classifier-free guidance scale is {self.scale}; expected a finite number")
        if not (0 <= self.rescale <= 1 and 0 <= self.parallel <= 1):
            raise RequestError(
                f"rescale is {self.rescale} and parallel {self.parallel} in classifier-free guidance; expected numbers "
                "from 0 to 1"
            )
        _check_interval(self.interval)

    @property
    def is_active(self) -> bool:
        """Whether it changes anything, and so needs the unlabelled result too."""
        return self.scale != 1 or self.plus_plus

    @property
    def goes_beyond_scale(self) -> bool:
        """Whether it does more than move the result along with_label - without_label."""
        return self.rescale != 0 or self.parallel != 1 or self.plus_plus


def is_within(time: float, interval: Interval) -> bool:
    """Whether a timestep lies in an interval, its ends included."""
    # A timestep that was scaled for the network and back may be off by an ulp.
    return interval[0] - 1e-6 <= time <= interval[1] + 1e-6


def _check_interval(interval: Interval) -> None:
    if not interval[0] <= interval[1]:
        raise RequestError(
            f"guidance is limited to {interval[0]} to {interval[1]}; expected the smaller timestep first"
        )
