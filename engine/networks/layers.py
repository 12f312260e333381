"""The blocks as PyTorch modules: fp32 reference and source of every export. Parameter names are ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.networks import config as c
from engine.networks.operators import UsesOperators
from kernels import reference as ops

_ACTIVATIONS: dict[c.Activation, Callable[[Tensor], Tensor]] = {
    c.Activation.SILU: F.silu,
    c.Activation.RELU: F.relu,
    c.Activation.MISH: F.mish,
    c.Activation.GELU: F.gelu,
    c.Activation.NONE: lambda x: x,
}


def activate(x: Tensor, activation: c.Activation) -> Tensor:
    """A pointwise non-linearity of x, any shape."""
    return _ACTIVATIONS[activation](x)


class Normalise(UsesOperators):
    """Any normalisation of engine.networks.blocks.Norm; the block that owns it decides what is fused with it.

    With float32 weights in a half-precision network (engine.networks.half) the norm and what is fused with it are
    computed in float32, and the result is rounded once.
    """

    def __init__(self, channels: int, norm: c.Norm, groups: int, eps: float) -> None:
        super().__init__()
        self.norm, self.groups, self.eps = norm, groups or channels, eps
        if norm is not c.Norm.NONE:
            self.weight = nn.Parameter(torch.ones(channels))
        if norm in (c.Norm.GROUP, c.Norm.AFFINE):
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> same shape and dtype."""
        return self._normalise(self._taken(x)).to(x.dtype)

    def activated(self, x: Tensor, activation: c.Activation) -> Tensor:
        """activation(norm(x)), in one operator where there is one."""
        h = self._taken(x)
        if self.norm is c.Norm.GROUP and activation is c.Activation.SILU:
            h = self.operators.group_norm_silu(h, self.weight, self.bias, self.groups, self.eps)
        else:
            h = activate(self._normalise(h), activation)
        return h.to(x.dtype)

    def modulated(self, x: Tensor, projection: Tensor, activation: c.Activation) -> Tensor:
        """activation(norm(x) * (1 + scale) + shift), in one operator where there is one; projection [B, 2C] is both."""
        h = self._taken(x)
        scale, shift = projection.to(h.dtype).chunk(2, dim=1)
        if activation is not c.Activation.SILU:
            h = activate(self._normalise(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None], activation)
        elif self.norm is not c.Norm.GROUP:
            h = ops.scale_shift_silu(self._normalise(h), scale, shift)
        else:
            norm = (self.weight, self.bias, self.groups, self.eps)
            h = self.operators.adaptive_group_norm_silu(h, *norm, scale, shift)
        return h.to(x.dtype)

    def _taken(self, x: Tensor) -> Tensor:
        return x if self.norm is c.Norm.NONE else x.to(self.weight.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        match self.norm:
            case c.Norm.GROUP:
                return self.operators.group_norm(x, self.weight, self.bias, self.groups, self.eps)
            case c.Norm.RMS:
                return ops.rms_norm(x, self.weight)
            case c.Norm.LAYER:
                return ops.channel_layer_norm(x, self.weight, self.eps)
            case c.Norm.AFFINE:
                return x * self.weight[:, None, None] + self.bias[:, None, None]
            case c.Norm.NONE:
                return x


def resample(x: Tensor, how: c.Resample | None, fir: bool = False) -> Tensor:
    """x [B, C, H, W] at half, double or the same resolution; without parameters."""
    if fir and how is not None:
        return ops.fir_upsample(x) if how is c.Resample.UP else ops.fir_downsample(x)
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
        normed = cout if block.conv_first else cin
        self.norm1 = Normalise(normed, block.norm, block.groups, block.eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        groups_out = block.groups if block.groups_out is None else block.groups_out
        self.norm2 = Normalise(cout, block.norm, groups_out, block.eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout or block.has_shortcut else nn.Identity()

    def forward(self, x: Tensor, projection: Tensor | None) -> Tensor:
        """x [B, Cin, H, W] and this block's time projection [B, Cout or 2 Cout] -> [B, Cout, H', W']."""
        h = self._conv_first(x, projection) if self.block.conv_first else self._norm_first(x, projection)
        total = h + self.shortcut(resample(x, self.block.resample, self.block.fir))
        return total if self.block.output_scale == 1.0 else total * self.block.output_scale

    def _norm_first(self, x: Tensor, projection: Tensor | None) -> Tensor:
        act = self.block.activation
        h = self.conv1(resample(self.norm1.activated(x, act), self.block.resample, self.block.fir))
        if projection is None:
            h = self.norm2.activated(h, act)
        elif self.block.scale_shift:
            h = self.norm2.modulated(h, projection, act)
        else:
            h = self.norm2.activated(h + projection[:, :, None, None], act)
        return self.conv2(h)

    def _conv_first(self, x: Tensor, projection: Tensor | None) -> Tensor:
        act = self.block.activation
        h = self.conv1(x)
        h = self.norm1.activated(h, act) if projection is None else self.norm1.modulated(h, projection, act)
        return self.norm2.activated(self.conv2(h), act)


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


class Attention(UsesOperators):
    """Self-attention over pixels with the residual connection of DDPM."""

    def __init__(self, block: c.Attention) -> None:
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


class LinearAttention(nn.Module):
    """Attention whose cost is linear in the number of pixels, with a residual connection."""

    def __init__(self, block: c.LinearAttention) -> None:
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


class Downsample(nn.Module):
    """Half resolution, by strided convolution or average."""

    def __init__(self, block: c.Downsample) -> None:
        super().__init__()
        self.pads_end = block.pads_end
        padding = 0 if block.pads_end else (block.kernel - 1) // 2
        cin, cout = block.channels, block.out_channels or block.channels
        self.conv = nn.Conv2d(cin, cout, block.kernel, stride=2, padding=padding) if block.conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return resample(x, c.Resample.DOWN)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.pads_end else x)


class Upsample(nn.Module):
    """Double resolution, nearest, with an optional convolution."""

    def __init__(self, block: c.Upsample) -> None:
        super().__init__()
        self.conv = nn.Conv2d(block.channels, block.channels, 3, padding=1) if block.conv else None

    def forward(self, x: Tensor) -> Tensor:
        h = resample(x, c.Resample.UP)
        return self.conv(h) if self.conv is not None else h


class NormSiLU(nn.Module):
    """activation(norm(x))."""

    def __init__(self, block: c.NormSiLU) -> None:
        super().__init__()
        self.activation = block.activation
        self.norm = Normalise(block.channels, block.norm, block.groups, block.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.activated(x, self.activation)


class ImageOut(nn.Module):
    """What h adds to the side image: conv(SiLU(norm(h)))."""

    def __init__(self, block: c.ImageOut) -> None:
        super().__init__()
        self.norm = Normalise(block.channels, c.Norm.GROUP, block.groups, block.eps)
        self.conv = nn.Conv2d(block.channels, block.image_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, image_channels, H, W]."""
        return self.conv(self.norm.activated(x, c.Activation.SILU))


class Pad(nn.Module):
    """Zeros around the image, or a crop."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x: Tensor) -> Tensor:
        if self.pixels < 0:
            return x[:, :, -self.pixels : x.shape[2] + self.pixels, -self.pixels : x.shape[3] + self.pixels]
        return F.pad(x, (self.pixels,) * 4)


def make_block(block: c.Block) -> nn.Module:
    """The module of one U-Net block; Push and Pop hold nothing."""
    match block:
        case c.Conv():
            return nn.Conv2d(block.in_channels, block.out_channels, block.kernel, padding=block.kernel // 2)
        case c.ResBlock():
            return ResBlock(block)
        case c.Attention():
            return Attention(block)
        case c.LinearAttention():
            return LinearAttention(block)
        case c.Downsample():
            return Downsample(block)
        case c.Upsample():
            return Upsample(block)
        case c.TransposedConv():
            return nn.ConvTranspose2d(block.channels, block.channels, 4, stride=2, padding=1)
        case c.SpaceToDepth():
            return nn.PixelUnshuffle(2)
        case c.NormSiLU():
            return NormSiLU(block)
        case c.Pad():
            return Pad(block.pixels)
        case c.ImageIn():
            return nn.Conv2d(block.image_channels, block.channels, 1)
        case c.ImageOut():
            return ImageOut(block)
        case c.Push() | c.Pop() | c.ImageSave() | c.ImageAdd():
            return nn.Identity()
        case _:
            raise ConfigError(f"{type(block).__name__} is not a U-Net block")
