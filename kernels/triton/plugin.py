"""GroupNorm+SiLU with the parameters of a TensorRT plugin: inputs, integers, outputs, and the rest constants."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.group_norm_silu import group_norm_silu_whole


@triton.jit
def group_norm_silu_plugin(x, weight, bias, positions, y, EPS: tl.constexpr, GROUPS: tl.constexpr,
                           GROUP_CHANNELS: tl.constexpr, CHANNEL_TILE: tl.constexpr, POSITION_TILE: tl.constexpr,
                           RESIDENT: tl.constexpr):  # fmt: skip
    """Program (image, group) of x [N, C, H, W] in NCHW; positions: H * W."""
    group_norm_silu_whole(x, x, weight, bias, x, x, y, GROUPS, GROUPS * GROUP_CHANNELS, GROUPS * GROUP_CHANNELS,
                          positions, 0, EPS, GROUP_CHANNELS, 1, CHANNEL_TILE, POSITION_TILE, RESIDENT, False, False,
                          False, True)  # fmt: skip
