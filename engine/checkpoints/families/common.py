"""What several translators share: the choice of weights, folded projections and norms, schedules from rounded betas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from engine.checkpoints.types import Assumptions
from engine.diffusion.schedule import NoiseSchedule, cosine_schedule, sigmoid_schedule
from engine.errors import CheckpointError


def choose_weights(assume: Assumptions, has_ema: bool, has_raw: bool) -> bool:
    """Whether to take the averaged weights: they are, unless the user says raw or the file has none.

    Raises CheckpointError if the file lacks what the user asked for.
    """
    asked = assume.given("weights")
    if (asked == "ema" and not has_ema) or (asked == "raw" and not has_raw):
        kind, other = ("averaged", "raw") if asked == "ema" else ("raw", "ema")
        raise CheckpointError(f"the file has no {kind} weights; give --weights {other} or leave it out")
    if asked is None and not has_ema:
        assume.take("weights", "raw", "the file has no averaged weights")
        return False
    return asked != "raw"


def check_groups(groups: int, widths: Sequence[int]) -> int:
    """groups, if every group norm's channels can be split into so many; raises CheckpointError."""
    for width in widths:
        if width % groups:
            raise CheckpointError(
                f"a group norm of {width} channels cannot have {groups} groups; give the training's number with "
                "--num-groups"
            )
    return groups


def fold_attention_scale(qkv: Tensor, heads: int) -> Tensor:
    """Rows of a fused projection, ordered q, k, v, each heads x head_dim, with head_dim^-0.5 folded into q.

    qkv: weight [3 inner, ...] or bias [3 inner].
    """
    inner = qkv.shape[0] // 3
    return torch.cat([qkv[:inner] * (inner // heads) ** -0.5, qkv[inner:]])


def fold_batch_norm(weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(scale, shift), each [C], of a batch norm in evaluation; Ioffe & Szegedy (2015), algorithm 2, line 11."""
    scale = weight.double() / torch.sqrt(variance.double() + eps)
    return scale.float(), (bias.double() - mean.double() * scale).float()


def schedule_from_betas(betas: Tensor) -> NoiseSchedule:
    """The float64 schedule that a file's betas [T] were rounded from.

    A linear, cosine or sigmoid schedule is recognised where its float64 formula agrees with every beta to the rounding
    of their dtype; other betas are taken as they are.
    """
    stored = betas.detach().cpu().double().numpy()
    if betas.dtype != torch.float64 and len(stored):
        near = torch.finfo(betas.dtype).eps * np.abs(stored) + torch.finfo(betas.dtype).tiny
        for candidate in _standard_betas(betas):
            if np.all(np.abs(candidate - stored) <= near):
                return NoiseSchedule(candidate)
    return NoiseSchedule(stored)


def _standard_betas(betas: Tensor) -> Iterator[np.ndarray]:
    """Linear schedules between the round numbers that betas' ends may stand for, then cosine and sigmoid."""
    steps = len(betas)
    for scale in (1000.0 / steps, 1.0):
        start, end = (_shortest_decimal(value, scale) for value in (betas[0], betas[-1]))
        yield np.linspace(start * scale, end * scale, steps, dtype=np.float64)
    yield cosine_schedule(steps).betas
    yield sigmoid_schedule(steps).betas


def _shortest_decimal(value: Tensor, scale: float) -> float:
    """The shortest decimal number whose product with scale rounds to `value` in its dtype."""
    exact = float(value.double()) / scale
    for digits in range(1, 17):
        decimal = float(f"{exact:.{digits}g}")
        if torch.tensor(decimal * scale, dtype=value.dtype) == value.cpu():
            return decimal
    return exact
