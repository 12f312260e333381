"""The blocks of a network: frozen values, one class an operator. BLOCK_TYPES is the one list of them."""

from __future__ import annotations

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
