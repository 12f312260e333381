"""Where OpenAI's improved-diffusion and guided-diffusion keep each tensor of a block list.

Their state dicts number the groups between skip connections: `input_blocks.i.j` ends at the i-th Push,
`output_blocks.i.j` starts at the i-th Pop, `middle_block.j` lies between, `out.0` and `out.2` are the head.
The same walk reads a checkpoint (rename_weights) and writes one (to_openai).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from engine.networks import config as c

_RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
}


def block_prefixes(blocks: tuple[c.Block, ...]) -> Iterator[tuple[int, c.Block, str]]:
    """Yields (index, block, key prefix) for every block that holds weights, Push and Pop excepted."""
    last_push = max(i for i, b in enumerate(blocks) if isinstance(b, c.Push))
    group, part, position = "input_blocks", 0, 0
    for index, block in enumerate(blocks):
        if isinstance(block, c.Push):
            part, position = part + 1, 0
            if index == last_push:
                group, part = "middle_block", -1
        elif isinstance(block, c.Pop):
            part, position = (part + 1, 0) if group == "output_blocks" else (0, 0)
            group = "output_blocks"
        elif isinstance(block, c.NormSiLU):
            yield index, block, "out.0"
            group, part, position = "out", -1, 2
        else:
            yield index, block, f"{group}.{position}" if part < 0 else f"{group}.{part}.{position}"
            position += 1


def classifier_prefixes(blocks: tuple[c.Block, ...]) -> Iterator[tuple[int, c.Block, str]]:
    """As block_prefixes for an encoder: every Conv, ResBlock and Downsample opens an input group, attention joins
    the group before it, and the last three blocks before the head are the middle."""
    head = next(i for i, b in enumerate(blocks) if isinstance(b, c.NormSiLU))
    part, position = -1, 0
    for index, block in enumerate(blocks[: head - 3]):
        part, position = (part, position + 1) if isinstance(block, c.Attention) else (part + 1, 0)
        yield index, block, f"input_blocks.{part}.{position}"
    for position in range(3):
        yield head - 3 + position, blocks[head - 3 + position], f"middle_block.{position}"
    yield head, blocks[head], "out.0"
    yield head + 1, blocks[head + 1], "out.3" if isinstance(blocks[head + 1], c.AveragePool) else "out.2"


def block_keys(index: int, block: c.Block, prefix: str) -> dict[str, str]:
    """Our parameter prefix -> theirs, for the layers of one block (without .weight and .bias)."""
    ours = f"blocks.{index}"
    match block:
        case c.Conv():
            return {ours: prefix}
        case c.ResBlock():
            names = {f"{ours}.{k}": f"{prefix}.{v}" for k, v in _RES_BLOCK.items()}
            if block.in_channels == block.out_channels:
                del names[f"{ours}.shortcut"]
            return names
        case c.Attention():
            return {
                f"{ours}.norm": f"{prefix}.norm",
                f"{ours}.qkv": f"{prefix}.qkv",
                f"{ours}.out": f"{prefix}.proj_out",
            }
        case c.Downsample(conv=True):
            return {f"{ours}.conv": f"{prefix}.op"}
        case c.Upsample(conv=True):
            return {f"{ours}.conv": f"{prefix}.conv"}
        case c.NormSiLU():
            return {f"{ours}.norm": prefix}
        case c.AttentionPool():
            return {f"{ours}.qkv": f"{prefix}.qkv_proj", f"{ours}.out": f"{prefix}.c_proj"}
        case c.AveragePool():
            return {f"{ours}.linear": f"{prefix}"}
        case _:
            return {}


def fold_qkv(tensor: Tensor, heads: int, legacy: bool) -> Tensor:
    """Their qkv rows (weight [3C, ...] or bias [3C]) in our order, with 1/sqrt(head_dim) folded into q.

    Legacy order is (head, q|k|v, dim); the new order is ours, (q|k|v, head, dim).
    """
    rows = tensor.shape[0]
    dim = rows // (3 * heads)
    split = tensor.reshape(heads, 3, dim, -1).transpose(0, 1) if legacy else tensor.reshape(3, heads, dim, -1)
    folded = torch.cat([split[:1] * dim**-0.5, split[1:]])
    return folded.reshape(tensor.shape)


def unfold_qkv(tensor: Tensor, heads: int, legacy: bool) -> Tensor:
    """Inverse of fold_qkv."""
    dim = tensor.shape[0] // (3 * heads)
    split = tensor.reshape(3, heads, dim, -1)
    split = torch.cat([split[:1] * dim**0.5, split[1:]])
    return (split.transpose(0, 1) if legacy else split).reshape(tensor.shape)
