"""The shipped noise-conditioned classifier: architecture in EncoderUNetModel's order, and initial weights."""

from __future__ import annotations

import torch

from engine.networks import config as c
from engine.networks.blocks.pools import AttentionPoolModule
from engine.networks.classifier import Classifier
from recipes.digits_net import init_weights


def digits_classifier(
    width: int = 32, mult: tuple[int, ...] = (1, 2, 2), depth: int = 1, head_dim: int = 32
) -> c.ClassifierConfig:
    """ADM's encoder for 32x32x1: scale-shift norm, strided convolutions, attention at 8x8 and as pooling."""
    blocks: list[c.Block] = [c.Conv(1, width)]
    ch, last = width, len(mult) - 1
    for level, m in enumerate(mult):
        for _ in range(depth):
            blocks.append(c.ResBlock(ch, width * m, scale_shift=True))
            ch = width * m
            if level == last:
                blocks.append(c.Attention(ch, ch // head_dim, head_dim))
        if level < last:
            blocks.append(c.Downsample(ch, conv=True))
    middle = c.ResBlock(ch, ch, scale_shift=True)
    blocks += [middle, c.Attention(ch, ch // head_dim, head_dim), middle, c.NormSiLU(ch)]
    side = 32 >> last
    blocks.append(c.AttentionPool(ch, ch // head_dim, head_dim, tokens=side * side, out_features=10))
    return c.ClassifierConfig(
        in_channels=1, image_size=(32, 32), time=c.TimeConfig(width, 4 * width),
        blocks=tuple(blocks), num_classes=10,
    )  # fmt: skip


def init_classifier(model: Classifier) -> None:
    """guided-diffusion's initialisation: as the U-Net's; the pool keeps torch's defaults."""
    init_weights(model)
    for module in model.blocks:
        if isinstance(module, AttentionPoolModule):
            # Our q carries the factor 1/sqrt(head_dim) that theirs applies afterwards.
            rows = module.block.heads * module.block.head_dim
            with torch.no_grad():
                module.qkv.weight[:rows] *= module.block.head_dim**-0.5
                module.qkv.bias[:rows] *= module.block.head_dim**-0.5
