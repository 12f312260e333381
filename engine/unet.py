"""The one U-Net: a plain fp32 PyTorch module that runs a UNetConfig's block list.

It is the numerical reference and the source of every export. Parameter names are ours; translators under
engine/families/ rename a checkpoint's weights to them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import config as c
from engine.errors import ConfigError
from kernels import reference as ops


class GroupNorm(nn.Module):
    """Weights of one group norm; the block that owns it decides what is fused with it."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.groups, self.eps = groups, eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.group_norm(x, self.weight, self.bias, self.groups, self.eps)

    def silu(self, x: Tensor) -> Tensor:
        return ops.group_norm_silu(x, self.weight, self.bias, self.groups, self.eps)


def resample(x: Tensor, how: c.Resample | None) -> Tensor:
    """x [B, C, H, W] at half, double or the same resolution; without parameters."""
    if how is c.Resample.UP:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    if how is c.Resample.DOWN:
        return F.avg_pool2d(x, 2)
    return x


class ResBlock(nn.Module):
    """Residual block of DDPM (Ho et al., 2020) and its scale-shift form (Improved DDPM, section 3)."""

    def __init__(self, block: c.ResBlock) -> None:
        super().__init__()
        cin, cout = block.in_channels, block.out_channels
        self.block = block
        self.norm1 = GroupNorm(cin, block.groups, block.eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = GroupNorm(cout, block.groups, block.eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, projection: Tensor) -> Tensor:
        """x [B, Cin, H, W] and this block's time projection [B, Cout or 2 Cout] -> [B, Cout, H', W']."""
        h = self.conv1(resample(self.norm1.silu(x), self.block.resample))
        if self.block.scale_shift:
            scale, shift = projection.chunk(2, dim=1)
            h = ops.scale_shift_silu(self.norm2(h), scale, shift)
        else:
            h = self.norm2.silu(h + projection[:, :, None, None])
        return self.conv2(h) + self.shortcut(resample(x, self.block.resample))


class Attention(nn.Module):
    """Self-attention over pixels with the residual connection of DDPM."""

    def __init__(self, block: c.Attention) -> None:
        super().__init__()
        inner = block.heads * block.head_dim
        self.block = block
        self.norm = GroupNorm(block.channels, block.groups, block.eps)
        self.qkv = nn.Conv2d(block.channels, 3 * inner, 1)
        self.out = nn.Conv2d(inner, block.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> same shape."""
        batch, _, height, width = x.shape
        heads, dim = self.block.heads, self.block.head_dim
        tokens = self.qkv(self.norm(x)).reshape(batch, 3, heads, dim, height * width).transpose(3, 4)
        h = ops.attention(tokens[:, 0], tokens[:, 1], tokens[:, 2])
        return x + self.out(h.transpose(2, 3).reshape(batch, heads * dim, height, width))


class Downsample(nn.Module):
    """Half resolution, by strided convolution or average."""

    def __init__(self, block: c.Downsample) -> None:
        super().__init__()
        self.conv = nn.Conv2d(block.channels, block.channels, 3, stride=2, padding=1) if block.conv else None

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if self.conv is not None else resample(x, c.Resample.DOWN)


class Upsample(nn.Module):
    """Double resolution, nearest, with an optional convolution."""

    def __init__(self, block: c.Upsample) -> None:
        super().__init__()
        self.conv = nn.Conv2d(block.channels, block.channels, 3, padding=1) if block.conv else None

    def forward(self, x: Tensor) -> Tensor:
        h = resample(x, c.Resample.UP)
        return self.conv(h) if self.conv is not None else h


class NormSiLU(nn.Module):
    """SiLU(GroupNorm(x))."""

    def __init__(self, block: c.NormSiLU) -> None:
        super().__init__()
        self.norm = GroupNorm(block.channels, block.groups, block.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.silu(x)


def make_block(block: c.Block) -> nn.Module:
    """The module of one U-Net block; Push and Pop hold nothing."""
    match block:
        case c.Conv():
            return nn.Conv2d(block.in_channels, block.out_channels, block.kernel, padding=block.kernel // 2)
        case c.ResBlock():
            return ResBlock(block)
        case c.Attention():
            return Attention(block)
        case c.Downsample():
            return Downsample(block)
        case c.Upsample():
            return Upsample(block)
        case c.NormSiLU():
            return NormSiLU(block)
        case c.Push() | c.Pop():
            return nn.Identity()
        case _:
            raise ConfigError(f"{type(block).__name__} is not a U-Net block")


class TimeEmbedding(nn.Module):
    """Timestep (and label) to the stacked time projections of all ResBlocks: one linear layer for the network."""

    def __init__(self, embed: int, width: int, projections: tuple[int, ...], num_classes: int | None) -> None:
        super().__init__()
        self.embed, self.projections = embed, projections
        self.linear1 = nn.Linear(embed, width)
        self.linear2 = nn.Linear(width, width)
        self.label = nn.Embedding(num_classes, width) if num_classes is not None else None
        self.projection = nn.Linear(width, sum(projections))

    def forward(self, timestep: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """timestep [B] float32, y [B] int64 or None -> one [B, C] projection for each ResBlock."""
        # Angles need fp32: at timestep 999 half precision is off by a whole radian.
        angles = ops.timestep_embedding(timestep, self.embed).to(self.linear1.weight.dtype)
        emb = self.linear2(F.silu(self.linear1(angles)))
        if self.label is not None:
            emb = emb + self.label(y)
        return self.projection(F.silu(emb)).split(self.projections, dim=1)


class UNet(nn.Module):
    """epsilon_theta(x_t, t, y): a DDPM-family U-Net as its UNetConfig lists it."""

    def __init__(self, config: c.UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(
            config.embed_channels, config.time_channels, config.projection_channels, config.num_classes
        )
        self.blocks = nn.ModuleList(make_block(block) for block in config.blocks)

    def forward(self, x_t: Tensor, timestep: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """x_t [B, C, H, W], timestep [B] float32, y [B] int64, cond [B, Cc, H, W] -> [B, C', H, W]."""
        projections = iter(self.time(timestep, y))
        h = x_t if cond is None else torch.cat([x_t, cond], dim=1)
        h = h.to(self.time.linear1.weight.dtype)
        return run_blocks(self.config.blocks, self.blocks, h, projections).to(x_t.dtype)


def run_blocks(blocks: tuple[c.Block, ...], modules: nn.ModuleList, h: Tensor, projections: Iterator[Tensor]) -> Tensor:
    """Run a block program on h [B, C, H, W], taking one time projection a ResBlock."""
    skips: list[Tensor] = []
    for block, module in zip(blocks, modules, strict=True):
        match block:
            case c.Push():
                skips.append(h)
            case c.Pop():
                h = torch.cat([h, skips.pop()], dim=1)
            case c.ResBlock():
                h = module(h, next(projections))
            case _:
                h = module(h)
    return h
