"""How a classifier's last map becomes logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.networks.blocks.base import Block, Shapes
from engine.networks.blocks.target import ONE, Heads, Target
from kernels import reference as ops


@dataclass(frozen=True, slots=True)
class AttentionPool(Block):
    """CLIP-style pooling: attention over [mean, pixels], a learned position each; the mean's token is the result.

    tokens: how many pixels there are. Weights: position [channels, tokens + 1], qkv, out.
    """

    channels: int
    heads: int
    head_dim: int
    tokens: int
    out_features: int

    is_pool: ClassVar[bool] = True

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.out_features)
        pixels, (height, width) = shapes.h.height * shapes.h.width, shapes.image_size
        if pixels != self.tokens:
            raise ConfigError(
                f"an image of {height}x{width} leaves {pixels} pixels for an attention pool of {self.tokens} "
                "positions; give the training's size with --image-size"
            )

    def module(self) -> nn.Module:
        return AttentionPoolModule(self)

    def lower(self, name: str, target: Target) -> None:
        tokens = target.tokens(target.h, f"{name}.position")
        qkv = target.conv(f"{name}.qkv", tokens, 3 * self.heads * self.head_dim, ONE)
        mixed = target.attend(qkv, Heads(self.heads, self.head_dim))
        target.h = target.classify(f"{name}.out", mixed, self.out_features)


@dataclass(frozen=True, slots=True)
class AveragePool(Block):
    """Mean over pixels, then a linear layer. Weights: linear."""

    channels: int
    out_features: int

    is_pool: ClassVar[bool] = True

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.out_features)

    def module(self) -> nn.Module:
        return AveragePoolModule(self)

    def lower(self, name: str, target: Target) -> None:
        target.h = target.classify(f"{name}.linear", target.tokens(target.h), self.out_features)


class AttentionPoolModule(nn.Module):
    """One attention layer over [mean token, pixels] with learned positions; the mean's token is read out.

    Radford et al., CLIP (2021), section 2.4, in the form of guided-diffusion's AttentionPool2d.
    """

    def __init__(self, block: AttentionPool) -> None:
        super().__init__()
        inner = block.heads * block.head_dim
        self.block = block
        self.position = nn.Parameter(torch.randn(block.channels, block.tokens + 1) / block.channels**0.5)
        self.qkv = nn.Linear(block.channels, 3 * inner)
        self.out = nn.Linear(inner, block.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] with H W = tokens -> [B, out_features]."""
        batch, heads, dim = x.shape[0], self.block.heads, self.block.head_dim
        pixels = x.flatten(2)
        tokens = torch.cat([pixels.mean(dim=2, keepdim=True), pixels], dim=2) + self.position
        qkv = self.qkv(tokens.transpose(1, 2)).reshape(batch, -1, 3, heads, dim).permute(2, 0, 3, 1, 4)
        h = ops.attention(qkv[0][:, :, :1], qkv[1], qkv[2])
        return self.out(h.reshape(batch, heads * dim))


class AveragePoolModule(nn.Module):
    """Mean over pixels, then a linear layer."""

    def __init__(self, block: AveragePool) -> None:
        super().__init__()
        self.linear = nn.Linear(block.channels, block.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, out_features]."""
        return self.linear(x.mean(dim=(2, 3)))
