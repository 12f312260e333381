"""What convolutions read over real calls, and the 8-bit step that loses least of it: for every int8 form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.networks.inputs import Inputs
from engine.networks.unet import UNet

CLIPS = tuple(1 - 0.05 * i for i in range(15))
"""Shares of the whole range that best_scale tries as its end."""

SAMPLES = 1 << 14
"""Values of each call that are kept of a tensor."""

SMALLEST = 2.0**-24
"""Of a scale: float16's smallest number."""


@dataclass(slots=True)
class Seen:
    """Values of one convolution's input. low <= 0 and high >= 0: the least and the largest of all, zero included."""

    low: float = 0.0
    high: float = 0.0
    _samples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Note a call's input, of any shape: its ends, and SAMPLES to 2 SAMPLES of its values."""
        values = x.flatten()
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        self._samples.append(values[:: max(1, len(values) // SAMPLES)].clone())

    @property
    def values(self) -> Tensor:
        """[N], of all calls alike."""
        return torch.cat(self._samples)


def watch_inputs(unet: UNet, names: Iterable[str], calls: Sequence[Inputs]) -> dict[str, Seen]:
    """What the convolutions `names`, such as "blocks.3.conv1", read in these calls of the float32 network.

    calls: its inputs, from first to last timestep, as the ranges of activations change with it.
    """
    seen = {name: Seen() for name in names}
    with ExitStack() as hooks, torch.no_grad():
        for name, found in seen.items():

            def keep(_module: Any, given: Any, found: Seen = found) -> None:
                found.add(given[0])

            hooks.callback(unet.get_submodule(name).register_forward_pre_hook(keep).remove)
        for call in calls:
            unet(**call.tensors())
    return seen


def best_scale(values: Tensor, span: float, levels: int, restore: Callable[[Tensor, float], Tensor]) -> float:
    """The scale of least squared error for these values [N].

    span: what `levels` steps of the largest scale cover; smaller ones clip the values beyond. restore: (values, scale)
    -> the values that 8 bits of this scale stand for.
    """
    scales = [max(span * clip / levels, SMALLEST) for clip in CLIPS]
    return min(scales, key=lambda scale: float((restore(values, scale) - values).square().sum()))
