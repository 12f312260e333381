"""The kernels of the CPU engine one by one: programs of one operator, whose time is the engine's own for it.

The engine keeps maps in blocks of channels; the copies from and to torch's layout are operators of their own and not
part of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.core.timing import Variant
from engine.backends.native.program import Builder, Code, Operator
from engine.device import Device
from kernels.native.library import Engine, Network

_SILU = 1
_OPERATOR = 1  # Between input and output.

Emit = partial[int]
"""Adds the operator that reads a map, given a Builder and that map; the map that it writes."""


class NativeOperators:
    """Float32, contiguous operands on the CPU; an engine is kept for every operator and its weights."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._engines: dict[tuple[object, ...], tuple[Engine, tuple[Tensor, ...]]] = {}
        self._last_ms = 0.0

    def norm_silu(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        """kernels.reference.group_norm_silu."""
        return self._run(x, (weight, bias), partial(_emit_norm, num_groups, eps, False))

    def modulated_norm_silu(
        self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor, shift: Tensor
    ) -> Tensor:
        """The same with scale and shift [B, C] between."""
        emit = partial(_emit_norm, num_groups, eps, True)
        return self._run(x, (weight, bias), emit, torch.cat([scale, shift], dim=1))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """kernels.reference.attention."""
        batch, heads, tokens, dim = q.shape
        side = math.isqrt(tokens)
        x = torch.stack([q, k, v], dim=1).transpose(3, 4).reshape(batch, 3 * heads * dim, side, side)
        out = self._run(x, (), partial(_emit_attention, heads, dim))
        return out.reshape(batch, heads, dim, tokens).transpose(2, 3)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """3 x 3, stride 1, zeros around."""
        return self._run(x, (weight, bias), partial(_emit_convolution, weight.shape[0]))

    def variant(self, name: str, work: Callable[[], object], device: Device) -> Variant:
        """Timed by the engine: the one operator, without the copies around it."""

        def clock(work: Callable[[], object]) -> float:
            work()
            return self._last_ms

        return Variant(name, work, clock)

    def _run(self, x: Tensor, weights: tuple[Tensor, ...], emit: Emit, rows: Tensor | None = None) -> Tensor:
        engine = self._find_engine(x, weights, emit, 0 if rows is None else rows.shape[1])
        columns = None if rows is None else rows.contiguous().numpy()
        out, seconds = engine.profile(x.contiguous().numpy(), columns)
        self._last_ms = 1e3 * float(seconds[_OPERATOR])
        return torch.from_numpy(out)

    def _find_engine(self, x: Tensor, weights: tuple[Tensor, ...], emit: Emit, row_width: int) -> Engine:
        key = (emit.func, emit.args, *x.shape[1:], *(weight.data_ptr() for weight in weights))
        if key not in self._engines:
            builder = Builder()
            first = builder.new_map(*x.shape[1:])
            builder.emit(Operator(Code.INPUT, first))
            program = builder.build(x.shape[1], row_width, emit(builder, first))
            network = Network(program.words())
            state = dict(zip(("weight", "bias"), weights, strict=False))
            packed = network.pack(program.gather(state))
            # The weights are kept, so that no other tensor gets their address.
            self._engines[key] = Engine(network, packed, self._threads), weights
        return self._engines[key][0]


def _emit_norm(groups: int, eps: float, is_modulated: bool, builder: Builder, src: int) -> int:
    shape = builder.shape((src,))
    dst = builder.new_map(shape.channels, shape.height, shape.width)
    weight, bias = (builder.weight(name, shape.channels) for name in ("weight", "bias"))
    row = 0 if is_modulated else -1
    operator = Operator(
        Code.NORM, dst, (src,), weight=weight, bias=bias, row=row, groups=groups, activation=_SILU, eps=eps
    )
    builder.emit(operator)
    return dst


def _emit_attention(heads: int, dim: int, builder: Builder, src: int) -> int:
    shape = builder.shape((src,))
    dst = builder.new_map(heads * dim, shape.height, shape.width)
    builder.emit(Operator(Code.ATTENTION, dst, (src,), heads=heads, dim=dim, scale=0.0))
    return dst


def _emit_convolution(channels: int, builder: Builder, src: int) -> int:
    shape = builder.shape((src,))
    dst = builder.new_map(channels, shape.height, shape.width)
    weight, bias = builder.weight("weight", channels, shape.channels, 3, 3), builder.weight("bias", channels)
    builder.emit(Operator(Code.CONV, dst, (src,), weight=weight, bias=bias, kernel=3, stride=1, pad=1))
    return dst
