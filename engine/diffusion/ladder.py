"""The ladder of a sampler: which of training's timesteps it visits, and slices of continuous time in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from engine.diffusion.continuous import time_slices
from engine.diffusion.prediction import Diffusion, Spacing
from engine.diffusion.schedule import NoiseSchedule, space_timesteps
from engine.errors import RequestError

Steps = int | str | Sequence[int]
"""A number of steps in the checkpoint's own spacing, a respacing string, or the timesteps themselves (ascending)."""


def visited_timesteps(diffusion: Diffusion, steps: Steps) -> NDArray[np.int64]:
    """Ascending indices into the schedule; raises RequestError for timesteps that are none or out of order."""
    total = len(diffusion.schedule)
    if not isinstance(steps, int | str):
        is_list = isinstance(steps, Sequence | range | np.ndarray)
        if not is_list or not all(isinstance(t, int | np.integer) for t in steps):
            raise RequestError(
                f"steps is {steps!r}; expected a number, a respacing string or a list of whole timesteps"
            )
        chosen = np.array(list(steps), dtype=np.int64)
        if not len(chosen) or chosen[0] < 0 or chosen[-1] >= total or np.any(np.diff(chosen) <= 0):
            raise RequestError(f"timesteps must ascend within 0 to {total - 1}, got {list(steps)[:8]}")
        return chosen
    text = str(steps).strip()
    if diffusion.spacing is Spacing.EVEN or not text.isdigit():
        return space_timesteps(total, text)
    return _spaced(diffusion, int(text), total)


def _spaced(diffusion: Diffusion, count: int, total: int) -> NDArray[np.int64]:
    if not 1 <= count <= total:
        raise RequestError(f"cannot take {count} steps of {total}; take 1 to {total}")
    match diffusion.spacing:
        case Spacing.LEADING:
            chosen = np.arange(count) * (total // count) + diffusion.spacing_offset
        case Spacing.TRAILING:
            chosen = np.round(np.arange(total, 0, -total / count))[::-1] - 1
        case Spacing.LINSPACE:
            chosen = np.round(np.linspace(0, total - 1, count))
        case _:
            # torch's float32 values, because one that should be a whole number may be cut to the number below it.
            chosen = np.trunc(torch.linspace(-1, total - 1, count + 1).numpy()[1:])
    # Rounding may give the trailing ones one entry too many, below 0.
    return np.unique(np.minimum(chosen[chosen >= 0].astype(np.int64), total - 1))


def sliced(diffusion: Diffusion, steps: Steps) -> Diffusion:
    """A diffusion in continuous time as a discrete one of `steps` timesteps; any other as it is."""
    if diffusion.log_snr is None:
        return diffusion
    text = str(steps).strip()
    if not text.isdecimal() or int(text) < 1:
        raise RequestError(f"this network was trained in continuous time; give a number of steps, got {steps!r}")
    slices = time_slices(diffusion.log_snr, int(text))
    return dataclasses.replace(diffusion, schedule=slices, log_snr=None, spacing=Spacing.EVEN)


def visited(diffusion: Diffusion, steps: Steps) -> NoiseSchedule:
    """The schedule of the timesteps visited alone; arguments and errors as in visited_timesteps."""
    return diffusion.schedule.respaced(visited_timesteps(diffusion, steps))
