"""The network as data: a U-Net or classifier is a list of blocks that one short loop runs.

A block list is a straight-line program over one feature map h and a stack of skip connections: Push saves h,
Pop concatenates the last saved map behind h. All values are frozen; engine.json_form writes and reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

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
    ([B, label_channels] float32)."""

    TABLE = "table"
    NUMBER = "number"
    VECTOR = "vector"


@dataclass(frozen=True, slots=True)
class TimeConfig:
    """How a timestep becomes the input of the time MLP, and the MLP's widths and non-linearities.

    embed_channels: width of the MLP's input. channels: width of its two layers.
    angles = scale * t * theta^(-i / (half - shift)), i < half; has_frequencies: 2 pi * t * (weights time.frequencies)
    instead, log t in place of t if takes_log, with t itself in front if keeps_timestep. table_rows: instead of angles,
    a learned row (weights time.table) for each of so many whole timesteps. activation: inside the MLP;
    projection_activation: between the MLP and the blocks' projections.
    """

    embed_channels: int
    channels: int
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


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Everything that defines the network's function except its weights.

    in_channels, out_channels: of x_t and of the network's result (out = 2 in for a learned range).
    image_size: (height, width) in pixels. time: the time embedding; None for a network that does not see the timestep.
    num_classes: rows of the label table, or None. null_class: the row that means
    "no label". cond_channels: channels of the condition image, concatenated behind x_t (before it if cond_first);
    self_condition: that image is the previous step's x0, zeros at first. label: what y is;
    label_projection: y selects a row that is added to the blocks' projections, rather than to the time embedding.
    divides_by_timestep: the result is divided by the timestep, as a score network's is by its noise level.
    """

    in_channels: int
    out_channels: int
    image_size: tuple[int, int]
    time: TimeConfig | None
    blocks: tuple[Block, ...]
    num_classes: int | None = None
    null_class: int | None = None
    cond_channels: int = 0
    cond_first: bool = False
    self_condition: bool = False
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
        self._check_labels()

    def _check_labels(self) -> None:
        """Raises ConfigError where a label has nothing to be added to, or a block's projection comes from nothing."""
        is_labelled = self.num_classes is not None
        if self.label_projection and not (is_labelled and self.label is LabelInput.TABLE):
            raise ConfigError("labels are added to the blocks' projections, and the network has no table of labels")
        if self.time is None and is_labelled and not self.label_projection:
            raise ConfigError("labels are added to the time embedding, and the network has none")
        if self.time is None and self.projection_channels and not is_labelled:
            raise ConfigError("blocks take a projection of the timestep or a label, and the network sees neither")

    @property
    def label_channels(self) -> int:
        """Numbers in a label that is a vector."""
        if self.time is None or self.label is not LabelInput.VECTOR:
            raise ConfigError("the labels of this network are no vectors")
        return self.time.channels

    @property
    def projection_channels(self) -> tuple[int, ...]:
        """Width of each time projection, in the order of the blocks that take one."""
        return _projection_channels(self.blocks)


@dataclass(frozen=True, slots=True)
class ClassifierConfig:
    """A noise-conditioned classifier: x_t and timestep to logits over num_classes. Fields as in UNetConfig."""

    in_channels: int
    image_size: tuple[int, int]
    time: TimeConfig
    blocks: tuple[Block, ...]
    num_classes: int

    def __post_init__(self) -> None:
        check_blocks(self.blocks, self.in_channels, self.num_classes, self.image_size)

    @property
    def projection_channels(self) -> tuple[int, ...]:
        """Width of each time projection, in the order of the blocks that take one."""
        return _projection_channels(self.blocks)


def _projection_channels(blocks: tuple[Block, ...]) -> tuple[int, ...]:
    return tuple(block.projection_channels for block in blocks if block.projection_channels)


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
