"""A network as a program of the CPU engine: maps, operators, and where each weight lies.

kernels/native/include/unetrt_native.h says what the words and operators mean; the names here are those there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from math import prod

import numpy as np
import torch.nn.functional as F
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


class Form(Enum):
    """What a program has of a tensor [Cout, Cin, k, k] of the state dict.

    AS_IS: the tensor itself. TURNED: [Cin, Cout, k, k], each kernel turned by half a turn: with it a convolution of
    stride 1 is that one's transpose. WIDENED: [Cout, Cin, k + 1, k + 1], zeros in the last row and column.
    """

    AS_IS = "as is"
    TURNED = "turned"
    WIDENED = "widened"


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a network's state dict, [*shape] in the form that the program has it in, and the index of its first
    float. A linear layer's [out, in] is the kernel [out, in, 1, 1] of a convolution.
    """

    name: str
    shape: tuple[int, ...]
    place: int
    form: Form = Form.AS_IS

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of the tensor in the state dict."""
        match self.form:
            case Form.AS_IS:
                return self.shape
            case Form.TURNED:
                return (self.shape[1], self.shape[0], *self.shape[2:])
            case Form.WIDENED:
                return (*self.shape[:2], *(pixels - 1 for pixels in self.shape[2:]))

    def take(self, state: Mapping[str, Tensor]) -> Tensor:
        """The weight [*shape] out of a state dict; raises BackendError for a tensor that does not fit."""
        found, wanted = state.get(self.name), self.stored_shape
        tensor = found[:, :, None, None] if found is not None and found.ndim == 2 and len(wanted) == 4 else found
        if tensor is None or tuple(tensor.shape) != wanted:
            got = "nothing" if found is None else tuple(found.shape)
            raise BackendError(
                f"{self.name} needs shape {wanted}, got {got}; "
                "build the bundle again with: python -m export.to_trt CHECKPOINT"
            )
        match self.form:
            case Form.AS_IS:
                return tensor
            case Form.TURNED:
                return tensor.flip(2, 3).transpose(0, 1)
            case Form.WIDENED:
                return F.pad(tensor, (0, 1, 0, 1))


@dataclass(frozen=True, slots=True)
class Program:
    """What a network's config asks of the engine; the values of the weights are no part of it.

    row_width: columns of the rows: the stacked time projections, in the order of engine.networks.unet.TimeEmbedding,
    and behind them a classifier's label and factor. int8_names: the convolutions that may be computed in 8 bits, as
    their blocks say.
    """

    in_channels: int
    out_channels: int
    row_width: int
    maps: tuple[MapShape, ...]
    operators: tuple[Operator, ...]
    weights: tuple[Weight, ...]
    int8_names: frozenset[str] = frozenset()

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
            tensor = weight.take(state)
            gathered[weight.place : weight.place + tensor.numel()] = tensor.detach().reshape(-1).float().numpy()
        return gathered


class Builder:
    """Collects the parts of a program; each operator writes a map of its own."""

    def __init__(self) -> None:
        self._maps: list[MapShape] = []
        self._operators: list[Operator] = []
        self._weights: dict[tuple[str, Form], Weight] = {}
        self._floats = 0
        self._joined: dict[Maps, int] = {}

    @classmethod
    def beside(cls, program: Program) -> Builder:
        """With the maps and the weights of a program, and none of its operators."""
        builder = cls()
        builder._maps = list(program.maps)
        builder._weights = {(weight.name, weight.form): weight for weight in program.weights}
        builder._floats = program.weight_count
        return builder

    def new_map(self, channels: int, height: int, width: int) -> int:
        self._maps.append(MapShape(channels, height, width))
        return len(self._maps) - 1

    def shape(self, maps: Maps) -> MapShape:
        """Of an operand: the channels of all its maps."""
        first = self._maps[maps[0]]
        return MapShape(sum(self._maps[m].channels for m in maps), first.height, first.width)

    def like(self, given: int) -> int:
        """A new map of the shape of another."""
        shape = self._maps[given]
        return self.new_map(shape.channels, shape.height, shape.width)

    def weight(self, name: str, *shape: int, form: Form = Form.AS_IS) -> int:
        """The place of a tensor, which is there once in each form however often it is asked for."""
        if (name, form) not in self._weights:
            self._weights[name, form] = Weight(name, shape, self._floats, form)
            self._floats += prod(shape)
        return self._weights[name, form].place

    def name_at(self, place: int) -> str:
        """The name of the tensor at a place."""
        return next(weight.name for weight in self._weights.values() if weight.place == place)

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

    def build(self, in_channels: int, row_width: int, output: int, int8_names: Iterable[str] = ()) -> Program:
        """The program whose result is the map `output`. int8_names: as in Program."""
        self.emit(Operator(Code.OUTPUT, src=(output,)))
        return Program(
            in_channels,
            self._maps[output].channels,
            row_width,
            tuple(self._maps),
            tuple(self._operators),
            tuple(self._weights.values()),
            frozenset(int8_names),
        )
