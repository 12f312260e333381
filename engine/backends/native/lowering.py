"""Each block of a U-Net or classifier as operators of the CPU engine.

What engine.networks.unet.run_blocks keeps as tensors are operands here: concatenating two maps only names both, and a
copy is made where an operator takes one map, or where there would be a third. Biases, time projections, residuals, 1x1
shortcuts and factors are part of the convolution or norm before them.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.backends.native.program import NONE, Builder, Code, Maps, MapShape, Mode, Operator, Program, Resampling
from engine.errors import BackendError
from engine.networks import config as c
from engine.networks.config import ClassifierConfig, UNetConfig, size_after

MOST_KERNEL = 7

_NORMS = {c.Norm.GROUP: 0, c.Norm.RMS: 1, c.Norm.LAYER: 2, c.Norm.AFFINE: 3, c.Norm.NONE: 4}
_ACTIVATIONS = {
    c.Activation.NONE: 0,
    c.Activation.SILU: 1,
    c.Activation.RELU: 2,
    c.Activation.MISH: 3,
    c.Activation.GELU: 4,
}
_LABEL_AND_FACTOR = 2
_DOUBLES = (Resampling.NEAREST_UP, Resampling.FIR_UP)


def build_program(config: UNetConfig | ClassifierConfig) -> Program:
    """The program of a network; raises BackendError for a block that the engine does not have.

    A classifier's rows have two columns more, label and factor. It gives log p(label), and as its output the gradient
    of factor * log p(label) at the tokens that its last layer reads: engine.backends.native.transpose takes it on from
    there to the image.
    """
    lowering = _Lowering(config)
    for index, block in enumerate(config.blocks):
        lowering.lower(f"blocks.{index}", block)
    return lowering.build()


@dataclass(frozen=True, slots=True)
class _Norm:
    """A norm and the activation behind it."""

    norm: c.Norm
    groups: int
    eps: float
    activation: c.Activation = c.Activation.NONE


@dataclass(frozen=True, slots=True)
class _Then:
    """What follows in the same operator: rows' columns, a map to add, a 1x1 convolution of `extra` to add, a factor."""

    row: int = NONE
    add: int = NONE
    extra: Maps = ()
    extra_name: str = ""
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class _Kernel:
    """A convolution's window; pad None: half of it. size: (height, width) of the result, None: without stride."""

    pixels: int = 3
    stride: int = 1
    pad: int | None = None
    mode: Mode = Mode.PLAIN
    size: tuple[int, int] | None = None


_ALONE, _THREE, _ONE = _Then(), _Kernel(), _Kernel(1)


