"""A list of blocks as operators of the CPU engine: the target that each block's `lower` is given.

What engine.networks.unet.run_blocks keeps as tensors are operands here: concatenating two maps only names both, and a
copy is made where an operator takes one map, or where there would be a third. Biases, time projections, residuals, 1x1
shortcuts and factors are part of the convolution or norm before them.
"""

from __future__ import annotations

from dataclasses import replace

from engine.backends.native.program import NONE, Builder, Code, Maps, MapShape, Mode, Operator, Program, Resampling
from engine.errors import BackendError
from engine.networks.blocks.base import Block
from engine.networks.blocks.target import ALONE, THREE, Heads, NormRule, Then, Window
from engine.networks.config import ClassifierConfig, UNetConfig
from engine.networks.kinds import Activation, Norm, Resample

MOST_KERNEL = 7

_NORMS = {Norm.GROUP: 0, Norm.RMS: 1, Norm.LAYER: 2, Norm.AFFINE: 3, Norm.NONE: 4}
_ACTIVATIONS = {
    Activation.NONE: 0,
    Activation.SILU: 1,
    Activation.RELU: 2,
    Activation.MISH: 3,
    Activation.GELU: 4,
}
_RESAMPLINGS = {
    (Resample.UP, False): Resampling.NEAREST_UP,
    (Resample.UP, True): Resampling.FIR_UP,
    (Resample.DOWN, False): Resampling.AVERAGE_DOWN,
    (Resample.DOWN, True): Resampling.FIR_DOWN,
}


_LABEL_AND_FACTOR = 2


def build_program(config: UNetConfig | ClassifierConfig) -> Program:
    """The program of a network; raises BackendError for a block that the engine does not have.

    A classifier's rows have two columns more, label and factor. It gives log p(label), and as its output the gradient
    of factor * log p(label) at the tokens that its last layer reads: engine.backends.native.transpose takes it on from
    there to the image.
    """
    lowering = Lowering(config)
    for index, block in enumerate(config.blocks):
        lowering.lower(f"blocks.{index}", block)
    return lowering.build()


