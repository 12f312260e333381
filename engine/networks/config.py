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
from engine.networks.blocks import (
    Activation,
    Attention,
    AttentionPool,
    AveragePool,
    Block,
    Conv,
    Downsample,
    ImageAdd,
    ImageIn,
    ImageOut,
    ImageSave,
    LinearAttention,
    Norm,
    NormSiLU,
    Pad,
    Pop,
    Push,
    Resample,
    ResBlock,
    SpaceToDepth,
    TransposedConv,
    Upsample,
    block_from_dict,
    block_to_dict,
)
from engine.networks.blocks.base import Shape, Shapes, SizeError

__all__ = [
    "Activation",
    "Attention",
    "AttentionPool",
    "AveragePool",
    "Block",
    "ClassifierConfig",
    "Conv",
    "Downsample",
    "EmbeddingOrder",
    "ImageAdd",
    "ImageIn",
    "ImageOut",
    "ImageSave",
    "LabelInput",
    "LinearAttention",
    "Norm",
    "NormSiLU",
    "Pad",
    "Pop",
    "Push",
    "ResBlock",
    "Resample",
    "SpaceToDepth",
    "TimeConfig",
    "TransposedConv",
    "UNetConfig",
    "Upsample",
]


class EmbeddingOrder(Enum):
    """How the sines and cosines of a time embedding are laid out; INTERLEAVED is sin, cos, sin, cos, ..."""

    COS_SIN = "cos_sin"
    SIN_COS = "sin_cos"
    INTERLEAVED = "interleaved"


class LabelInput(Enum):
    """What y is: a row of a learned table ([B] int64), a number embedded like a timestep ([B] float32), or a vector
    ([B, time_channels] float32)."""

    TABLE = "table"
    NUMBER = "number"
    VECTOR = "vector"


@dataclass(frozen=True, slots=True)
class TimeConfig:
    """How a timestep becomes the input of the time MLP, and the MLP's non-linearities.

    angles = scale * t * theta^(-i / (half - shift)), i < half; has_frequencies: 2 pi * t * (weights time.frequencies)
    instead, log t in place of t if takes_log, with t itself in front if keeps_timestep. table_rows: instead of angles,
    a learned row (weights time.table) for each of so many whole timesteps. activation: inside the MLP;
    projection_activation: between the MLP and the blocks' projections.
    """

    order: EmbeddingOrder = EmbeddingOrder.COS_SIN
    shift: float = 0.0
    theta: float = 10000.0
    scale: float = 1.0
    has_frequencies: bool = False
    takes_log: bool = False
    keeps_timestep: bool = False
    table_rows: int | None = None
    activation: Activation = Activation.SILU
    projection_activation: Activation = Activation.SILU


