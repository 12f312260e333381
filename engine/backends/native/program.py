"""A network as a program of the CPU engine: maps, operators, and where each weight lies.

kernels/native/include/unetrt_native.h says what the words and operators mean; the names here are those there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import BackendError

MAGIC, FORMAT = 0x54524E55, 2
NONE = -1

Maps = tuple[int, ...]
"""An operand: one map, or two whose channels follow one another; () for none."""


class Code(IntEnum):
    """What an operator does."""

    INPUT = 0
    OUTPUT = 1
    CONV = 2
    NORM = 3
    ATTENTION = 4
    LINEAR_ATTENTION = 5
    RESAMPLE = 6
    ADD = 7
    CONCAT = 8
    TOKENS = 9
    PIXELS = 10
    CLASSIFY = 11
    NORM_GRADIENT = 12
    ATTENTION_GRADIENT = 13


class Mode(IntEnum):
    """Of convolutions."""

    PLAIN = 0
    UPSAMPLED = 1
    TRANSPOSED = 2


class Resampling(IntEnum):
    """Kinds of RESAMPLE."""

    NEAREST_UP = 0
    AVERAGE_DOWN = 1
    FIR_UP = 2
    FIR_DOWN = 3
    SPACE_TO_DEPTH = 4
    PAD = 5


@dataclass(frozen=True, slots=True)
class MapShape:
    """An image of each of the batch: [channels, height, width].

    scale: 0 for numbers; else the map holds bytes that stand for (byte - zero) * scale.
    """

    channels: int
    height: int
    width: int
    scale: float = 0.0
    zero: int = 0

    def words(self) -> NDArray[np.int32]:
        """[5] int32."""
        scale = np.array([self.scale], np.float32).view(np.int32)[0]
        return np.array([self.channels, self.height, self.width, scale, self.zero], np.int32)


@dataclass(frozen=True, slots=True)
class Operator:
    """The fields of unetrt_operator; -1 names no map, weight or column."""

    code: Code
    dst: int = NONE
    src: Maps = ()
    add: int = NONE
    weight: int = NONE
    bias: int = NONE
    row: int = NONE
    kernel: int = 0
    stride: int = 0
    pad: int = 0
    mode: Mode = Mode.PLAIN
    extra: Maps = ()
    extra_weight: int = NONE
    extra_bias: int = NONE
    kind: int = 0
    groups: int = 0
    activation: int = 0
    heads: int = 0
    dim: int = 0
    memory: int = 0
    scale: float = 1.0
    eps: float = 0.0

    def words(self) -> NDArray[np.int32]:
        """[24] int32."""
        whole = [
            *(self.code, self.dst, *_two(self.src), self.add, self.weight, self.bias, self.row),
            *(self.kernel, self.stride, self.pad, self.mode),
            *(*_two(self.extra), self.extra_weight, self.extra_bias),
            *(self.kind, self.groups, self.activation, self.heads, self.dim, self.memory),
        ]
        numbers = np.array([self.scale, self.eps], np.float32)
        return np.concatenate([np.array(whole, np.int32), numbers.view(np.int32)])


def _two(maps: Maps) -> tuple[int, int]:
    first, second = (*maps, NONE, NONE)[:2]
    return first, second


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of engine.networks.unet.UNet's state dict and the index of its first float."""

    name: str
    shape: tuple[int, ...]
    place: int


@dataclass(frozen=True, slots=True)
class Program:
    """What a UNetConfig asks of the engine; the values of the weights are no part of it.

    row_width: columns of the stacked time projections, in the order of engine.networks.unet.TimeEmbedding.
    """

    in_channels: int
    out_channels: int
    row_width: int
    maps: tuple[MapShape, ...]
    operators: tuple[Operator, ...]
    weights: tuple[Weight, ...]

    @property
    def weight_count(self) -> int:
        return sum(prod(weight.shape) for weight in self.weights)

    def words(self) -> NDArray[np.int32]:
        """The program as the library reads it: [n] int32."""
        header = [MAGIC, FORMAT, len(self.maps), len(self.operators)]
        header += [self.in_channels, self.out_channels, self.row_width, self.weight_count]
        maps, operators = [m.words() for m in self.maps], [op.words() for op in self.operators]
        return np.concatenate([np.array(header, np.int32), *maps, *operators])

    def gather(self, state: Mapping[str, Tensor]) -> NDArray[np.float32]:
        """The weights [weight_count] float32 out of a state dict; raises BackendError for one that does not fit."""
        gathered = np.empty(self.weight_count, np.float32)
        for weight in self.weights:
            tensor = state.get(weight.name)
            if tensor is None or tuple(tensor.shape) != weight.shape:
                got = "nothing" if tensor is None else tuple(tensor.shape)
                raise BackendError(
                    f"{weight.name} needs shape {weight.shape}, got {got}; "
                    "build the bundle again with: python -m export.to_trt CHECKPOINT"
                )
            gathered[weight.place : weight.place + tensor.numel()] = tensor.detach().reshape(-1).float().numpy()
        return gathered


class Builder:
    """Collects the parts of a program; each operator writes a map of its own."""

    def __init__(self) -> None:
        self._maps: list[MapShape] = []
        self._operators: list[Operator] = []
        self._weights: dict[str, Weight] = {}
        self._floats = 0
        self._joined: dict[Maps, int] = {}

    def new_map(self, channels: int, height: int, width: int) -> int:
        self._maps.append(MapShape(channels, height, width))
        return len(self._maps) - 1

    def shape(self, maps: Maps) -> MapShape:
        """Of an operand: the channels of all its maps."""
        first = self._maps[maps[0]]
        return MapShape(sum(self._maps[m].channels for m in maps), first.height, first.width)

    def weight(self, name: str, *shape: int) -> int:
        """The place of a tensor, which is there once however often it is asked for."""
        if name not in self._weights:
            self._weights[name] = Weight(name, shape, self._floats)
            self._floats += prod(shape)
        return self._weights[name].place

    def emit(self, operator: Operator) -> None:
        self._operators.append(operator)

    def join(self, maps: Maps) -> int:
        """One map that holds an operand."""
        if len(maps) == 1:
            return maps[0]
        if maps not in self._joined:
            shape = self.shape(maps)
            self._joined[maps] = self.new_map(shape.channels, shape.height, shape.width)
            self.emit(Operator(Code.CONCAT, self._joined[maps], maps))
        return self._joined[maps]

    def build(self, in_channels: int, row_width: int, output: int) -> Program:
        """The program whose result is the map `output`."""
        self.emit(Operator(Code.OUTPUT, src=(output,)))
        return Program(
            in_channels,
            self._maps[output].channels,
            row_width,
            tuple(self._maps),
            tuple(self._operators),
            tuple(self._weights.values()),
        )
