"""A convolution, and a norm with its activation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from engine.networks.blocks.base import Block, Shapes
from engine.networks.blocks.target import NormRule, Target, Window
from engine.networks.kinds import Activation, Norm
from engine.networks.layers import Normalise


@dataclass(frozen=True, slots=True)
class Conv(Block):
    """k x k convolution, zero padding k // 2. Weights: weight, bias."""

    in_channels: int
    out_channels: int
    kernel: int = 3

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.in_channels, self.out_channels)

    def module(self) -> nn.Module:
        return nn.Conv2d(self.in_channels, self.out_channels, self.kernel, padding=self.kernel // 2)

    def lower(self, name: str, target: Target) -> None:
        target.h = target.conv(name, target.h, self.out_channels, Window(self.kernel))


@dataclass(frozen=True, slots=True)
class NormSiLU(Block):
    """activation(norm(h)); SiLU(GroupNorm(h)) unless said otherwise. Weights: norm."""

    channels: int
    groups: int = 32
    eps: float = 1e-5
    norm: Norm = Norm.GROUP
    activation: Activation = Activation.SILU

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)
        shapes.require_norm(self.channels, self.norm, self.groups)

    def module(self) -> nn.Module:
        return NormSiLUModule(self)

    def lower(self, name: str, target: Target) -> None:
        rule = NormRule(self.norm, self.groups, self.eps, self.activation)
        target.h = target.normalise(f"{name}.norm", target.h, rule)


class NormSiLUModule(nn.Module):
    """activation(norm(x))."""

    def __init__(self, block: NormSiLU) -> None:
        super().__init__()
        self.activation = block.activation
        self.norm = Normalise(block.channels, block.norm, block.groups, block.eps)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> same shape."""
        return self.norm.activated(x, self.activation)
