"""Guidance: what pulls a sample towards a label beyond the network's own conditioning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.config import ClassifierConfig


class Guide(Protocol):
    """A noise-conditioned classifier's input gradient."""

    @property
    def config(self) -> ClassifierConfig:
        """The classifier's description."""
        ...

    def __call__(self, x_t: Tensor, timestep: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x_t [B, C, H, W], timestep [B] fp32, y [B] int64, scale [B] fp32 -> grad [B, C, H, W], log_p [B].

        grad = scale * d log p(y | x_t, t) / d x_t.
        """
        ...


@dataclass(frozen=True, slots=True)
class ClassifierGuidance:
    """Classifier guidance (Dhariwal & Nichol, 2021): algorithm 1 with a DDPM table, algorithm 2 with a DDIM table.

    scale: gradient scale s; 0 switches guidance off.
    """

    guide: Guide
    scale: float = 1.0
