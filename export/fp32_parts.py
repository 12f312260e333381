"""What a float16 network must leave in float32, found by running real trajectories through the fp32 network.

Every convolution, linear layer, norm and attention is watched over states from first to last timestep (export.subject).
Three measurements decide, each with a limit below:

    magnitude     of inputs, results, weights and attention scores: beyond float16's range the block stays in float32
    rounding      how far a norm's result moves when its input is rounded to float16: where a group's mean is large
                  beside its deviation, the bits that matter are gone before the norm; the blocks that write and read
                  that input stay in float32
    squares       of a norm's input: beyond float16's range the norm and its activation are computed in float32, so
                  that the result depends on no library's choice of type for the variance (form C; form A otherwise)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.networks.blocks.base import Block, Stream, Writers
from engine.networks.inputs import Inputs
from engine.networks.operators import REFERENCE, UsesOperators
from engine.networks.unet import UNet
from kernels import reference

LARGEST = 65504.0
MARGIN = 2.0
"""Values may be this much larger for another image than in the trajectories watched, and sums of two are not seen."""

MOST_ROUNDING = 2e-2
"""Largest rms change of a normalised group by its input's rounding; a group with mean 0 and deviation 1 gives 3e-4."""


@dataclass(frozen=True, slots=True)
class Fp32Part:
    """A part to leave in float32, named as engine.networks.half does, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Peak:
    """The largest magnitude seen at a layer, and the timestep it was seen at (None: of its weights)."""

    value: float
    timestep: float | None

    def at(self, layer: str) -> str:
        when = "in its weights" if self.timestep is None else f"at timestep {self.timestep:.4g}"
        return f"{layer} reaches {self.value:.2g} {when}"


@dataclass(slots=True)
class Ranges:
    """peaks: of each layer by name. norm_peaks, rounding: of each norm's input, and what its rounding changes."""

    peaks: dict[str, Peak] = field(default_factory=dict)
    norm_peaks: dict[str, Peak] = field(default_factory=dict)
    rounding: dict[str, Peak] = field(default_factory=dict)


def find_fp32_parts(unet: UNet, cases: Sequence[Inputs]) -> tuple[Fp32Part, ...]:
    """The parts of a float32 network that its float16 form must leave in float32. cases: as many batches as wished."""
    return decide(unet, watch(unet, cases))


def watch(unet: UNet, cases: Sequence[Inputs]) -> Ranges:
    """Run the network on the cases and measure; the network is left as it was."""
    ranges = Ranges()
    for name, parameter in unet.named_parameters():
        if name != "time.frequencies":
            layer = name.rpartition(".")[0]
            largest = max(float(parameter.abs().max()), ranges.peaks.get(layer, Peak(0.0, None)).value)
            ranges.peaks[layer] = Peak(largest, None)
    for inputs in cases:
        with torch.no_grad(), _watched(unet, inputs.timestep, ranges):
            unet(**inputs.tensors())
    return ranges


def decide(unet: UNet, ranges: Ranges) -> tuple[Fp32Part, ...]:
    """What the measurements ask for, in the order of the network."""
    parts: dict[str, str] = {}
    for layer, peak in ranges.peaks.items():
        if not peak.value * MARGIN <= LARGEST:
            parts.setdefault(_owner(layer), f"{peak.at(layer)}; fp16 ends at 65504")
    writers = stream_writers(unet.config.blocks)
    for norm, moved in ranges.rounding.items():
        if not moved.value <= MOST_ROUNDING:
            reason = f"rounding the input of {norm} to fp16 moves its result by {moved.value:.2g} of its deviation"
            _, place, part = norm.split(".", 2)
            block = int(place)
            is_inner = part in unet.config.blocks[block].inner_norms
            for index in (*(() if is_inner else writers[block]), block):
                parts.setdefault(f"blocks.{index}", reason)
    for norm, peak in ranges.norm_peaks.items():
        if _owner(norm) not in parts and not peak.value**2 <= LARGEST:
            parts[norm] = f"its input reaches {peak.value:.2g}, whose square is beyond fp16's 65504"
    order = {name: place for place, (name, _) in enumerate(unet.named_modules())}
    return tuple(Fp32Part(name, parts[name]) for name in sorted(parts, key=order.__getitem__))


def stream_writers(blocks: Sequence[Block]) -> list[Writers]:
    """For each block the indices of those that wrote what it reads."""
    stream: Stream[Writers] = Stream((), ())
    return [block.trace(index, stream) for index, block in enumerate(blocks)]


def _owner(layer: str) -> str:
    """ "blocks.3" or "time" of a layer inside it."""
    first, *rest = layer.split(".")
    return first if first == "time" else f"{first}.{rest[0]}"


def _keep_larger(peaks: dict[str, Peak], name: str, values: Tensor, timestep: Tensor) -> None:
    """values [B], timestep [B]."""
    worst = int(values.nan_to_num(nan=float("inf")).argmax())
    peak = Peak(float(values[worst].nan_to_num(nan=float("inf"))), float(timestep[worst]))
    if name not in peaks or peak.value > peaks[name].value:
        peaks[name] = peak


def _largest(x: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return x.abs().flatten(1).amax(dim=1)


@contextmanager
def _watched(unet: UNet, timestep: Tensor, ranges: Ranges) -> Iterator[None]:
    """Inside, every call of the network adds to ranges. timestep: of the images of that call."""
    with ExitStack() as undo:
        for name, module in unet.named_modules():
            is_block = name.startswith("blocks.") and name.count(".") == 1
            if is_block or isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):

                def see(_module: Any, given: Any, result: Tensor, name: str = name) -> None:
                    for tensor in (given[0], result):
                        _keep_larger(ranges.peaks, name, _largest(tensor), timestep)

                undo.callback(module.register_forward_hook(see).remove)
            if isinstance(module, UsesOperators):
                module.operators = _WatchedOperators(name, timestep, ranges)
                undo.callback(module.__dict__.pop, "operators")
        yield


@dataclass(frozen=True, slots=True, eq=False)
class _WatchedOperators:
    """kernels.reference, measuring what one module gives it."""

    name: str
    timestep: Tensor
    ranges: Ranges

    def group_norm(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        result = self._normalise(x, weight, bias, num_groups, eps)
        _keep_larger(self.ranges.peaks, self.name, _largest(result), self.timestep)
        return result

    def group_norm_silu(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        return nn.functional.silu(self.group_norm(x, weight, bias, num_groups, eps))

    def adaptive_group_norm_silu(
        self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor, shift: Tensor
    ) -> Tensor:
        return reference.scale_shift_silu(self.group_norm(x, weight, bias, num_groups, eps), scale, shift)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _keep_larger(self.ranges.peaks, self.name, _largest(q @ k.transpose(-2, -1)), self.timestep)
        return REFERENCE.attention(q, k, v)

    def _normalise(self, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        _keep_larger(self.ranges.norm_peaks, self.name, _largest(x), self.timestep)
        ones, zeros = torch.ones_like(weight), torch.zeros_like(bias)
        exact = reference.group_norm(x, ones, zeros, groups, eps)
        rounded = reference.group_norm(x.clamp(-LARGEST, LARGEST).half().float(), ones, zeros, groups, eps)
        moved = (rounded - exact).square().reshape(len(x), groups, -1).mean(dim=2).sqrt().amax(dim=1)
        _keep_larger(self.ranges.rounding, self.name, moved, self.timestep)
        return reference.group_norm(x, weight, bias, groups, eps)
