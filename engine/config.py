"""The network as data: a U-Net or classifier is a list of blocks that one short loop runs.

A block list is a straight-line program over one feature map h and a stack of skip connections: Push saves h,
Pop concatenates the last saved map behind h. All values are frozen and JSON-serialisable.
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


@dataclass(frozen=True, slots=True)
class Conv:
    """k x k convolution, zero padding k // 2."""

    in_channels: int
    out_channels: int
    kernel: int = 3


@dataclass(frozen=True, slots=True)
class ResBlock:
    """norm, SiLU, (resample), conv, time projection, norm, SiLU, conv, plus the shortcut.

    scale_shift: the time projection is (scale, shift) on the second norm rather than added before it.
    resample: applied after the first SiLU and on the shortcut. A 1x1 convolution sits on the shortcut where
    the channel counts differ.
    """

    in_channels: int
    out_channels: int
    scale_shift: bool
    resample: Resample | None = None
    groups: int = 32
    eps: float = 1e-5

    @property
    def projection_channels(self) -> int:
        return self.out_channels * (2 if self.scale_shift else 1)


@dataclass(frozen=True, slots=True)
class Attention:
    """h + out(attention(qkv(norm(h)))) over all pixels; qkv rows are ordered q, k, v, each heads x head_dim."""

    channels: int
    heads: int
    head_dim: int
    groups: int = 32
    eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Downsample:
    """Halves height and width: 3x3 convolution of stride 2, or 2x2 average."""

    channels: int
    conv: bool


@dataclass(frozen=True, slots=True)
class Upsample:
    """Doubles height and width by nearest repetition, then a 3x3 convolution if conv."""

    channels: int
    conv: bool


@dataclass(frozen=True, slots=True)
class NormSiLU:
    """SiLU(GroupNorm(h))."""

    channels: int
    groups: int = 32
    eps: float = 1e-5


@dataclass(frozen=True, slots=True)
class Push:
    """Save h on the skip stack."""


@dataclass(frozen=True, slots=True)
class Pop:
    """h = concat(h, last saved map) along channels."""


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


Block = Conv | ResBlock | Attention | Downsample | Upsample | NormSiLU | Push | Pop | AttentionPool | AveragePool

_BLOCK_TYPES: dict[str, type[Block]] = {
    "conv": Conv,
    "res_block": ResBlock,
    "attention": Attention,
    "downsample": Downsample,
    "upsample": Upsample,
    "norm_silu": NormSiLU,
    "push": Push,
    "pop": Pop,
    "attention_pool": AttentionPool,
    "average_pool": AveragePool,
}
_BLOCK_NAMES = {cls: name for name, cls in _BLOCK_TYPES.items()}


def block_to_dict(block: Block) -> dict[str, Any]:
    """JSON form of a block: its field values and its type's name."""
    values = {f.name: getattr(block, f.name) for f in dataclasses.fields(block)}
    return {"type": _BLOCK_NAMES[type(block)]} | {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}


def block_from_dict(data: dict[str, Any]) -> Block:
    """The block that block_to_dict wrote; raises ConfigError for an unknown type or wrong fields."""
    values = dict(data)
    name = values.pop("type", None)
    cls = _BLOCK_TYPES.get(str(name))
    if cls is None:
        raise ConfigError(f"unknown block type {name!r}; known: {', '.join(_BLOCK_TYPES)}")
    if isinstance(values.get("resample"), str):
        values["resample"] = Resample(values["resample"])
    try:
        return cls(**values)
    except TypeError as error:
        raise ConfigError(f"block {name!r} has wrong fields: {error}") from error


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Everything that defines the network's function except its weights.

    in_channels, out_channels: of x_t and of the network's result (out = 2 in for a learned range).
    image_size: (height, width) in pixels. embed_channels: width of the sinusoidal embedding; time_channels:
    width of the time MLP. num_classes: rows of the label table, or None. null_class: the row that means
    "no label". cond_channels: channels of the condition image, concatenated behind x_t.
    """

    in_channels: int
    out_channels: int
    image_size: tuple[int, int]
    embed_channels: int
    time_channels: int
    blocks: tuple[Block, ...]
    num_classes: int | None = None
    null_class: int | None = None
    cond_channels: int = 0

    def __post_init__(self) -> None:
        check_blocks(self.blocks, self.in_channels + self.cond_channels, self.out_channels)
        factor = 2 ** count_downsamplings(self.blocks)
        if any(size <= 0 or size % factor for size in self.image_size):
            raise ConfigError(
                f"image size {self.image_size[0]}x{self.image_size[1]} does not fit a network that halves it "
                f"{count_downsamplings(self.blocks)} times; give a multiple of {factor} with --image-size"
            )
        if self.null_class is not None and not 0 <= self.null_class < (self.num_classes or 0):
            raise ConfigError(
                f"null class {self.null_class} is outside the {self.num_classes or 0} classes of this network; "
                "give a row of its label table with --null-class"
            )

    @property
    def projection_channels(self) -> tuple[int, ...]:
        """Width of each ResBlock's time projection, in block order."""
        return tuple(b.projection_channels for b in self.blocks if isinstance(b, ResBlock))

    def to_dict(self) -> dict[str, Any]:
        return _config_to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UNetConfig:
        return cls(**_config_fields(data, cls))