class _Lowering:
    """The state of engine.networks.unet.run_blocks, with operands for tensors."""

    def __init__(self, config: UNetConfig | ClassifierConfig) -> None:
        self._config, self._net, self._row = config, Builder(), 0
        self._channels = config.in_channels + (config.cond_channels if isinstance(config, UNetConfig) else 0)
        first = self._net.new_map(self._channels, *config.image_size)
        self._net.emit(Operator(Code.INPUT, first))
        self._h: Maps = (first,)
        self._image = first
        self._skips: list[Maps] = []

    def build(self) -> Program:
        width = sum(self._config.projection_channels)
        width += _LABEL_AND_FACTOR if isinstance(self._config, ClassifierConfig) else 0
        return self._net.build(self._channels, width, self._net.join(self._h))

    def lower(self, name: str, block: c.Block) -> None:
        """One more block, whose weights are named `name`."""
        h = self._h
        match block:
            case c.Push():
                self._skips.append(h)
            case c.Pop():
                self._h = self._concatenate(h, self._skips.pop())
            case c.ImageSave() | c.ImageIn() | c.ImageOut() | c.ImageAdd():
                self._lower_image(name, block)
            case c.Conv():
                self._h = (self._conv(name, h, block.out_channels, _Kernel(block.kernel)),)
            case c.ResBlock():
                row = self._take_row(block.projection_channels)
                lower = self._conv_first if block.conv_first else self._norm_first
                self._h = lower(name, block, row)
            case c.Attention() | c.LinearAttention():
                self._h = self._attend(name, block)
            case c.Downsample(conv=False):
                self._h = self._resample(Resampling.AVERAGE_DOWN, h)
            case c.Downsample():
                self._h = self._downsample(name, block)
            case c.Upsample(conv=False):
                self._h = self._resample(Resampling.NEAREST_UP, h)
            case c.Upsample():
                self._h = (self._conv(f"{name}.conv", h, block.channels, _Kernel(mode=Mode.UPSAMPLED)),)
            case c.TransposedConv():
                self._h = (self._conv(name, h, block.channels, _Kernel(4, 2, 1, Mode.TRANSPOSED)),)
            case c.SpaceToDepth():
                self._h = self._resample(Resampling.SPACE_TO_DEPTH, h)
            case c.NormSiLU():
                norm = _Norm(block.norm, block.groups, block.eps, block.activation)
                self._h = self._normalise(f"{name}.norm", h, norm)
            case c.Pad():
                self._h = tuple(self._resample_map(Resampling.PAD, m, pad=block.pixels) for m in h)
            case c.AttentionPool() if isinstance(self._config, ClassifierConfig):
                self._h = _pool_by_attention(self, name, block)
            case c.AveragePool() if isinstance(self._config, ClassifierConfig):
                self._h = _classify(self, f"{name}.linear", _make_tokens(self), block.out_features)
            case _:
                raise BackendError(f"the native engine has no {type(block).__name__}; choose another backend")

    def _concatenate(self, first: Maps, second: Maps) -> Maps:
        if len(first) + len(second) <= 2:
            return first + second
        return self._net.join(first), self._net.join(second)

    def _take_row(self, count: int) -> int:
        """The first column of the next time projection; NONE for a block without one."""
        first, self._row = self._row, self._row + count
        return first if count else NONE

    def _conv(self, name: str, src: Maps, channels: int, kernel: _Kernel = _THREE, then: _Then = _ALONE) -> int:
        net, k, given = self._net, kernel.pixels, self._net.shape(src)
        if not 1 <= k <= MOST_KERNEL:
            raise BackendError(f"{name} has a kernel of {k}; the native engine has 1 to {MOST_KERNEL}")
        pad = k // 2 if kernel.pad is None else kernel.pad
        height, width = kernel.size or (_plain_size(given, k, pad) if kernel.mode is Mode.PLAIN else _doubled(given))
        is_transposed = kernel.mode is Mode.TRANSPOSED
        ends = (given.channels, channels) if is_transposed else (channels, given.channels)
        extra = then.extra_name
        operator = Operator(
            Code.CONV,
            net.new_map(channels, height, width),
            src,
            add=then.add,
            weight=net.weight(f"{name}.weight", *ends, k, k),
            bias=net.weight(f"{name}.bias", channels),
            row=then.row,
            kernel=k,
            stride=kernel.stride,
            pad=pad,
            mode=kernel.mode,
            extra=then.extra,
            extra_weight=self._one_by_one(extra, then.extra, channels) if extra else NONE,
            extra_bias=net.weight(f"{extra}.bias", channels) if extra else NONE,
            scale=then.scale,
        )
        net.emit(operator)
        return operator.dst

    def _one_by_one(self, name: str, src: Maps, channels: int) -> int:
        return self._net.weight(f"{name}.weight", channels, self._net.shape(src).channels, 1, 1)

    def _normalise(self, name: str, src: Maps, norm: _Norm, then: _Then = _ALONE) -> Maps:
        """The operand itself where nothing is left to do."""
        net, kind = self._net, norm.norm
        if kind is c.Norm.NONE and norm.activation is c.Activation.NONE and then == _ALONE:
            return src
        shape = net.shape(src)
        has_bias = kind in (c.Norm.GROUP, c.Norm.AFFINE)
        operator = Operator(
            Code.NORM,
            net.new_map(shape.channels, shape.height, shape.width),
            src,
            add=then.add,
            weight=NONE if kind is c.Norm.NONE else net.weight(f"{name}.weight", shape.channels),
            bias=net.weight(f"{name}.bias", shape.channels) if has_bias else NONE,
            row=then.row,
            kind=_NORMS[kind],
            groups=(norm.groups or shape.channels) if kind is c.Norm.GROUP else 0,
            activation=_ACTIVATIONS[norm.activation],
            scale=then.scale,
            eps=norm.eps,
        )
        net.emit(operator)
        return (operator.dst,)

    def _resample(self, kind: Resampling, src: Maps) -> Maps:
        """Each map on its own, because no resampling mixes channels of two."""
        return tuple(self._resample_map(kind, m) for m in src)

    def _resample_map(self, kind: Resampling, src: int, pad: int = 0, add: int = NONE) -> int:
        given = self._net.shape((src,))
        shape = _resampled(kind, given, pad)
        dst = self._net.new_map(shape.channels, shape.height, shape.width)
        self._net.emit(Operator(Code.RESAMPLE, dst, (src,), add=add, kind=kind, pad=pad))
        return dst

    def _norm_first(self, name: str, block: c.ResBlock, row: int) -> Maps:
        act, cout, shortcut = block.activation, block.out_channels, self._h
        h = self._normalise(f"{name}.norm1", self._h, _Norm(block.norm, block.groups, block.eps, act))
        kernel = _THREE
        if block.resample is not None:
            kind = _kind(block.resample, block.fir)
            shortcut = self._resample(kind, shortcut)
            if kind is Resampling.NEAREST_UP:
                kernel = _Kernel(mode=Mode.UPSAMPLED)
            else:
                h = self._resample(kind, h)
        added, modulated = (NONE, row) if block.scale_shift else (row, NONE)
        h = (self._conv(f"{name}.conv1", h, cout, kernel, _Then(row=added)),)
        h = self._normalise(f"{name}.norm2", h, _second_norm(block), _Then(row=modulated))
        if _has_shortcut(block):
            then = _Then(extra=shortcut, extra_name=f"{name}.shortcut", scale=block.output_scale)
        else:
            then = _Then(add=self._net.join(shortcut), scale=block.output_scale)
        return (self._conv(f"{name}.conv2", h, cout, _THREE, then),)

    def _conv_first(self, name: str, block: c.ResBlock, row: int) -> Maps:
        if block.resample is not None:
            raise BackendError(f"{name} resamples behind its convolution; choose another backend than native")
        cout = block.out_channels
        h: Maps = (self._conv(f"{name}.conv1", self._h, cout),)
        norm = _Norm(block.norm, block.groups, block.eps, block.activation)
        h = self._normalise(f"{name}.norm1", h, norm, _Then(row=row))
        h = (self._conv(f"{name}.conv2", h, cout),)
        if _has_shortcut(block):
            shortcut = self._conv(f"{name}.shortcut", self._h, cout, _ONE)
        else:
            shortcut = self._net.join(self._h)
        return self._normalise(f"{name}.norm2", h, _second_norm(block), _Then(add=shortcut, scale=block.output_scale))

    def _attend(self, name: str, block: c.Attention | c.LinearAttention) -> Maps:
        net, inner = self._net, block.heads * block.head_dim
        normed = self._normalise(f"{name}.norm", self._h, _Norm(block.norm, block.groups, block.eps))
        qkv = self._conv(f"{name}.qkv", normed, 3 * inner, _ONE)
        shape = net.shape((qkv,))
        memory = (2, block.heads, block.memory, block.head_dim)
        is_linear = isinstance(block, c.LinearAttention)
        operator = Operator(
            Code.LINEAR_ATTENTION if is_linear else Code.ATTENTION,
            net.new_map(inner, shape.height, shape.width),
            (qkv,),
            weight=net.weight(f"{name}.memory", *memory) if block.memory else NONE,
            heads=block.heads,
            dim=block.head_dim,
            memory=block.memory,
            scale=block.head_dim**-0.5 if isinstance(block, c.LinearAttention) else block.cosine_scale or 0.0,
            eps=_value_factor(block, shape),
        )
        net.emit(operator)
        if isinstance(block, c.Attention):
            residual = net.join(normed if block.adds_to_norm else self._h)
            then = _Then(add=residual, scale=block.output_scale)
            return (self._conv(f"{name}.out", (operator.dst,), block.channels, _ONE, then),)
        then = _Then(add=net.join(self._h))
        if block.out_norm is c.Norm.NONE:
            return (self._conv(f"{name}.out", (operator.dst,), block.channels, _ONE, then),)
        out = self._conv(f"{name}.out", (operator.dst,), block.channels, _ONE)
        return self._normalise(f"{name}.out_norm", (out,), _Norm(block.out_norm, block.groups, block.eps), then)

    def _downsample(self, name: str, block: c.Downsample) -> Maps:
        shape = self._net.shape(self._h)
        size = size_after(block, shape.height), size_after(block, shape.width)
        pad = 0 if block.pads_end else (block.kernel - 1) // 2
        kernel = _Kernel(block.kernel, 2, pad, size=size)
        return (self._conv(f"{name}.conv", self._h, block.out_channels or block.channels, kernel),)

    def _lower_image(self, name: str, block: c.ImageSave | c.ImageIn | c.ImageOut | c.ImageAdd) -> None:
        net = self._net
        match block:
            case c.ImageSave():
                self._image = net.join(self._h)
            case c.ImageIn():
                self._image = self._resample_map(Resampling.FIR_DOWN, self._image)
                then = _Then(add=net.join(self._h))
                self._h = (self._conv(name, (self._image,), block.channels, _ONE, then),)
            case c.ImageOut():
                norm = _Norm(c.Norm.GROUP, block.groups, block.eps, c.Activation.SILU)
                normed = self._normalise(f"{name}.norm", self._h, norm)
                added = self._conv(f"{name}.conv", normed, block.image_channels)
                is_first = block.is_first
                self._image = added if is_first else self._resample_map(Resampling.FIR_UP, self._image, add=added)
            case c.ImageAdd():
                self._h = (self._resample_map(Resampling.FIR_UP, self._image, add=net.join(self._h)),)


