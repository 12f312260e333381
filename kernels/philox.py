"""Philox 4x32-10 normals in plain torch: the same numbers on a CPU and on a GPU, from keys in device memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox_normal(seed_low: Tensor, seed_high: Tensor, draw: Tensor, shape: tuple[int, ...], stream: int) -> Tensor:
    """Standard normal noise [B, *shape] float32; entry b is that draw of that stream of its seed.

    seed_low, seed_high, draw: [B] int32 or int64, of which the low 32 bits count. Words, uniforms and normals are
    those of Salmon et al. (2011) and Box & Muller (1958): the key is the seed's words and the counter (element // 4,
    draw, stream, 0); u = ((w >> 9) + 0.5) * 2^-23; words (0, 1) and (2, 3) give r*cos and r*sin. In float64, rounded
    once. Nothing waits for the device.
    """
    elements = math.prod(shape)
    blocks = -(-elements // 4)
    key = [(word.to(torch.int64) & _LOW)[:, None] for word in (seed_low, seed_high)]
    counter = [
        torch.arange(blocks, dtype=torch.int64, device=draw.device)[None],
        (draw.to(torch.int64) & _LOW)[:, None],
        torch.full((1, 1), stream, dtype=torch.int64, device=draw.device),
        torch.zeros((1, 1), dtype=torch.int64, device=draw.device),
    ]
    words = _philox(key, counter)
    pairs = [_box_muller(words[0], words[1]), _box_muller(words[2], words[3])]
    normals = torch.stack([value for pair in pairs for value in pair], dim=2).flatten(1)
    return normals[:, :elements].reshape(len(draw), *shape)


def _philox(key: list[Tensor], counter: list[Tensor]) -> list[Tensor]:
    """Four words [B, blocks] as int64 below 2^32; Salmon et al. (2011), figure 2."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for round_index in range(_ROUNDS):
        if round_index:
            k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
        # The product of two words may pass 2^63 and wrap; its 64 bits are those of the unsigned one.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _LOW) ^ c1 ^ k0,
            product1 & _LOW,
            ((product0 >> 32) & _LOW) ^ c3 ^ k1,
            product0 & _LOW,
        )
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def _box_muller(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    radius = torch.sqrt(-2.0 * torch.log(_uniform(first)))
    angle = (2.0 * math.pi) * _uniform(second)
    return (radius * torch.cos(angle)).to(torch.float32), (radius * torch.sin(angle)).to(torch.float32)


def _uniform(word: Tensor) -> Tensor:
    return ((word >> 9).to(torch.float64) + 0.5) * 2.0**-23
