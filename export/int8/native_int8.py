"""Which convolutions the CPU engine computes in int8, and the ranges of their inputs.

The fp32 network sees states x_t of real trajectories from first to last timestep, as the ranges of activations change
with it. Of each input the bytes' range is the one with the least squared error over all of them. Then each convolution
alone is computed so, and the network's error is its own; errors of layers are independent, so that their squares add
up. Those with the least of it for the arithmetic that they spare are taken, as many as keep NETWORK_LIMIT; the others
stay in bf16.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.backends.native.byte_ranges import LARGEST_BYTE, ByteRange, find_candidates
from engine.backends.native.lowering import build_program
from engine.backends.native.program import Program
from engine.bundle.file_names import UNET, ranges_name
from engine.bundle.manifest import Measurement
from engine.errors import ExportError
from engine.networks.inputs import Inputs, join_inputs
from engine.networks.unet import UNet
from export.int8.calibration import best_scale, watch_inputs
from export.verify import Difference
from kernels import reference as ops

logger = logging.getLogger(__name__)

NETWORK_LIMIT = 0.018
"""Largest rms error of the network's output relative to its standard deviation; with bf16's 0.005 to 0.008, 2 %."""


@dataclass(frozen=True, slots=True)
class Int8Choice:
    """ranges: of the convolutions in int8. left: those that stay in bf16. measurement: of the network so."""

    ranges: dict[str, ByteRange]
    left: tuple[str, ...]
    measurement: Measurement


def choose_int8(unet: UNet, cases: Sequence[Inputs]) -> Int8Choice:
    """unet: fp32, on the CPU. cases: as export.subject.real_cases gives them.

    Raises ExportError for a network without such convolutions, BackendError for one that the CPU engine cannot run.
    """
    program = build_program(unet.config)
    names = tuple(find_candidates(program))
    if not names:
        raise ExportError("this network has no 3x3 convolution of a ResBlock behind a norm; leave --native-int8 out")
    ranges = calibrate(unet, names, cases)
    # A call for each convolution: every other timestep is enough to tell them apart.
    alone = _Wanted(unet, [join_inputs([case for case in cases if case.is_single][::2])])
    shares = {name: alone.judge({name: ranges[name]}).rms / alone.deviation for name in names}
    spared = count_products(program)
    order = sorted(names, key=lambda name: shares[name] ** 2 / spared[name])
    count = sum(total <= NETWORK_LIMIT**2 for total in itertools.accumulate(shares[name] ** 2 for name in order))
    together = _Wanted(unet, cases)
    difference = together.judge({name: ranges[name] for name in order[:count]})
    while count and not difference.rms <= NETWORK_LIMIT * together.deviation:
        count -= 1
        difference = together.judge({name: ranges[name] for name in order[:count]})
    for name in order[count:]:
        logger.info("%s stays in bf16: in int8 it alone gives an error of %.2g of the output", name, shares[name])
    measurement = Measurement(
        ranges_name(UNET), "torch cpu", "int8", difference.max_abs, difference.rms, difference.wanted_rms, NETWORK_LIMIT
    )
    return Int8Choice({name: ranges[name] for name in order[:count]}, tuple(order[count:]), measurement)


def describe_int8(choice: Int8Choice) -> str:
    """What a manifest says of the file."""
    total = len(choice.ranges) + len(choice.left)
    return f"{len(choice.ranges)} of {total} 3x3 convolutions in ResBlocks in int8, the rest of the CPU engine bf16"


class _Wanted:
    """The fp32 network's results for some cases."""

    def __init__(self, unet: UNet, cases: Sequence[Inputs]) -> None:
        self._unet, self._cases = unet, cases
        with torch.no_grad():
            self._results = [unet(**case.tensors()) for case in cases]
        self.deviation = float(torch.cat([result.flatten() for result in self._results]).std())

    def judge(self, ranges: Mapping[str, ByteRange]) -> Difference:
        """The error with these convolutions in int8."""
        total = Difference()
        with int8_convolutions(self._unet, ranges), torch.no_grad():
            for case, result in zip(self._cases, self._results, strict=True):
                total.add(self._unet(**case.tensors()), result)
        return total


def count_products(program: Program) -> dict[str, int]:
    """Of each convolution that can be in int8, for one image."""
    sources = find_candidates(program)
    names = {weight.place: weight.name.removesuffix(".weight") for weight in program.weights}
    made = {names[operator.weight]: operator.dst for operator in program.operators if operator.weight in names}
    counts = {}
    for name, source in sources.items():
        dst = program.maps[made[name]]
        counts[name] = 9 * program.maps[source].channels * dst.channels * dst.height * dst.width
    return counts


def calibrate(unet: UNet, names: Sequence[str], calls: Sequence[Inputs]) -> dict[str, ByteRange]:
    """The range of each convolution's input over all calls of the network."""
    seen = watch_inputs(unet, names, calls)
    return {name: best_range(found.values, found.low, found.high) for name, found in seen.items()}


def best_range(values: Tensor, low: float, high: float) -> ByteRange:
    """The range of least squared error for these values [N] of a tensor that reaches from `low` <= 0 to `high` >= 0.

    What it leaves out are the largest values: an activation's smallest are many.
    """

    def find_zero(scale: float) -> int:
        return min(LARGEST_BYTE, max(0, round(-low / scale)))

    def restore(given: Tensor, scale: float) -> Tensor:
        return ops.bytes_of(given, scale, find_zero(scale))

    scale = best_scale(values, high - low, LARGEST_BYTE, restore)
    return ByteRange(scale, find_zero(scale))


@contextmanager
def int8_convolutions(unet: UNet, ranges: Mapping[str, ByteRange]) -> Iterator[None]:
    """Within it these convolutions of the network are computed as in int8, in fp32 arithmetic."""
    modules = {name: unet.get_submodule(name) for name in ranges}
    try:
        for name, module in modules.items():
            vars(module)["forward"] = functools.partial(_convolve, module, ranges[name])
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def _convolve(module: nn.Module, found: ByteRange, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    assert module.bias is not None
    return ops.conv2d_int8(x, module.weight, module.bias, found.scale, found.zero)
