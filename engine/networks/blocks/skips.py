"""Skip connections: a map is saved, and later put behind the map of the moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from engine.errors import ConfigError
from engine.networks.blocks.base import Block, Shape, Shapes, SizeError, Stream, Tensors, Writers
from engine.networks.blocks.target import Target


@dataclass(frozen=True, slots=True)
class Push(Block):
    """Save h on the skip stack."""

    def check(self, shapes: Shapes) -> None:
        shapes.skips.append(shapes.h)

    def module(self) -> nn.Module:
        return nn.Identity()

    def run(self, module: nn.Module, tensors: Tensors) -> None:
        tensors.skips.append(tensors.h)

    def lower(self, name: str, target: Target) -> None:
        target.skips.append(target.h)

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        writers.skips.append(writers.h)
        return writers.h


@dataclass(frozen=True, slots=True)
class Pop(Block):
    """h = concat(h, last saved map) along channels, in the wider of their types."""

    def check(self, shapes: Shapes) -> None:
        if not shapes.skips:
            raise ConfigError(f"block {shapes.index} takes a skip connection and none is left")
        h, skip = shapes.h, shapes.skips.pop()
        if not h.has_size_of(skip):
            raise SizeError(f"block {shapes.index} joins {h.height}x{h.width} and {skip.height}x{skip.width} pixels")
        shapes.h = Shape(h.channels + skip.channels, h.height, h.width)

    def module(self) -> nn.Module:
        return nn.Identity()

    def run(self, module: nn.Module, tensors: Tensors) -> None:
        h, skip = tensors.h, tensors.skips.pop()
        wider = torch.promote_types(h.dtype, skip.dtype)
        tensors.h = torch.cat([h.to(wider), skip.to(wider)], dim=1)

    def lower(self, name: str, target: Target) -> None:
        target.h = target.concatenate(target.h, target.skips.pop())

    def trace(self, index: int, writers: Stream[Writers]) -> Writers:
        read = writers.h
        writers.h = (*writers.h, *writers.skips.pop())
        return read
