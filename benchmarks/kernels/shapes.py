"""The operators that are measured, each at one size of map, with what it must move and compute at least.

Bytes: every operand read once and every result written once. FLOPs: a multiply-add is two, an exponential, a division
and a root one each. A convolution's are those of the direct sum, attention's those of its two products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.kernels.providers import Provider
from engine.device import Device
from kernels import reference

GROUPS, EPS = 32, 1e-5
NORM_FLOPS, MODULATION_FLOPS = 10, 3
"""An element: mean 1, squared deviations 3, scaling 2, SiLU 4; (1 + scale) and a multiply-add."""


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where and in what precision an operator is measured."""

    device: Device
    precision: str
    dtype: torch.dtype
    channels_last: bool
    seed: int = 0

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        """Normals in the dtype, the same on every device; four dimensions lie in the memory format."""
        make = torch.Generator().manual_seed(self.seed + sum(shape))
        values = (torch.randn(shape, generator=make) * scale + offset).to(self.dtype)
        is_map = self.channels_last and len(shape) == 4
        layout = torch.channels_last if is_map else torch.contiguous_format
        return values.to(self.device.kind, memory_format=layout)


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """An operator with its operands.

    wanted: the result by kernels.reference in float32 on the CPU. work: what a provider does for it, None where it
    does not have the operator.
    """

    wanted: Tensor
    work: Callable[[Provider], Callable[[], Tensor] | None]


class Shape(Protocol):
    """An operator at one size of map, which a network calls `calls` times a step."""

    @property
    def operator(self) -> str: ...
    @property
    def calls(self) -> int: ...
    @property
    def text(self) -> str:
        """The size for a reader."""
        ...

    def moved_bytes(self, batch: int, place: Place) -> int: ...
    def flops(self, batch: int) -> int: ...
    def task(self, batch: int, place: Place) -> Task: ...


@dataclass(frozen=True, slots=True)
class NormShape:
    """SiLU(GroupNorm(x)), 32 groups; modulated: with scale and shift of each image in between."""

    channels: int
    size: int
    calls: int
    modulated: bool = False

    @property
    def operator(self) -> str:
        return "modulated norm+SiLU" if self.modulated else "norm+SiLU"

    @property
    def text(self) -> str:
        return f"C={self.channels} {self.size}x{self.size}"

    def moved_bytes(self, batch: int, place: Place) -> int:
        rows = 2 + 2 * batch * self.modulated
        return place.dtype.itemsize * (2 * batch * self.channels * self.size**2 + rows * self.channels)

    def flops(self, batch: int) -> int:
        return batch * self.channels * self.size**2 * (NORM_FLOPS + MODULATION_FLOPS * self.modulated)

    def task(self, batch: int, place: Place) -> Task:
        x = place.normal(batch, self.channels, self.size, self.size, scale=2.0, offset=0.5)
        rows = place.normal(2, self.channels, scale=0.2)
        weight, bias = 1 + rows[0], rows[1]
        norm = (x, weight, bias, GROUPS, EPS)
        exact = (_exact(x), _exact(weight), _exact(bias), GROUPS, EPS)
        if not self.modulated:
            return Task(
                reference.group_norm_silu(*exact),
                lambda provider: None if provider.norm_silu is None else partial(provider.norm_silu, *norm),
            )
        # A network cuts both out of one projection.
        scale, shift = place.normal(batch, 2 * self.channels, scale=0.3).chunk(2, dim=1)
        return Task(
            reference.scale_shift_silu(reference.group_norm(*exact), _exact(scale), _exact(shift)),
            lambda provider: (
                None
                if provider.modulated_norm_silu is None
                else partial(provider.modulated_norm_silu, *norm, scale, shift)
            ),
        )


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """softmax(q k^T) v over the pixels of a square map."""

    heads: int
    tokens: int
    head_dim: int
    calls: int
    operator = "attention"

    @property
    def text(self) -> str:
        return f"heads={self.heads} N={self.tokens} d={self.head_dim}"

    def moved_bytes(self, batch: int, place: Place) -> int:
        return 4 * place.dtype.itemsize * batch * self.heads * self.tokens * self.head_dim

    def flops(self, batch: int) -> int:
        return 4 * batch * self.heads * self.tokens**2 * self.head_dim

    def task(self, batch: int, place: Place) -> Task:
        side = math.isqrt(self.tokens)
        qkv = place.normal(batch, 3 * self.heads * self.head_dim, side, side)
        # Scores of standard deviation 3, so that a few keys weigh most.
        qkv[:, : self.heads * self.head_dim] *= 3 * self.head_dim**-0.5
        # Cut as engine.networks.blocks.self_attention cuts it, so that the strides are a network's.
        tokens = qkv.reshape(batch, 3, self.heads, self.head_dim, self.tokens).transpose(3, 4)
        q, k, v = tokens[:, 0], tokens[:, 1], tokens[:, 2]
        return Task(
            reference.attention(_exact(q), _exact(k), _exact(v)),
            lambda provider: None if provider.attention is None else partial(provider.attention, q, k, v),
        )


@dataclass(frozen=True, slots=True)
class ConvShape:
    """3 x 3, stride 1, with a bias."""

    in_channels: int
    out_channels: int
    size: int
    calls: int
    operator = "convolution 3x3"

    @property
    def text(self) -> str:
        return f"C={self.in_channels}->{self.out_channels} {self.size}x{self.size}"

    def moved_bytes(self, batch: int, place: Place) -> int:
        maps = batch * (self.in_channels + self.out_channels) * self.size**2
        return place.dtype.itemsize * (maps + (9 * self.in_channels + 1) * self.out_channels)

    def flops(self, batch: int) -> int:
        return 2 * 9 * batch * self.in_channels * self.out_channels * self.size**2

    def task(self, batch: int, place: Place) -> Task:
        x = place.normal(batch, self.in_channels, self.size, self.size)
        fan_in = 9 * self.in_channels
        weight = place.normal(self.out_channels, self.in_channels, 3, 3, scale=fan_in**-0.5)
        bias = place.normal(self.out_channels, scale=0.1)
        return Task(
            torch.conv2d(_exact(x), _exact(weight), _exact(bias), padding=1),
            lambda provider: None if provider.convolution is None else partial(provider.convolution, x, weight, bias),
        )


def _exact(values: Tensor) -> Tensor:
    return values.float().cpu()
