"""The shipped networks' architectures, as block lists in guided-diffusion's order, and their initial weights."""

from __future__ import annotations

import torch
from torch import nn

from engine.networks import config as c
from engine.networks.blocks.residual import ResBlockModule
from engine.networks.blocks.self_attention import AttentionModule
from engine.networks.classifier import Classifier
from engine.networks.unet import UNet


def digits_unet(
    width: int = 32, mult: tuple[int, ...] = (1, 2, 2, 3), depth: int = 1, head_dim: int = 32
) -> c.UNetConfig:
    """Class-conditional ADM for 32x32x1: learned range, scale-shift norm, 10 classes and the null class.

    Attention stands at the two lowest levels, 8x8 and 4x4. Zero padding is all that tells a network of convolutions
    where it is, and at 4x4 every position is next to it.
    """
    blocks: list[c.Block] = [c.Conv(1, width), c.Push()]
    skips, ch = [width], width
    for level, m in enumerate(mult):
        for _ in range(depth):
            blocks.append(c.ResBlock(ch, width * m, scale_shift=True))
            ch = width * m
            if level >= len(mult) - 2:
                blocks.append(c.Attention(ch, ch // head_dim, head_dim))
            blocks.append(c.Push())
            skips.append(ch)
        if level < len(mult) - 1:
            blocks += [c.Downsample(ch, conv=True), c.Push()]
            skips.append(ch)
    middle = c.ResBlock(ch, ch, scale_shift=True)
    blocks += [middle, c.Attention(ch, ch // head_dim, head_dim), middle]
    for level, m in reversed(list(enumerate(mult))):
        for i in range(depth + 1):
            blocks += [c.Pop(), c.ResBlock(ch + skips.pop(), width * m, scale_shift=True)]
            ch = width * m
            if level >= len(mult) - 2:
                blocks.append(c.Attention(ch, ch // head_dim, head_dim))
            if level and i == depth:
                blocks.append(c.Upsample(ch, conv=True))
    blocks += [c.NormSiLU(ch), c.Conv(ch, 2)]
    return c.UNetConfig(
        in_channels=1, out_channels=2, image_size=(32, 32), time=c.TimeConfig(width, 4 * width),
        blocks=tuple(blocks), num_classes=11, null_class=10,
    )  # fmt: skip


def init_weights(model: UNet | Classifier) -> None:
    """guided-diffusion's initialisation: torch's defaults, zero for each residual branch's last layer and the head."""
    last: list[nn.Module] = [model.blocks[-1]] if isinstance(model.blocks[-1], nn.Conv2d) else []
    with torch.no_grad():
        for module in model.blocks:
            if isinstance(module, ResBlockModule):
                last.append(module.conv2)
            if isinstance(module, AttentionModule):
                last.append(module.out)
                # Our q carries the factor 1/sqrt(head_dim) that theirs applies afterwards.
                rows, scale = module.block.heads * module.block.head_dim, module.block.head_dim**-0.5
                module.qkv.weight[:rows] *= scale
                module.qkv.bias[:rows] *= scale  # type: ignore[index]
        for layer in last:
            for parameter in layer.parameters():
                parameter.zero_()