_TIME_ENUMS: dict[str, type[Enum]] = {
    "order": EmbeddingOrder,
    "activation": Activation,
    "projection_activation": Activation,
}


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Everything that defines the network's function except its weights.

    in_channels, out_channels: of x_t and of the network's result (out = 2 in for a learned range).
    image_size: (height, width) in pixels. embed_channels: width of the sinusoidal embedding; time_channels:
    width of the time MLP. num_classes: rows of the label table, or None. null_class: the row that means
    "no label". cond_channels: channels of the condition image, concatenated behind x_t (before it if cond_first);
    self_condition: that image is the previous step's x0, zeros at first. time: the time embedding. label: what y is;
    label_projection: y selects a row that is added to the blocks' projections, rather than to the time embedding.
    divides_by_timestep: the result is divided by the timestep, as a score network's is by its noise level.
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
    cond_first: bool = False
    self_condition: bool = False
    time: TimeConfig = TimeConfig()
    label: LabelInput = LabelInput.TABLE
    label_projection: bool = False
    divides_by_timestep: bool = False

    def __post_init__(self) -> None:
        check_blocks(self.blocks, self.in_channels + self.cond_channels, self.out_channels, self.image_size)
        if self.null_class is not None and not 0 <= self.null_class < (self.num_classes or 0):
            raise ConfigError(
                f"null class {self.null_class} is outside the {self.num_classes or 0} classes of this network; "
                "give a row of its label table with --null-class"
            )

    @property
    def projection_channels(self) -> tuple[int, ...]:
        """Width of each time projection, in the order of the blocks that take one."""
        return _projection_channels(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return _config_to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> UNetConfig:
        """The config whose to_dict gave this data; raises ConfigError for anything else."""
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
    time: TimeConfig = TimeConfig()

    def __post_init__(self) -> None:
        check_blocks(self.blocks, self.in_channels, self.num_classes, self.image_size)

    @property
    def projection_channels(self) -> tuple[int, ...]:
        """Width of each time projection, in the order of the blocks that take one."""
        return _projection_channels(self.blocks)

    def to_dict(self) -> dict[str, Any]:
        return _config_to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ClassifierConfig:
        return cls(**_config_fields(data, cls))


def _projection_channels(blocks: tuple[Block, ...]) -> tuple[int, ...]:
    return tuple(block.projection_channels for block in blocks if block.projection_channels)


def _config_to_dict(config: UNetConfig | ClassifierConfig) -> dict[str, Any]:
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    time = {f.name: getattr(config.time, f.name) for f in dataclasses.fields(TimeConfig)}
    return {k: v.value if isinstance(v, Enum) else v for k, v in values.items()} | {
        "image_size": list(config.image_size),
        "blocks": [block_to_dict(b) for b in config.blocks],
        "time": {k: v.value if isinstance(v, Enum) else v for k, v in time.items()},
    }


def _config_fields(data: dict[str, Any], cls: type) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(data) - names:
        raise ConfigError(f"unknown {cls.__name__} fields: {', '.join(sorted(unknown))}")
    if missing := {"blocks", "image_size", "time"} - set(data):
        raise ConfigError(f"{cls.__name__} lacks {', '.join(sorted(missing))}")
    try:
        height, width = data["image_size"]
        time: dict[str, Any] = {k: _TIME_ENUMS[k](v) if k in _TIME_ENUMS else v for k, v in data["time"].items()}
        fields = dict(data) | {"image_size": (int(height), int(width)), "time": TimeConfig(**time)}
        if "label" in data:
            fields["label"] = LabelInput(data["label"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{cls.__name__} has wrong values: {error}") from error
    return fields | {"blocks": tuple(block_from_dict(b) for b in data["blocks"])}


def count_downsamplings(blocks: tuple[Block, ...]) -> int:
    """How often the block list halves the resolution."""
    return sum(block.resampling is Resample.DOWN for block in blocks)


def check_blocks(blocks: tuple[Block, ...], in_channels: int, out_channels: int, image_size: tuple[int, int]) -> None:
    """Walk the shapes of an image of (height, width) pixels; raises ConfigError at the first block that does not fit.

    A block may find other channels than it takes, a norm's groups no divisor of them, or a map whose size is not that
    of its skip connection, side image or pool.
    """
    start = Shape(in_channels, *image_size)
    shapes = Shapes(start, start, image_size=image_size)
    try:
        if min(image_size) < 1:
            raise SizeError("an image has at least one pixel each way")
        for shapes.index, block in enumerate(blocks):
            block.check(shapes)
    except SizeError as error:
        halvings = count_downsamplings(blocks)
        raise ConfigError(
            f"image size {image_size[0]}x{image_size[1]} does not fit a network that halves it {halvings} times; "
            f"give a multiple of {2**halvings} with --image-size ({error})"
        ) from error
    if shapes.h.channels != out_channels or shapes.skips:
        raise ConfigError(
            f"the block list ends with {shapes.h.channels} channels and {len(shapes.skips)} unused skip connections; "
            f"expected {out_channels} and none"
        )
