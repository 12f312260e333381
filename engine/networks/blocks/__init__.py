"""The blocks of a network: frozen values, one class an operator, with a JSON form.

BLOCK_TYPES is the one list of them. Field values that are enums are written as their strings.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from engine.errors import ConfigError
from engine.networks.blocks.base import Block
from engine.networks.blocks.convolutions import Conv, NormSiLU
from engine.networks.blocks.image_pyramid import ImageAdd, ImageIn, ImageOut, ImageSave
from engine.networks.blocks.pools import AttentionPool, AveragePool
from engine.networks.blocks.resampling import Downsample, Pad, SpaceToDepth, TransposedConv, Upsample
from engine.networks.blocks.residual import ResBlock
from engine.networks.blocks.self_attention import Attention, LinearAttention
from engine.networks.blocks.skips import Pop, Push
from engine.networks.kinds import Activation, Norm, Resample

__all__ = [
    "BLOCK_TYPES",
    "Activation",
    "Attention",
    "AttentionPool",
    "AveragePool",
    "Block",
    "Conv",
    "Downsample",
    "ImageAdd",
    "ImageIn",
    "ImageOut",
    "ImageSave",
    "LinearAttention",
    "Norm",
    "NormSiLU",
    "Pad",
    "Pop",
    "Push",
    "ResBlock",
    "Resample",
    "SpaceToDepth",
    "TransposedConv",
    "Upsample",
    "block_from_dict",
    "block_to_dict",
]

BLOCK_TYPES: dict[str, type[Block]] = {
    "conv": Conv,
    "res_block": ResBlock,
    "attention": Attention,
    "linear_attention": LinearAttention,
    "downsample": Downsample,
    "upsample": Upsample,
    "transposed_conv": TransposedConv,
    "space_to_depth": SpaceToDepth,
    "norm_silu": NormSiLU,
    "pad": Pad,
    "push": Push,
    "pop": Pop,
    "image_save": ImageSave,
    "image_in": ImageIn,
    "image_out": ImageOut,
    "image_add": ImageAdd,
    "attention_pool": AttentionPool,
    "average_pool": AveragePool,
}
"""Every block by the name that its JSON form gives it."""


def block_to_dict(block: Block) -> dict[str, Any]:
    """JSON form of a block: its type's name and the values that are not the defaults.

    Raises ConfigError for a class that BLOCK_TYPES does not name.
    """
    values = {f.name: getattr(block, f.name) for f in dataclasses.fields(block) if getattr(block, f.name) != f.default}
    name = next((name for name, cls in BLOCK_TYPES.items() if cls is type(block)), None)
    if name is None:
        raise ConfigError(f"{type(block).__name__} is not named in engine.networks.blocks.BLOCK_TYPES; add it there")
    return {"type": name} | {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}


def block_from_dict(data: dict[str, Any]) -> Block:
    """The block that block_to_dict wrote; raises ConfigError for an unknown type, field or value."""
    values = dict(data)
    name = values.pop("type", None)
    cls = BLOCK_TYPES.get(str(name))
    if cls is None:
        raise ConfigError(f"unknown block type {name!r}; known: {', '.join(BLOCK_TYPES)}")
    try:
        for field, enum in _enums(cls):
            if isinstance(values.get(field), str):
                values[field] = enum(values[field])
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"block {name!r} has wrong fields: {error}") from error


def _enums(cls: type[Block]) -> Iterator[tuple[str, type[Enum]]]:
    """The fields that hold an enum, or an enum or None."""
    for field, hint in typing.get_type_hints(cls).items():
        for kind in typing.get_args(hint) or (hint,):
            if isinstance(kind, type) and issubclass(kind, Enum):
                yield field, kind
