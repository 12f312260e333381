"""Guidance: what pulls a sample towards a label beyond the network's own conditioning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import RequestError
from engine.networks.config import ClassifierConfig, LabelInput, UNetConfig

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


def guided_out(with_label: Tensor, without_label: Tensor, cfg: ClassifierFreeGuidance, channels: int) -> Tensor:
    """The guided result of one image, [C', H, W] float32, of its labelled and its unlabelled one.

    channels: C; channels from C on, of a learned variance, are the labelled ones.
    """
    labelled = with_label[:channels]
    update = labelled - without_label[:channels]
    if cfg.parallel != 1:
        # In float64: what is kept is a small difference of two large vectors.
        unit = F.normalize(labelled.flatten().double(), dim=0)
        along = torch.dot(update.flatten().double(), unit) * unit
        update = update - (1 - cfg.parallel) * along.reshape(update.shape).to(update.dtype)
    out = labelled + (cfg.scale - 1) * update
    if cfg.rescale:
        out = out * (cfg.rescale * labelled.std() / out.std() + 1 - cfg.rescale)
    return torch.cat([out, with_label[channels:]])


def guided_outs(
    with_label: Tensor,
    without_label: Tensor,
    is_active: Tensor,
    scale: Tensor,
    rescale_and_parallel: tuple[Tensor, Tensor] | None,
    channels: int,
) -> Tensor:
    """guided_out of a batch, [B, C', H, W] float32, each image with numbers of its own, without waiting for a device.

    is_active: [B] bool; where it is False an image keeps its labelled result. scale, rescale, parallel: [B] float32;
    None for rescale 0 and parallel 1 in all of them.
    """
    labelled = with_label[:, :channels]
    update = labelled - without_label[:, :channels]
    if rescale_and_parallel is not None:
        unit = F.normalize(labelled.flatten(1).double(), dim=1)
        along = (update.flatten(1).double() * unit).sum(dim=1, keepdim=True) * unit
        update = update - (1 - _per_image(rescale_and_parallel[1])) * along.reshape(update.shape).to(update.dtype)
    out = labelled + (_per_image(scale) - 1) * update
    if rescale_and_parallel is not None:
        rescale = _per_image(rescale_and_parallel[0])
        ratio = _per_image(labelled.flatten(1).std(dim=1) / out.flatten(1).std(dim=1))
        out = torch.where(rescale != 0, out * (rescale * ratio + 1 - rescale), out)
    return torch.cat([torch.where(_per_image(is_active), out, labelled), with_label[:, channels:]], dim=1)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def require_null_class(config: UNetConfig) -> int:
    """The label that means none; raises RequestError for a network that has none."""
    if config.null_class is None or config.label is not LabelInput.TABLE:
        raise RequestError(
            "classifier-free guidance needs a label that means none, and this checkpoint names none; leave "
            "guidance_scale out, or export the checkpoint with --null-class"
        )
    return config.null_class


def is_within(time: float, interval: Interval) -> bool:
    """Whether a timestep lies in an interval, its ends included."""
    # A timestep that was scaled for the network and back may be off by an ulp.
    return interval[0] - 1e-6 <= time <= interval[1] + 1e-6


def _check_interval(interval: Interval) -> None:
    if not interval[0] <= interval[1]:
        raise RequestError(
            f"guidance is limited to {interval[0]} to {interval[1]}; expected the smaller timestep first"
        )