def _plain_size(given: MapShape, pixels: int, pad: int) -> tuple[int, int]:
    return given.height + 2 * pad - pixels + 1, given.width + 2 * pad - pixels + 1


def _doubled(given: MapShape) -> tuple[int, int]:
    return 2 * given.height, 2 * given.width


def _kind(resample: c.Resample, fir: bool) -> Resampling:
    if resample is c.Resample.UP:
        return Resampling.FIR_UP if fir else Resampling.NEAREST_UP
    return Resampling.FIR_DOWN if fir else Resampling.AVERAGE_DOWN


def _resampled(kind: Resampling, given: MapShape, pad: int) -> MapShape:
    if kind is Resampling.PAD:
        return MapShape(given.channels, given.height + 2 * pad, given.width + 2 * pad)
    if kind in _DOUBLES:
        return MapShape(given.channels, *_doubled(given))
    channels = 4 * given.channels if kind is Resampling.SPACE_TO_DEPTH else given.channels
    return MapShape(channels, given.height // 2, given.width // 2)


def _second_norm(block: c.ResBlock) -> _Norm:
    groups = block.groups if block.groups_out is None else block.groups_out
    return _Norm(block.norm, groups, block.eps, block.activation)


def _has_shortcut(block: c.ResBlock) -> bool:
    return block.in_channels != block.out_channels or block.has_shortcut


def _value_factor(block: c.Attention | c.LinearAttention, shape: MapShape) -> float:
    """What linear attention multiplies the pixels' values by."""
    if isinstance(block, c.Attention):
        return 0.0
    return 1.0 / (shape.height * shape.width) if block.divides_values else 1.0


def _make_tokens(lowering: _Lowering, position: int = NONE) -> int:
    """The pixels so far as tokens with their mean in front; position: the weight that is added to them."""
    net = lowering._net
    src = net.join(lowering._h)
    shape = net.shape((src,))
    tokens = net.new_map(shape.channels, 1, shape.height * shape.width + 1)
    net.emit(Operator(Code.TOKENS, tokens, (src,), weight=position))
    return tokens


def _pool_by_attention(lowering: _Lowering, name: str, block: c.AttentionPool) -> Maps:
    net, inner = lowering._net, block.heads * block.head_dim
    tokens = _make_tokens(lowering, net.weight(f"{name}.position", block.channels, block.tokens + 1))
    qkv = lowering._conv(f"{name}.qkv", (tokens,), 3 * inner, _ONE)
    mixed = net.new_map(inner, 1, block.tokens + 1)
    net.emit(Operator(Code.ATTENTION, mixed, (qkv,), heads=block.heads, dim=block.head_dim, scale=0.0))
    return _classify(lowering, f"{name}.out", mixed, block.out_features)


def _classify(lowering: _Lowering, name: str, tokens: int, classes: int) -> Maps:
    """Logits of the first token, log p of the rows' label, and the gradient at the tokens."""
    net, channels = lowering._net, lowering._net.shape((tokens,)).channels
    operator = Operator(
        Code.CLASSIFY,
        net.like(tokens),
        (tokens,),
        weight=net.weight(f"{name}.weight", classes, channels),
        bias=net.weight(f"{name}.bias", classes),
        row=sum(lowering._config.projection_channels),
        groups=classes,
    )
    net.emit(operator)
    return (operator.dst,)
