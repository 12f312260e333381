"""The side image of NCSN++ (Song et al., Score-Based Generative Modeling, 2021, appendix H): a second map of few
channels that runs beside h and is halved and doubled with the filter (1, 3, 3, 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from engine.errors import ConfigError
from engine.networks.blocks.base import Block, Shape, Shapes, SizeError, Stream, Tensors, Writers
from engine.networks.blocks.target import ONE, NormRule, Target, Then
from engine.networks.kinds import Activation, Norm, Resample
from engine.networks.layers import Normalise
from kernels import reference as ops


@dataclass(frozen=True, slots=True)
class ImageSave(Block):
    """Keep h as the side image."""

    def check(self, shapes: Shapes) -> None:
        shapes.image = shapes.h

    def module(self) -> nn.Module:
        return nn.Identity()

    def run(self, module: nn.Module, tensors: Tensors) -> None:
        tensors.image = tensors.h

    def lower(self, name: str, target: Target) -> None:
        target.image = target.h

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        writers.image = writers.h
        return writers.h


@dataclass(frozen=True, slots=True)
class ImageIn(Block):
    """Halve the side image; add its 1x1 convolution to h, which has `channels`. Weights: weight, bias."""

    image_channels: int
    channels: int

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)
        image = shapes.image
        halved = Shape(image.channels, image.height // 2, image.width // 2)
        _require_image(shapes, halved, self.image_channels)
        shapes.image = halved

    def module(self) -> nn.Module:
        return nn.Conv2d(self.image_channels, self.channels, 1)

    def run(self, module: nn.Module, tensors: Tensors) -> None:
        tensors.image = ops.fir_downsample(tensors.image)
        tensors.h = tensors.h + module(tensors.cast(tensors.image))

    def lower(self, name: str, target: Target) -> None:
        target.image = target.resample(target.image, Resample.DOWN, fir=True)
        target.h = target.conv(name, target.image, self.channels, ONE, Then(add=target.h))

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        writers.h = (*writers.h, index)
        return writers.image


@dataclass(frozen=True, slots=True)
class ImageOut(Block):
    """side image = 3x3 conv(SiLU(GroupNorm(h))) plus, unless is_first, the side image at double resolution; h stays.

    Weights: norm, conv.
    """

    channels: int
    image_channels: int
    groups: int = 32
    eps: float = 1e-5
    is_first: bool = False

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)
        shapes.require_groups(self.channels, self.groups)
        if not self.is_first:
            _require_image(shapes, _doubled(shapes.image), self.image_channels)
        shapes.image = Shape(self.image_channels, shapes.h.height, shapes.h.width)

    def module(self) -> nn.Module:
        return ImageOutModule(self)

    def run(self, module: nn.Module, tensors: Tensors) -> None:
        added = module(tensors.cast(tensors.h))
        tensors.image = added if self.is_first else added + ops.fir_upsample(tensors.image)

    def lower(self, name: str, target: Target) -> None:
        rule = NormRule(Norm.GROUP, self.groups, self.eps, Activation.SILU)
        added = target.conv(f"{name}.conv", target.normalise(f"{name}.norm", target.h, rule), self.image_channels)
        target.image = added if self.is_first else target.resample(target.image, Resample.UP, fir=True, add=added)

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        writers.image = (index,) if self.is_first else (*writers.image, index)
        return writers.h


@dataclass(frozen=True, slots=True)
class ImageAdd(Block):
    """h plus the side image at double resolution."""

    def check(self, shapes: Shapes) -> None:
        _require_image(shapes, _doubled(shapes.image), shapes.h.channels)

    def module(self) -> nn.Module:
        return nn.Identity()

    def run(self, module: nn.Module, tensors: Tensors) -> None:
        tensors.h = tensors.h + ops.fir_upsample(tensors.image)

    def lower(self, name: str, target: Target) -> None:
        target.h = target.resample(target.image, Resample.UP, fir=True, add=target.h)

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        read = writers.h
        writers.h = (*writers.h, *writers.image)
        return read


class ImageOutModule(nn.Module):
    """What h adds to the side image: conv(SiLU(norm(h)))."""

    def __init__(self, block: ImageOut) -> None:
        super().__init__()
        self.norm = Normalise(block.channels, Norm.GROUP, block.groups, block.eps)
        self.conv = nn.Conv2d(block.channels, block.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, image_channels, H, W]."""
        return self.conv(self.norm.activated(x, Activation.SILU))


def _doubled(image: Shape) -> Shape:
    return Shape(image.channels, 2 * image.height, 2 * image.width)


def _require_image(shapes: Shapes, image: Shape, channels: int) -> None:
    """Raises ConfigError unless a side image has so many channels, SizeError unless it has the size of h."""
    if image.channels != channels:
        raise ConfigError(f"block {shapes.index} takes a side image of {channels} channels, got {image.channels}")
    if not image.has_size_of(shapes.h):
        h = shapes.h
        raise SizeError(
            f"block {shapes.index} has {h.height}x{h.width} pixels and a side image of {image.height}x{image.width}"
        )
