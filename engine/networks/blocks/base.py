"""What a block is: one frozen value that states its own rules, its module, its lowering and its sensitivity.

A list of blocks is a straight-line program over a map h, a stack of maps saved for skip connections and a side image.
It is walked four times, each time over another kind of value, and each block says what it does on each walk:

    check   over shapes: do the blocks fit together, and does the image's size suit them?
    run     over tensors: the fp32 reference
    lower   over operands: the operators of the CPU engine
    trace   over indices of blocks: which blocks wrote what this one reads
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import Field, dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from engine.errors import BackendError, ConfigError
from engine.networks.blocks.target import Target
from engine.networks.kinds import Norm, Resample

T = TypeVar("T")

Writers = tuple[int, ...]
"""The indices of the blocks that wrote a map."""


@dataclass(slots=True)
class Stream(Generic[T]):
    """What one block hands to the next. h: the map that blocks work on. image: the side image, a second map of few
    channels that runs beside h. skips: the maps saved for skip connections, the last saved one at the end."""

    h: T
    image: T
    skips: list[T] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a map of one image; height and width in pixels."""

    channels: int
    height: int
    width: int

    def has_size_of(self, other: Shape) -> bool:
        """Whether both have the same height and width."""
        return (self.height, self.width) == (other.height, other.width)


class SizeError(ConfigError):
    """The image's size does not suit a list of blocks: a map is empty, odd where it is halved, or meets another size.

    engine.networks.config.check_blocks turns it into the error that a user reads.
    """


@dataclass(slots=True, kw_only=True)
class Shapes(Stream[Shape]):
    """The walk that checks a list. index: of the block that is being checked. image_size: (height, width) in pixels."""

    image_size: tuple[int, int]
    index: int = 0

    def through(self, block: Block, takes: int, gives: int) -> None:
        """h passes a block that takes and gives so many channels, and has the size that block.size_after says.

        Raises ConfigError for another number of channels, SizeError if nothing is left of the image.
        """
        if self.h.channels != takes:
            name = type(block).__name__
            raise ConfigError(f"block {self.index} ({name}) takes {takes} channels, got {self.h.channels}")
        self.h = Shape(gives, block.size_after(self.h.height), block.size_after(self.h.width))
        if self.h.height < 1 or self.h.width < 1:
            raise SizeError(f"block {self.index} leaves {self.h.height}x{self.h.width} pixels")

    def require_groups(self, channels: int, groups: int) -> None:
        """Raises ConfigError unless so many channels can be split into so many groups; 0 is one channel a group."""
        if channels % (groups or channels):
            raise ConfigError(f"block {self.index}: {channels} channels cannot be split into {groups} groups")

    def require_norm(self, channels: int, norm: Norm, groups: int) -> None:
        """The same for a normalisation, of which only a group norm has groups."""
        if norm is Norm.GROUP:
            self.require_groups(channels, groups)


@dataclass(slots=True, kw_only=True)
class Tensors(Stream[Tensor]):
    """The walk that computes. projections: the time projections [B, C] that are left, one for each block that takes
    one. dtype: what this block computes in (engine.networks.half); None: in what it is given."""

    projections: Iterator[Tensor]
    dtype: torch.dtype | None = None

    def cast(self, x: Tensor) -> Tensor:
        """x in the type that this block computes in."""
        return x.to(self.dtype or x.dtype)


class Block(ABC):
    """One step of a network. A subclass is a frozen dataclass whose fields are numbers, booleans and enums.

    It must say what fits it (check) and hold its weights (module). The rest has the meaning of the usual block: h goes
    through the module and nothing else happens; no time projection, no lowering, nothing in 8 bits.
    """

    __slots__ = ()
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    is_pool: ClassVar[bool] = False
    """Whether the result is a vector [B, C] rather than a map, as at the end of a classifier."""

    int8_convolutions: ClassVar[tuple[str, ...]] = ()
    """The 3x3 convolutions, by their names inside the module, that may be computed in 8 bits."""

    inner_norms: ClassVar[tuple[str, ...]] = ()
    """The norms, by their names inside the module, whose input is written by this block alone.

    The others read what blocks before it wrote. Where half precision is too coarse for a norm's input, that input is
    kept in float32: by this block for an inner norm, by the writers of its input too for any other.
    """

    @property
    def projection_channels(self) -> int:
        """Width of the time projection that it takes; 0 for none."""
        return 0

    @property
    def resampling(self) -> Resample | None:
        """Whether it doubles or halves height and width."""
        return None

    def size_after(self, size: int) -> int:
        """Height or width in pixels behind it, for the one in front of it."""
        match self.resampling:
            case Resample.UP:
                return 2 * size
            case Resample.DOWN:
                return size // 2
            case None:
                return size

    @abstractmethod
    def check(self, shapes: Shapes) -> None:
        """Put the shapes behind this block into `shapes`; raises ConfigError or SizeError for what does not fit it."""

    @abstractmethod
    def module(self) -> nn.Module:
        """The fp32 reference with this block's weights. Their names are ours, and a bundle's files hold them."""

    def run(self, module: nn.Module, tensors: Tensors) -> None:
        """Do to the maps [B, C, H, W] what this block does. module: what module() returned."""
        tensors.h = module(tensors.cast(tensors.h))

    def lower(self, name: str, target: Target) -> None:
        """Emit this block's operators for the CPU engine; `name`.weight is a weight named "weight" in the module.

        Raises BackendError for what that engine does not have.
        """
        raise BackendError(f"the native engine has no {type(self).__name__}; choose another backend")

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        """The blocks that wrote what this one, at `index` of the list, reads; `writers` goes on to the next block.

        A block that only moves, repeats or averages values is not a writer: it adds no rounding of its own.
        """
        read = writers.h
        writers.h = (index,)
        return read