class Lowering:
    """engine.networks.blocks.target.Target over a Builder."""

    def __init__(self, config: UNetConfig | ClassifierConfig) -> None:
        self._config, self._net, self._row = config, Builder(), 0
        self._channels = config.in_channels + (config.cond_channels if isinstance(config, UNetConfig) else 0)
        first = self._net.new_map(self._channels, *config.image_size)
        self._net.emit(Operator(Code.INPUT, first))
        self.h: Maps = (first,)
        self.image: Maps = (first,)
        self.skips: list[Maps] = []
        self._int8_names: list[str] = []

    def lower(self, name: str, block: Block) -> None:
        """One more block, whose weights are named `name`."""
        if block.is_pool and isinstance(self._config, UNetConfig):
            raise BackendError(f"the native engine has no {type(block).__name__}; choose another backend")
        block.lower(name, self)
        self._int8_names += [f"{name}.{part}" for part in block.int8_convolutions]

    def build(self) -> Program:
        """The program of the blocks lowered so far, whose result is h."""
        width = sum(self._config.projection_channels)
        width += _LABEL_AND_FACTOR if isinstance(self._config, ClassifierConfig) else 0
        return self._net.build(self._channels, width, self._net.join(self.h), self._int8_names)

    def shape(self, src: Maps) -> MapShape:
        return self._net.shape(src)

    def take_row(self, count: int) -> int | None:
        first, self._row = self._row, self._row + count
        return first if count else None

    def concatenate(self, first: Maps, second: Maps) -> Maps:
        if len(first) + len(second) <= 2:
            return first + second
        return self._net.join(first), self._net.join(second)

    def conv(self, name: str, src: Maps, channels: int, window: Window = THREE, then: Then = ALONE) -> Maps:
        """Raises BackendError for a window that the engine does not have."""
        k, given = window.pixels, self._net.shape(src)
        if not 1 <= k <= MOST_KERNEL:
            raise BackendError(f"{name} has a kernel of {k}; the native engine has 1 to {MOST_KERNEL}")
        pad = k // 2 if window.pad is None else window.pad
        size = window.size or (_doubled(given) if window.is_upsampled else _plain_size(given, k, pad))
        operator = Operator(
            Code.CONV,
            weight=self._net.weight(f"{name}.weight", channels, given.channels, k, k),
            kernel=k,
            stride=window.stride,
            pad=pad,
            mode=Mode.UPSAMPLED if window.is_upsampled else Mode.PLAIN,
        )
        return self._convolve(name, src, operator, MapShape(channels, *size), then)

    def transposed_conv(self, name: str, src: Maps, channels: int) -> Maps:
        given = self._net.shape(src)
        weight = self._net.weight(f"{name}.weight", given.channels, channels, 4, 4)
        operator = Operator(Code.CONV, weight=weight, kernel=4, stride=2, pad=1, mode=Mode.TRANSPOSED)
        return self._convolve(name, src, operator, MapShape(channels, *_doubled(given)), ALONE)

    def _convolve(self, name: str, src: Maps, operator: Operator, shape: MapShape, then: Then) -> Maps:
        """The operator with what all convolutions have: bias, and what follows."""
        net, channels, extra = self._net, shape.channels, then.extra_name
        taken = net.shape(then.extra).channels if extra else 0
        add = net.join(then.add) if then.add else NONE
        whole = replace(
            operator,
            dst=net.new_map(channels, shape.height, shape.width),
            src=src,
            add=add,
            bias=net.weight(f"{name}.bias", channels),
            row=NONE if then.row is None else then.row,
            extra=then.extra,
            extra_weight=net.weight(f"{extra}.weight", channels, taken, 1, 1) if extra else NONE,
            extra_bias=net.weight(f"{extra}.bias", channels) if extra else NONE,
            scale=then.scale,
        )
        net.emit(whole)
        return (whole.dst,)

    def normalise(self, name: str, src: Maps, rule: NormRule, then: Then = ALONE) -> Maps:
        """The operand itself where nothing is left to do."""
        net, kind = self._net, rule.norm
        if kind is Norm.NONE and rule.activation is Activation.NONE and then == ALONE:
            return src
        shape = net.shape(src)
        add = net.join(then.add) if then.add else NONE
        has_bias = kind in (Norm.GROUP, Norm.AFFINE)
        operator = Operator(
            Code.NORM,
            net.new_map(shape.channels, shape.height, shape.width),
            src,
            add=add,
            weight=NONE if kind is Norm.NONE else net.weight(f"{name}.weight", shape.channels),
            bias=net.weight(f"{name}.bias", shape.channels) if has_bias else NONE,
            row=NONE if then.row is None else then.row,
            kind=_NORMS[kind],
            groups=(rule.groups or shape.channels) if kind is Norm.GROUP else 0,
            activation=_ACTIVATIONS[rule.activation],
            scale=then.scale,
            eps=rule.eps,
        )
        net.emit(operator)
        return (operator.dst,)

    def attend(self, qkv: Maps, heads: Heads, cosine_scale: float | None = None) -> Maps:
        return self._attend(Code.ATTENTION, qkv, heads, cosine_scale or 0.0, 0.0)

    def attend_linearly(self, qkv: Maps, heads: Heads, value_factor: float = 1.0) -> Maps:
        return self._attend(Code.LINEAR_ATTENTION, qkv, heads, heads.dim**-0.5, value_factor)

    def _attend(self, code: Code, qkv: Maps, heads: Heads, scale: float, value_factor: float) -> Maps:
        net, shape = self._net, self._net.shape(qkv)
        memory = (2, heads.heads, heads.memory, heads.dim)
        operator = Operator(
            code,
            net.new_map(heads.heads * heads.dim, shape.height, shape.width),
            qkv,
            weight=net.weight(heads.memory_name, *memory) if heads.memory else NONE,
            heads=heads.heads,
            dim=heads.dim,
            memory=heads.memory,
            scale=scale,
            eps=value_factor,
        )
        net.emit(operator)
        return (operator.dst,)

    def tokens(self, src: Maps, position_name: str = "") -> Maps:
        net, joined, shape = self._net, self._net.join(src), self._net.shape(src)
        count = shape.height * shape.width + 1
        position = net.weight(position_name, shape.channels, count) if position_name else NONE
        dst = net.new_map(shape.channels, 1, count)
        net.emit(Operator(Code.TOKENS, dst, (joined,), weight=position))
        return (dst,)

    def classify(self, name: str, tokens: Maps, classes: int) -> Maps:
        net, shape = self._net, self._net.shape(tokens)
        operator = Operator(
            Code.CLASSIFY,
            net.new_map(shape.channels, shape.height, shape.width),
            tokens,
            weight=net.weight(f"{name}.weight", classes, shape.channels),
            bias=net.weight(f"{name}.bias", classes),
            row=sum(self._config.projection_channels),
            groups=classes,
        )
        net.emit(operator)
        return (operator.dst,)

    def resample(self, src: Maps, how: Resample, fir: bool = False, add: Maps = ()) -> Maps:
        """Each map on its own, because no resampling mixes channels of two; one map where another is added to it."""
        kind = _RESAMPLINGS[how, fir]
        if not add:
            return tuple(self._resample(kind, m) for m in src)
        added = self._net.join(add)
        return (self._resample(kind, self._net.join(src), add=added),)

    def space_to_depth(self, src: Maps) -> Maps:
        return tuple(self._resample(Resampling.SPACE_TO_DEPTH, m) for m in src)

    def pad(self, src: Maps, pixels: int) -> Maps:
        return tuple(self._resample(Resampling.PAD, m, pixels) for m in src)

    def _resample(self, kind: Resampling, src: int, pad: int = 0, add: int = NONE) -> int:
        shape = _resampled(kind, self._net.shape((src,)), pad)
        dst = self._net.new_map(shape.channels, shape.height, shape.width)
        self._net.emit(Operator(Code.RESAMPLE, dst, (src,), add=add, kind=kind, pad=pad))
        return dst


def _plain_size(given: MapShape, pixels: int, pad: int) -> tuple[int, int]:
    return given.height + 2 * pad - pixels + 1, given.width + 2 * pad - pixels + 1


def _doubled(given: MapShape) -> tuple[int, int]:
    return 2 * given.height, 2 * given.width


def _resampled(kind: Resampling, given: MapShape, pad: int) -> MapShape:
    if kind is Resampling.PAD:
        return MapShape(given.channels, given.height + 2 * pad, given.width + 2 * pad)
    if kind in (Resampling.NEAREST_UP, Resampling.FIR_UP):
        return MapShape(given.channels, *_doubled(given))
    channels = 4 * given.channels if kind is Resampling.SPACE_TO_DEPTH else given.channels
    return MapShape(channels, given.height // 2, given.width // 2)
