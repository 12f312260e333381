"""A U-Net as somebody's training script may have it: the original that examples/extend/family.py translates."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = (
            nn.GroupNorm(8, width),
            nn.Conv2d(width, 3 * width, 1),
            nn.Conv2d(width, width, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, time: int, attends: bool = False) -> None:
        super().__init__()
        self.norm_a, self.conv_a = nn.GroupNorm(8, width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.norm_b, self.conv_b = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(time, width)
        self.skip = nn.Conv2d(width_in, width, 1) if width_in != width else nn.Identity()
        self.attn = Attention(width) if attends else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv_a(F.silu(self.norm_a(x))) + self.time(F.silu(emb))[:, :, None, None]
        return self.attn(self.skip(x) + self.conv_b(F.silu(self.norm_b(h))))


class Halve(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(x)


class Double(Halve):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PlainUNet(nn.Module):
    """Two resolutions, attention at the lower one; predicts v."""

    def __init__(self, width: int = 16, channels: int = 1) -> None:
        super().__init__()
        self.width, time = width, 4 * width
        self.embed = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.encoder = nn.ModuleList([Block(width, width, time), Halve(width), Block(width, 2 * width, time, True)])
        self.bottleneck = nn.ModuleList([Block(2 * width, 2 * width, time, True)])
        self.decoder = nn.ModuleList(
            [Block(4 * width, 2 * width, time, True), Block(3 * width, 2 * width, time, True), Double(2 * width),
             Block(3 * width, width, time), Block(2 * width, width, time)]
        )  # fmt: skip
        self.out_norm, self.out = nn.GroupNorm(8, width), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float32))
        emb = self.embed(torch.cat([angles.sin(), angles.cos()], dim=1))
        x = self.stem(x)
        skips = [x]
        for layer in self.encoder:
            x = layer(x, emb)
            skips.append(x)
        for layer in self.bottleneck:
            x = layer(x, emb)
        for layer in self.decoder:
            x = layer(x if isinstance(layer, Double) else torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(F.silu(self.out_norm(x)))


def save(model: PlainUNet, path: str, size: int) -> None:
    """As the script saves after every epoch."""
    torch.save({"net": model.state_dict(), "epoch": 3, "image_size": size}, path)
