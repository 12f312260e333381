"""A network in half precision, with what must not be left in float32.

A float32 part is named by its module: "time" is the time embedding, "blocks.3" a whole block, "blocks.3.norm1" a norm
together with the activation behind it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch

from engine.networks.layers import Normalise
from engine.networks.unet import UNet


def cast_unet(unet: UNet, dtype: torch.dtype, fp32_parts: Collection[str] = ()) -> UNet:
    """Turn the weights of a float32 network, in place, into `dtype` but for the parts named; returns it.

    Blocks cast what they are given to the type of their weights. The frequencies of Fourier features stay in float32:
    the angles of a timestep need it.
    """
    parts = {*fp32_parts, "time.frequencies"}
    for name, parameter in unet.named_parameters():
        if not any(name == part or name.startswith(part + ".") for part in parts):
            parameter.data = parameter.data.to(dtype)
    unet.types = tuple(
        torch.float32 if f"blocks.{index}" in parts else dtype if any(True for _ in block.parameters()) else None
        for index, block in enumerate(unet.blocks)
    )
    return unet


def norm_names(unet: UNet) -> tuple[str, ...]:
    """The names of every normalisation that has weights."""
    modules = unet.named_modules()
    return tuple(name for name, module in modules if isinstance(module, Normalise) and hasattr(module, "weight"))
