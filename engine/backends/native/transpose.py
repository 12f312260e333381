"""A classifier's log-probability and its input gradient as one program of the CPU engine.

Each block is lowered forwards and leaves behind how its gradient is lowered, which is emitted in reverse order. The
gradient of a convolution is one with the kernel turned and its channels exchanged, that of a 3x3 one of stride 2 a
transposed 4x4 one whose last row and column are zeros: weights of other names, which gradient_weights makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from engine.backends.native.program import NONE, Builder, Code, Mode, Operator, Program, Resampling
from engine.errors import BackendError
from engine.networks import config as c
from engine.networks.config import ClassifierConfig, size_after

TURNED, STRIDED = ".turned", ".strided"
"""What is put behind a weight's name for the gradient's."""

_ACTIVATIONS = {c.Activation.NONE: 0, c.Activation.SILU: 1, c.Activation.RELU: 2}
_GROUP = 0

Backward = Callable[[int, int], int]
"""(gradient of the result, map to add or NONE) -> gradient of the input."""


def build_gradient(config: ClassifierConfig) -> Program:
    """x_t -> d (factor * log p(label)) / d x_t, and log p. Columns of the rows: time projections, label, factor.

    Raises BackendError for a block that the engine has no gradient of.
    """
    lowering = _Lowering(config)
    for index, block in enumerate(config.blocks):
        lowering.lower(f"blocks.{index}", block)
    return lowering.build()


def gradient_weights(program: Program, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A classifier's state dict and the weights that only its gradient has."""
    made = dict(state)
    for weight in program.weights:
        if (same := state.get(weight.name)) is not None and same.shape == weight.shape[: same.ndim]:
            # A linear layer is a 1x1 convolution.
            made[weight.name] = same.reshape(*same.shape, *[1] * (len(weight.shape) - same.ndim))
        for ending, make in ((TURNED, _turn), (STRIDED, _pad)):
            if weight.name.endswith(ending) and (given := state.get(weight.name.removesuffix(ending))) is not None:
                made[weight.name] = make(given).reshape(weight.shape)
    return made


def _turn(weight: Tensor) -> Tensor:
    """[Cout, Cin, k, k] or [Cout, Cin] -> [Cin, Cout, k, k]."""
    kernel = weight if weight.ndim == 4 else weight[:, :, None, None]
    return kernel.flip(2, 3).transpose(0, 1).contiguous()


def _pad(weight: Tensor) -> Tensor:
    """[Cout, Cin, 3, 3] -> [Cout, Cin, 4, 4]."""
    return F.pad(weight, (0, 1, 0, 1))


@dataclass(frozen=True, slots=True)
class _Norm:
    """Of a group norm: what its operator and its gradient's share."""

    name: str
    groups: int
    eps: float
    activation: int
    row: int = NONE


