"""The blocks of a network: frozen values, one class an operator, with a JSON form.

Field values that are enums are written as their strings. A block's weights are named in engine.networks.layers.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from typing import Any

from engine.errors import ConfigError


class Resample(Enum):
    """How a block changes resolution: by 2x nearest repetition, or by 2x2 average."""

    UP = "up"
    DOWN = "down"


class Norm(Enum):
    """Normalisation: over groups of channels; at each pixel over channels by root mean square or by mean and variance
    (LAYER); AFFINE only scales and shifts (a folded batch norm); NONE is the identity and holds no weights.

    Instance norm is GROUP with one channel a group, which `groups` = 0 says whatever the number of channels.
    """

    GROUP = "group"
    RMS = "rms"
    LAYER = "layer"
    AFFINE = "affine"
    NONE = "none"


class Activation(Enum):
    """Pointwise non-linearities; GELU is the exact one (erf), NONE the identity."""

    SILU = "silu"
    RELU = "relu"
    MISH = "mish"
    GELU = "gelu"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Conv:
    """k x k convolution, zero padding k // 2."""

    in_channels: int
    out_channels: int
    kernel: int = 3


@dataclass(frozen=True, slots=True)
class ResBlock:
    """norm, activation, (resample), conv, time projection, norm, activation, conv, plus the shortcut.

    conv_first: conv, norm, time projection, activation, conv, norm, activation instead. scale_shift: the projection is
    (scale, shift) on a norm's result (the second norm, or the first if conv_first) rather than added before the norm.
    has_projection: False for a block that does not see the timestep. resample: applied after the first activation and
    on the shortcut. A 1x1 convolution sits on the shortcut where the channel counts differ or has_shortcut says so.
    output_scale: factor on the sum. groups_out: groups of the second norm, if they differ. fir: resampling filters with
    (1, 3, 3, 1) rather than repeating or averaging.
    """

    in_channels: int
    out_channels: int
    scale_shift: bool
    resample: Resample | None = None
    groups: int = 32
    eps: float = 1e-5
    norm: Norm = Norm.GROUP
    activation: Activation = Activation.SILU
    conv_first: bool = False
    has_projection: bool = True
    has_shortcut: bool = False
    output_scale: float = 1.0
    groups_out: int | None = None
    fir: bool = False

    @property
    def projection_channels(self) -> int:
        if not self.has_projection:
            return 0
        return self.out_channels * (2 if self.scale_shift else 1)


@dataclass(frozen=True, slots=True)
class Attention:
    """h + out(attention(qkv(norm(h)))) over all pixels; qkv rows are ordered q, k, v, each heads x head_dim.

    memory: learned keys and values a head, in front of the pixels'. cosine_scale: each channel of q and k has unit
    length over the pixels (not each pixel over its channels), and the scores this factor. adds_to_norm: the residual
    is norm(h), not h.
    output_scale: factor on the sum. Weights: norm, qkv, out, memory [2, heads, memory, head_dim].
    """

    channels: int
    heads: int
    head_dim: int
    groups: int = 32
    eps: float = 1e-5
    norm: Norm = Norm.GROUP
    memory: int = 0
    cosine_scale: float | None = None
    adds_to_norm: bool = False
    output_scale: float = 1.0


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """h + out_norm(out(linear_attention(qkv(norm(h))))) over all pixels (Shen et al., Efficient Attention, 2018).

    memory: as in Attention, [2, heads, memory, head_dim]. divides_values: values are divided by the number of pixels.
    groups, eps belong to both norms. Weights: norm, qkv, out, out_norm, memory.
    """

    channels: int
    heads: int
    head_dim: int
    groups: int = 32
    eps: float = 1e-5
    norm: Norm = Norm.GROUP
    out_norm: Norm = Norm.NONE
    memory: int = 0
    divides_values: bool = False


@dataclass(frozen=True, slots=True)
class Downsample:
    """Halves height and width: k x k convolution of stride 2, or 2x2 average (rounded down at odd sizes).

    Zero padding: (kernel - 1) // 2 on every side, or only at the right and bottom (pads_end: by 1). out_channels: of
    the convolution, if not `channels`.
    """

    channels: int
    conv: bool
    kernel: int = 3
    pads_end: bool = False
    out_channels: int | None = None


@dataclass(frozen=True, slots=True)
class Upsample:
    """Doubles height and width by nearest repetition, then a 3x3 convolution if conv."""

    channels: int
    conv: bool


