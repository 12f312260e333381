"""Attention over all pixels of a map, and its form whose cost is linear in their number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.networks.blocks.base import Block, Shapes
from engine.networks.blocks.target import ONE, Heads, NormRule, Target, Then
from engine.networks.kinds import Norm
from engine.networks.layers import Normalise
from engine.networks.operators import UsesOperators
from kernels import reference as ops


@dataclass(frozen=True, slots=True)
class Attention(Block):
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

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)
        shapes.require_norm(self.channels, self.norm, self.groups)

    def module(self) -> nn.Module:
        return AttentionModule(self)

    def lower(self, name: str, target: Target) -> None:
        normed = target.normalise(f"{name}.norm", target.h, NormRule(self.norm, self.groups, self.eps))
        qkv = target.conv(f"{name}.qkv", normed, 3 * self.heads * self.head_dim, ONE)
        heads = Heads(self.heads, self.head_dim, self.memory, f"{name}.memory")
        h = target.attend(qkv, heads, self.cosine_scale)
        then = Then(add=normed if self.adds_to_norm else target.h, scale=self.output_scale)
        target.h = target.conv(f"{name}.out", h, self.channels, ONE, then)


@dataclass(frozen=True, slots=True)
class LinearAttention(Block):
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

    inner_norms: ClassVar[tuple[str, ...]] = ("out_norm",)

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)
        shapes.require_norm(self.channels, self.norm, self.groups)
        shapes.require_norm(self.channels, self.out_norm, self.groups)

    def module(self) -> nn.Module:
        return LinearAttentionModule(self)

    def lower(self, name: str, target: Target) -> None:
        normed = target.normalise(f"{name}.norm", target.h, NormRule(self.norm, self.groups, self.eps))
        qkv = target.conv(f"{name}.qkv", normed, 3 * self.heads * self.head_dim, ONE)
        shape = target.shape(qkv)
        heads = Heads(self.heads, self.head_dim, self.memory, f"{name}.memory")
        h = target.attend_linearly(qkv, heads, 1.0 / (shape.height * shape.width) if self.divides_values else 1.0)
        residual = Then(add=target.h)
        if self.out_norm is Norm.NONE:
            target.h = target.conv(f"{name}.out", h, self.channels, ONE, residual)
        else:
            out = target.conv(f"{name}.out", h, self.channels, ONE)
            rule = NormRule(self.out_norm, self.groups, self.eps)
            target.h = target.normalise(f"{name}.out_norm", out, rule, residual)


class AttentionModule(UsesOperators):
    """Self-attention over pixels with the residual connection of DDPM."""

    def __init__(self, block: Attention) -> None:
        super().__init__()
        inner = block.heads * block.head_dim
        self.block = block
        self.norm = Normalise(block.channels, block.norm, block.groups, block.eps)
        self.qkv = nn.Conv2d(block.channels, 3 * inner, 1)
        self.out = nn.Conv2d(inner, block.channels, 1)
        self.memory = _memory(block.heads, block.memory, block.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> same shape."""
        block, normed = self.block, self.norm(x)
        q, k, v = _split_heads(self.qkv(normed), block.heads, block.head_dim)
        k, v = _with_memory(k, self.memory, 0), _with_memory(v, self.memory, 1)
        if block.cosine_scale is not None:
            q, k = F.normalize(q, dim=2) * block.cosine_scale, F.normalize(k, dim=2)
        h = self.out(_join_heads(self.operators.attention(q, k, v), x))
        total = (normed if block.adds_to_norm else x) + h
        return total if block.output_scale == 1.0 else total * block.output_scale


class LinearAttentionModule(nn.Module):
    """Attention whose cost is linear in the number of pixels, with a residual connection."""

    def __init__(self, block: LinearAttention) -> None:
        super().__init__()
        inner = block.heads * block.head_dim
        self.block = block
        self.norm = Normalise(block.channels, block.norm, block.groups, block.eps)
        self.qkv = nn.Conv2d(block.channels, 3 * inner, 1)
        self.out = nn.Conv2d(inner, block.channels, 1)
        self.out_norm = Normalise(block.channels, block.out_norm, block.groups, block.eps)
        self.memory = _memory(block.heads, block.memory, block.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> same shape."""
        block = self.block
        q, k, v = _split_heads(self.qkv(self.norm(x)), block.heads, block.head_dim)
        if block.divides_values:
            v = v / v.shape[2]
        k, v = _with_memory(k, self.memory, 0), _with_memory(v, self.memory, 1)
        h = ops.linear_attention(q, k, v, scale=block.head_dim**-0.5)
        return x + self.out_norm(self.out(_join_heads(h, x)))


def _memory(heads: int, memory: int, dim: int) -> nn.Parameter | None:
    return nn.Parameter(torch.zeros(2, heads, memory, dim)) if memory else None


def _with_memory(tokens: Tensor, memory: Tensor | None, part: int) -> Tensor:
    """tokens [B, heads, N, d] behind the learned ones: memory[part], [heads, M, d]."""
    if memory is None:
        return tokens
    learned = memory[part][None].expand(tokens.shape[0], -1, -1, -1).to(tokens.dtype)
    return torch.cat([learned, tokens], dim=2)


def _split_heads(qkv: Tensor, heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B, 3 heads dim, H, W] as q, k, v [B, heads, H W, dim]."""
    batch, _, height, width = qkv.shape
    tokens = qkv.reshape(batch, 3, heads, dim, height * width).transpose(3, 4)
    return tokens[:, 0], tokens[:, 1], tokens[:, 2]


def _join_heads(h: Tensor, like: Tensor) -> Tensor:
    """[B, heads, H W, dim] as [B, heads dim, H, W] with the height and width of `like`."""
    batch, heads, _, dim = h.shape
    return h.transpose(2, 3).reshape(batch, heads * dim, like.shape[2], like.shape[3])