class _Lowering:
    """h: the map that the blocks so far make. backward: their gradients, the last first."""

    def __init__(self, config: ClassifierConfig) -> None:
        self._config, self._net, self._row = config, Builder(), 0
        self._h = self._net.new_map(config.in_channels, *config.image_size)
        self._net.emit(Operator(Code.INPUT, self._h))
        self._backward: list[Backward] = []
        self._gradient = NONE

    def lower(self, name: str, block: c.Block) -> None:
        """One more block, whose weights are named `name`."""
        match block:
            case c.Conv():
                self._then(self._conv(name, self._h, block.out_channels, block.kernel))
            case c.ResBlock():
                self._res_block(name, block)
            case c.Attention():
                self._attend(name, block)
            case c.Downsample():
                self._downsample(name, block)
            case c.NormSiLU():
                norm = _Norm(f"{name}.norm", block.groups, block.eps, _activation(name, block.activation))
                self._then(self._normalise(_grouped(name, block.norm, norm), self._h))
            case c.AttentionPool():
                self._attention_pool(name, block)
            case c.AveragePool():
                self._classify(f"{name}.linear", self._tokens(NONE), block.out_features)
            case _:
                raise BackendError(f"the native engine has no gradient of {type(block).__name__}")

    def build(self) -> Program:
        if self._gradient == NONE:
            raise BackendError("the native engine has no gradient of a classifier without pooling at its end")
        gradient = self._gradient
        for backward in reversed(self._backward):
            gradient = backward(gradient, NONE)
        width = sum(self._config.projection_channels) + 2
        return self._net.build(self._config.in_channels, width, gradient)

    def _then(self, result: tuple[int, Backward]) -> None:
        self._h, backward = result
        self._backward.append(backward)

    def _take_row(self, count: int) -> int:
        first, self._row = self._row, self._row + count
        return first if count else NONE

    def _like(self, given: int) -> int:
        shape = self._net.shape((given,))
        return self._net.new_map(shape.channels, shape.height, shape.width)

    def _conv(
        self, name: str, src: int, channels: int, pixels: int, row: int = NONE, add: int = NONE
    ) -> tuple[int, Backward]:
        """A convolution of stride 1 that keeps the size; a linear layer where pixels is 1."""
        net, given = self._net, self._net.shape((src,))
        if pixels % 2 == 0 or pixels > 7:
            raise BackendError(f"{name} has a kernel of {pixels}; the native engine has gradients of 1, 3, 5 and 7")
        forward = Operator(
            Code.CONV,
            net.new_map(channels, given.height, given.width),
            (src,),
            add=add,
            weight=net.weight(f"{name}.weight", channels, given.channels, pixels, pixels),
            bias=net.weight(f"{name}.bias", channels),
            row=row,
            kernel=pixels,
            stride=1,
            pad=pixels // 2,
        )
        net.emit(forward)

        def backward(gradient: int, add: int) -> int:
            turned = net.weight(f"{name}.weight{TURNED}", given.channels, channels, pixels, pixels)
            dst = self._like(src)
            net.emit(replace(forward, dst=dst, src=(gradient,), add=add, weight=turned, bias=NONE, row=NONE))
            return dst

        return forward.dst, backward

    def _normalise(self, norm: _Norm, src: int) -> tuple[int, Backward]:
        net, channels = self._net, self._net.shape((src,)).channels
        forward = Operator(
            Code.NORM,
            self._like(src),
            (src,),
            weight=net.weight(f"{norm.name}.weight", channels),
            bias=net.weight(f"{norm.name}.bias", channels),
            row=norm.row,
            kind=_GROUP,
            groups=norm.groups or channels,
            activation=norm.activation,
            eps=norm.eps,
        )
        net.emit(forward)

        def backward(gradient: int, add: int) -> int:
            dst = self._like(src)
            net.emit(replace(forward, code=Code.NORM_GRADIENT, dst=dst, src=(src, gradient), add=add))
            return dst

        return forward.dst, backward

    def _average(self, src: int) -> tuple[int, Backward]:
        """Of 2 x 2 pixels; its gradient repeats a quarter."""
        net, shape = self._net, self._net.shape((src,))
        self._require_even("an average", src)
        dst = net.new_map(shape.channels, shape.height // 2, shape.width // 2)
        net.emit(Operator(Code.RESAMPLE, dst, (src,), kind=Resampling.AVERAGE_DOWN))

        def backward(gradient: int, add: int) -> int:
            repeated = self._like(src)
            net.emit(Operator(Code.RESAMPLE, repeated, (gradient,), kind=Resampling.NEAREST_UP, scale=0.25))
            return self._sum(repeated, add)

        return dst, backward

    def _sum(self, first: int, second: int) -> int:
        if second == NONE:
            return first
        dst = self._like(first)
        self._net.emit(Operator(Code.ADD, dst, (first, second)))
        return dst

    def _require_even(self, what: str, src: int) -> None:
        shape = self._net.shape((src,))
        if shape.height % 2 or shape.width % 2:
            raise BackendError(f"the native engine has no gradient of {what} of {shape.height}x{shape.width} pixels")

    def _res_block(self, name: str, block: c.ResBlock) -> None:
        if block.conv_first or block.output_scale != 1 or block.resample is c.Resample.UP or block.fir:
            raise BackendError(f"the native engine has no gradient of {name}, a ResBlock of another family")
        x, row, act = self._h, self._take_row(block.projection_channels), _activation(name, block.activation)
        first = _grouped(name, block.norm, _Norm(f"{name}.norm1", block.groups, block.eps, act))
        groups = block.groups if block.groups_out is None else block.groups_out
        added, modulated = (NONE, row) if block.scale_shift else (row, NONE)
        second = _Norm(f"{name}.norm2", groups, block.eps, act, modulated)
        h, norm1_back = self._normalise(first, x)
        halves: list[Backward] = []
        shortcut = x
        if block.resample is not None:
            h, half = self._average(h)
            shortcut, other = self._average(x)
            halves = [half, other]
        h, conv1_back = self._conv(f"{name}.conv1", h, block.out_channels, 3, row=added)
        h, norm2_back = self._normalise(second, h)
        shortcut_back: Backward | None = None
        if block.in_channels != block.out_channels or block.has_shortcut:
            shortcut, shortcut_back = self._conv(f"{name}.shortcut", shortcut, block.out_channels, 1)
        h, conv2_back = self._conv(f"{name}.conv2", h, block.out_channels, 3, add=shortcut)

        def backward(gradient: int, add: int) -> int:
            beside = gradient if shortcut_back is None else shortcut_back(gradient, NONE)
            inner = conv1_back(norm2_back(conv2_back(gradient, NONE), NONE), NONE)
            if halves:
                inner, beside = halves[0](inner, NONE), halves[1](beside, NONE)
            return norm1_back(inner, self._sum(beside, add))

        self._then((h, backward))

    def _attend(self, name: str, block: c.Attention) -> None:
        if block.memory or block.cosine_scale or block.adds_to_norm or block.output_scale != 1:
            raise BackendError(f"the native engine has no gradient of {name}, an attention of another family")
        x, inner = self._h, block.heads * block.head_dim
        norm = _grouped(name, block.norm, _Norm(f"{name}.norm", block.groups, block.eps, 0))
        normed, norm_back = self._normalise(norm, x)
        qkv, qkv_back = self._conv(f"{name}.qkv", normed, 3 * inner, 1)
        mixed, mixed_back = self._mix(qkv, block.heads, block.head_dim)
        h, out_back = self._conv(f"{name}.out", mixed, block.channels, 1, add=x)

        def backward(gradient: int, add: int) -> int:
            of_norm = qkv_back(mixed_back(out_back(gradient, NONE), NONE), NONE)
            return norm_back(of_norm, self._sum(gradient, add))

        self._then((h, backward))

    def _mix(self, qkv: int, heads: int, dim: int) -> tuple[int, Backward]:
        net, shape = self._net, self._net.shape((qkv,))
        dst = net.new_map(heads * dim, shape.height, shape.width)
        net.emit(Operator(Code.ATTENTION, dst, (qkv,), heads=heads, dim=dim, scale=0.0))

        def backward(gradient: int, _add: int) -> int:
            made = self._like(qkv)
            net.emit(Operator(Code.ATTENTION_GRADIENT, made, (qkv, gradient), heads=heads, dim=dim, scale=0.0))
            return made

        return dst, backward

    def _downsample(self, name: str, block: c.Downsample) -> None:
        if not block.conv:
            return self._then(self._average(self._h))
        net, src, given = self._net, self._h, self._net.shape((self._h,))
        self._require_even(name, src)
        if block.kernel != 3 or block.pads_end:
            raise BackendError(f"the native engine has no gradient of {name}, a strided convolution of another family")
        channels = block.out_channels or block.channels
        dst = net.new_map(channels, size_after(block, given.height), size_after(block, given.width))
        weight = net.weight(f"{name}.conv.weight", channels, given.channels, 3, 3)
        bias = net.weight(f"{name}.conv.bias", channels)
        net.emit(Operator(Code.CONV, dst, (src,), weight=weight, bias=bias, kernel=3, stride=2, pad=1))

        def backward(gradient: int, add: int) -> int:
            strided = net.weight(f"{name}.conv.weight{STRIDED}", channels, given.channels, 4, 4)
            made = self._like(src)
            net.emit(
                Operator(
                    Code.CONV, made, (gradient,), add=add, weight=strided, kernel=4, stride=2, pad=1,
                    mode=Mode.TRANSPOSED,
                )
            )  # fmt: skip
            return made

        return self._then((dst, backward))

    def _tokens(self, learned: int) -> int:
        """The last map as tokens, their mean in front."""
        net, src, shape = self._net, self._h, self._net.shape((self._h,))
        dst = net.new_map(shape.channels, 1, shape.height * shape.width + 1)
        net.emit(Operator(Code.TOKENS, dst, (src,), weight=learned))

        def backward(gradient: int, _add: int) -> int:
            made = self._like(src)
            net.emit(Operator(Code.PIXELS, made, (gradient,)))
            return made

        self._then((dst, backward))
        return dst

    def _attention_pool(self, name: str, block: c.AttentionPool) -> None:
        shape = self._net.shape((self._h,))
        learned = self._net.weight(f"{name}.position", shape.channels, shape.height * shape.width + 1)
        inner = block.heads * block.head_dim
        self._then(self._conv(f"{name}.qkv", self._tokens(learned), 3 * inner, 1))
        self._then(self._mix(self._h, block.heads, block.head_dim))
        self._classify(f"{name}.out", self._h, block.out_features)

    def _classify(self, name: str, tokens: int, classes: int) -> None:
        """Logits of the first token, and the gradient at the tokens."""
        net, shape = self._net, self._net.shape((tokens,))
        self._gradient = self._like(tokens)
        net.emit(
            Operator(
                Code.CLASSIFY,
                self._gradient,
                (tokens,),
                weight=net.weight(f"{name}.weight", classes, shape.channels),
                bias=net.weight(f"{name}.bias", classes),
                row=sum(self._config.projection_channels),
                groups=classes,
            )
        )


def _activation(name: str, activation: c.Activation) -> int:
    if activation not in _ACTIVATIONS:
        raise BackendError(f"the native engine has no gradient of {name}'s {activation.value}")
    return _ACTIVATIONS[activation]


def _grouped(name: str, kind: c.Norm, norm: _Norm) -> _Norm:
    if kind is not c.Norm.GROUP:
        raise BackendError(f"the native engine has no gradient of {name}'s {kind.value} norm")
    return norm


def unsupported(config: ClassifierConfig) -> str | None:
    """Why the engine has no gradient of this classifier, or None."""
    try:
        build_gradient(config)
    except BackendError as error:
        return str(error)
    return None