@dataclass(frozen=True, slots=True)
class TransposedConv:
    """Doubles height and width: 4x4 transposed convolution, stride 2, padding 1."""

    channels: int


@dataclass(frozen=True, slots=True)
class SpaceToDepth:
    """[B, C, H, W] to [B, 4C, H/2, W/2]; channel c*4 + 2*row + column of each 2x2 patch."""

    channels: int


@dataclass(frozen=True, slots=True)
class NormSiLU:
    """activation(norm(h)); SiLU(GroupNorm(h)) unless said otherwise."""

    channels: int
    groups: int = 32
    eps: float = 1e-5
    norm: Norm = Norm.GROUP
    activation: Activation = Activation.SILU


@dataclass(frozen=True, slots=True)
class Pad:
    """Zeros around the image, `pixels` on every side; a negative number crops."""

    channels: int
    pixels: int


@dataclass(frozen=True, slots=True)
class Push:
    """Save h on the skip stack."""


@dataclass(frozen=True, slots=True)
class Pop:
    """h = concat(h, last saved map) along channels."""


@dataclass(frozen=True, slots=True)
class ImageSave:
    """Keep h as the side image: a second map of few channels that runs beside h, as in NCSN++ (Song et al., 2021)."""


@dataclass(frozen=True, slots=True)
class ImageIn:
    """Halve the side image with the filter (1, 3, 3, 1); add its 1x1 convolution to h, which has `channels`."""

    image_channels: int
    channels: int


@dataclass(frozen=True, slots=True)
class ImageOut:
    """side image = 3x3 conv(SiLU(GroupNorm(h))) plus, unless is_first, the side image at double resolution (filtered
    with (1, 3, 3, 1)); h stays."""

    channels: int
    image_channels: int
    groups: int = 32
    eps: float = 1e-5
    is_first: bool = False


@dataclass(frozen=True, slots=True)
class ImageAdd:
    """h plus the side image at double resolution, filtered with (1, 3, 3, 1)."""


@dataclass(frozen=True, slots=True)
class AttentionPool:
    """CLIP-style pooling: attention over [mean, pixels], a learned position each; the mean's token is the result."""

    channels: int
    heads: int
    head_dim: int
    tokens: int
    out_features: int


@dataclass(frozen=True, slots=True)
class AveragePool:
    """Mean over pixels, then a linear layer."""

    channels: int
    out_features: int


Block = (
    Conv
    | ResBlock
    | Attention
    | LinearAttention
    | Downsample
    | Upsample
    | TransposedConv
    | SpaceToDepth
    | NormSiLU
    | Pad
    | Push
    | Pop
    | ImageSave
    | ImageIn
    | ImageOut
    | ImageAdd
    | AttentionPool
    | AveragePool
)

_BLOCK_TYPES: dict[str, type[Block]] = {
    "conv": Conv,
    "res_block": ResBlock,
    "attention": Attention,
    "linear_attention": LinearAttention,
    "downsample": Downsample,
    "upsample": Upsample,
    "transposed_conv": TransposedConv,
    "space_to_depth": SpaceToDepth,
    "norm_silu": NormSiLU,
    "pad": Pad,
    "push": Push,
    "pop": Pop,
    "image_save": ImageSave,
    "image_in": ImageIn,
    "image_out": ImageOut,
    "image_add": ImageAdd,
    "attention_pool": AttentionPool,
    "average_pool": AveragePool,
}
_BLOCK_NAMES = {cls: name for name, cls in _BLOCK_TYPES.items()}
_ENUMS: dict[str, type[Enum]] = {"resample": Resample, "norm": Norm, "out_norm": Norm, "activation": Activation}


def block_to_dict(block: Block) -> dict[str, Any]:
    """JSON form of a block: its type's name and the values that are not the defaults."""
    values = {f.name: getattr(block, f.name) for f in dataclasses.fields(block) if getattr(block, f.name) != f.default}
    return {"type": _BLOCK_NAMES[type(block)]} | {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}


def block_from_dict(data: dict[str, Any]) -> Block:
    """The block that block_to_dict wrote; raises ConfigError for an unknown type, field or value."""
    values = dict(data)
    name = values.pop("type", None)
    cls = _BLOCK_TYPES.get(str(name))
    if cls is None:
        raise ConfigError(f"unknown block type {name!r}; known: {', '.join(_BLOCK_TYPES)}")
    try:
        for field, enum in _ENUMS.items():
            if isinstance(values.get(field), str):
                values[field] = enum(values[field])
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"block {name!r} has wrong fields: {error}") from error
