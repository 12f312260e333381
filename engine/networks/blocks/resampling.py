"""Blocks that change height and width."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from engine.networks.blocks.base import Block, Shapes, SizeError, Stream, Writers
from engine.networks.blocks.target import Target, Window
from engine.networks.kinds import Resample
from engine.networks.layers import resample


@dataclass(frozen=True, slots=True)
class Downsample(Block):
    """Halves height and width: k x k convolution of stride 2, or 2x2 average (rounded down at odd sizes).

    Zero padding: (kernel - 1) // 2 on every side, or only at the right and bottom (pads_end: by 1). out_channels: of
    the convolution, if not `channels`. Weights: conv.
    """

    channels: int
    conv: bool
    kernel: int = 3
    pads_end: bool = False
    out_channels: int | None = None

    @property
    def resampling(self) -> Resample:
        return Resample.DOWN

    def size_after(self, size: int) -> int:
        if not self.conv:
            return size // 2
        padding = 1 if self.pads_end else 2 * ((self.kernel - 1) // 2)
        return (size + padding - self.kernel) // 2 + 1

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.out_channels or self.channels)

    def module(self) -> nn.Module:
        return DownsampleModule(self)

    def lower(self, name: str, target: Target) -> None:
        if not self.conv:
            target.h = target.resample(target.h, Resample.DOWN)
            return
        given = target.shape(target.h)
        size = self.size_after(given.height), self.size_after(given.width)
        window = Window(self.kernel, 2, 0 if self.pads_end else (self.kernel - 1) // 2, size)
        target.h = target.conv(f"{name}.conv", target.h, self.out_channels or self.channels, window)

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        return Block.trace(self, index, writers) if self.conv else writers.h


@dataclass(frozen=True, slots=True)
class Upsample(Block):
    """Doubles height and width by nearest repetition, then a 3x3 convolution if conv. Weights: conv."""

    channels: int
    conv: bool

    @property
    def resampling(self) -> Resample:
        return Resample.UP

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)

    def module(self) -> nn.Module:
        return UpsampleModule(self)

    def lower(self, name: str, target: Target) -> None:
        if self.conv:
            target.h = target.conv(f"{name}.conv", target.h, self.channels, Window(is_upsampled=True))
        else:
            target.h = target.resample(target.h, Resample.UP)

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        return Block.trace(self, index, writers) if self.conv else writers.h


@dataclass(frozen=True, slots=True)
class TransposedConv(Block):
    """Doubles height and width: 4x4 transposed convolution, stride 2, padding 1. Weights: weight, bias."""

    channels: int

    @property
    def resampling(self) -> Resample:
        return Resample.UP

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)

    def module(self) -> nn.Module:
        return nn.ConvTranspose2d(self.channels, self.channels, 4, stride=2, padding=1)

    def lower(self, name: str, target: Target) -> None:
        target.h = target.transposed_conv(name, target.h, self.channels)


@dataclass(frozen=True, slots=True)
class SpaceToDepth(Block):
    """[B, C, H, W] to [B, 4C, H/2, W/2]; channel c*4 + 2*row + column of each 2x2 patch. H and W are even."""

    channels: int

    @property
    def resampling(self) -> Resample:
        return Resample.DOWN

    def check(self, shapes: Shapes) -> None:
        if shapes.h.height % 2 or shapes.h.width % 2:
            raise SizeError(f"block {shapes.index} cannot cut {shapes.h.height}x{shapes.h.width} pixels into 2x2")
        shapes.through(self, self.channels, 4 * self.channels)

    def module(self) -> nn.Module:
        return nn.PixelUnshuffle(2)

    def lower(self, name: str, target: Target) -> None:
        target.h = target.space_to_depth(target.h)

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        return writers.h


@dataclass(frozen=True, slots=True)
class Pad(Block):
    """Zeros around the image, `pixels` on every side; a negative number crops."""

    channels: int
    pixels: int

    def size_after(self, size: int) -> int:
        return size + 2 * self.pixels

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)

    def module(self) -> nn.Module:
        return PadModule(self.pixels)

    def lower(self, name: str, target: Target) -> None:
        target.h = target.pad(target.h, self.pixels)

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        return writers.h


class DownsampleModule(nn.Module):
    """Half resolution, by strided convolution or average."""

    def __init__(self, block: Downsample) -> None:
        super().__init__()
        self.pads_end = block.pads_end
        padding = 0 if block.pads_end else (block.kernel - 1) // 2
        cin, cout = block.channels, block.out_channels or block.channels
        self.conv = nn.Conv2d(cin, cout, block.kernel, stride=2, padding=padding) if block.conv else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C', H', W'], H' and W' as Downsample.size_after says."""
        if self.conv is None:
            return resample(x, Resample.DOWN)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pads_end else x)


class UpsampleModule(nn.Module):
    """Double resolution, nearest, with an optional convolution."""

    def __init__(self, block: Upsample) -> None:
        super().__init__()
        self.conv = nn.Conv2d(block.channels, block.channels, 3, padding=1) if block.conv else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, 2H, 2W]."""
        h = resample(x, Resample.UP)
        return self.conv(h) if self.conv is not None else h


class PadModule(nn.Module):
    """Zeros around the image, or a crop."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H + 2 pixels, W + 2 pixels]."""
        if self.pixels < 0:
            return x[:, :, -self.pixels : x.shape[2] + self.pixels, -self.pixels : x.shape[3] + self.pixels]
        return F.pad(x, (self.pixels,) * 4)