@dataclass(frozen=True, slots=True)
class ClassifierConfig:
    """A noise-conditioned classifier: x_t and timestep to logits over num_classes. Fields as in UNetConfig."""

    in_channels: int
    image_size: tuple[int, int]
    embed_channels: int
    time_channels: int
    blocks: tuple[Block, ...]
    num_classes: int

    def __post_init__(self) -> None:
        check_blocks(self.blocks, self.in_channels, self.num_classes)

    @property
    def projection_channels(self) -> tuple[int, ...]:
        """Width of each ResBlock's time projection, in block order."""
        return tuple(b.projection_channels for b in self.blocks if isinstance(b, ResBlock))

    def to_dict(self) -> dict[str, Any]:
        return _config_to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClassifierConfig:
        return cls(**_config_fields(data, cls))


def _config_to_dict(config: UNetConfig | ClassifierConfig) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    return values | {
        "image_size": list(config.image_size),
        "blocks": [block_to_dict(b) for b in config.blocks],
    }


def _config_fields(data: dict[str, Any], cls: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(data) - names:
        raise ConfigError(f"unknown {cls.__name__} fields: {', '.join(sorted(unknown))}")
    if missing := {"blocks", "image_size"} - set(data):
        raise ConfigError(f"{cls.__name__} lacks {', '.join(sorted(missing))}")
    height, width = data["image_size"]
    blocks = tuple(block_from_dict(b) for b in data["blocks"])
    return dict(data) | {"image_size": (int(height), int(width)), "blocks": blocks}


def count_downsamplings(blocks: tuple[Block, ...]) -> int:
    """How often the block list halves the resolution."""
    return sum(isinstance(b, Downsample) or (isinstance(b, ResBlock) and b.resample is Resample.DOWN) for b in blocks)


def check_blocks(blocks: tuple[Block, ...], in_channels: int, out_channels: int) -> None:
    """Walk the program's channel counts; raises ConfigError at the first block that does not fit its input."""
    channels, stack = in_channels, []
    for index, block in enumerate(blocks):
        if isinstance(block, Push):
            stack.append(channels)
            continue
        if isinstance(block, Pop):
            if not stack:
                raise ConfigError(f"block {index} takes a skip connection and none is left")
            channels += stack.pop()
            continue
        wanted = block.in_channels if isinstance(block, (Conv, ResBlock)) else block.channels
        if wanted != channels:
            raise ConfigError(f"block {index} ({type(block).__name__}) takes {wanted} channels, got {channels}")
        if isinstance(block, (ResBlock, Attention, NormSiLU)) and channels % block.groups:
            raise ConfigError(f"block {index}: {channels} channels cannot be split into {block.groups} groups")
        if isinstance(block, (Conv, ResBlock)):
            channels = block.out_channels
        elif isinstance(block, (AttentionPool, AveragePool)):
            channels = block.out_features
    if channels != out_channels or stack:
        raise ConfigError(
            f"the block list ends with {channels} channels and {len(stack)} unused skip connections; "
            f"expected {out_channels} and none"
        )
