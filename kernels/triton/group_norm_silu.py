"""GroupNorm, adaptive scale and shift, and SiLU in one pass over memory, for NCHW and channels-last maps.

A program takes one group of one image (channels-last: several neighbouring groups, so that a row of its tile is a whole
memory sector). Where there are too few of those to fill a GPU, a group's positions are split over several programs:
one launch writes each part's mean and sum of squared deviations, a second merges them and normalises.
Statistics are float32 and never E[x^2] - E[x]^2: tiles are merged by Chan et al. (1979), eq. 2.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
"""Elements of a tile: 16 a thread; with 32 some architectures run out of registers."""
_PROGRAMS = 256
"""About two for each multiprocessor of a large GPU."""
_MOST_SPLITS = 64
_SECTOR_ELEMENTS = 32
"""Channels that a channels-last tile spans at least: 64 bytes of fp16."""


@dataclass(frozen=True, slots=True)
class GroupNormLaunch:
    """How a shape is cut up: tiles of [group_tile, channel_tile, position_tile], `chunk` positions a program."""

    group_tile: int
    channel_tile: int
    position_tile: int
    chunk: int
    splits: int
    num_warps: int

    @property
    def is_resident(self) -> bool:
        """Whether a program's part is one tile, read once."""
        return self.chunk == self.position_tile


def plan_launch(batch: int, groups: int, group_channels: int, positions: int, channels_last: bool) -> GroupNormLaunch:
    """The cut of x [batch, groups * group_channels, H, W] with positions = H * W."""
    channel_tile = triton.next_power_of_2(group_channels)
    group_tile = 1
    while channels_last and group_tile * channel_tile < _SECTOR_ELEMENTS and group_tile < groups:
        group_tile *= 2
    position_tile = min(triton.next_power_of_2(positions), max(1, _TILE // (group_tile * channel_tile)))
    tiles = triton.cdiv(positions, position_tile)
    programs = batch * triton.cdiv(groups, group_tile)
    splits = max(1, min(tiles, triton.cdiv(_PROGRAMS, programs), _MOST_SPLITS))
    chunk = triton.cdiv(tiles, splits) * position_tile
    tile = group_tile * channel_tile * position_tile
    warps = 8 if tile >= 4096 else 4 if tile >= 1024 else 2
    return GroupNormLaunch(group_tile, channel_tile, position_tile, chunk, triton.cdiv(positions, chunk), warps)


@triton.jit
def _where_tile(start, end, group0, groups, GROUP_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
                POSITION_TILE: tl.constexpr, GROUP_CHANNELS: tl.constexpr):  # fmt: skip
    """Channel [G, C, 1] and position [1, 1, P] of a tile's elements, and which of them exist [G, C, P]."""
    group = group0 + tl.arange(0, GROUP_TILE)[:, None, None]
    within = tl.arange(0, CHANNEL_TILE)[None, :, None]
    position = start + tl.arange(0, POSITION_TILE)[None, None, :]
    exists = (group < groups) & (within < GROUP_CHANNELS) & (position < end)
    return group * GROUP_CHANNELS + within, position, exists


@triton.jit
def _load_tile(x, second, image, channel, position, exists, channels, first_channels, positions,
               CHANNELS_LAST: tl.constexpr, HAS_SECOND: tl.constexpr):  # fmt: skip
    """float32 values; the second map's channels follow the first's."""
    other_channels = channels - first_channels
    if CHANNELS_LAST:
        at = position * first_channels + channel
        at_second = position * other_channels + (channel - first_channels)
    else:
        at = channel * positions + position
        at_second = (channel - first_channels) * positions + position
    base = image.to(tl.int64) * first_channels * positions
    if HAS_SECOND:
        in_first = channel < first_channels
        base_second = image.to(tl.int64) * other_channels * positions
        one = tl.load(x + base + at, mask=exists & in_first, other=0.0).to(tl.float32)
        two = tl.load(second + base_second + at_second, mask=exists & (channel >= first_channels), other=0.0)
        return tl.where(in_first, one, two.to(tl.float32))
    return tl.load(x + base + at, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def _tile_moments(values, exists, count):
    """Mean and sum of squared deviations of each group [G] in a tile; count: elements of a group in it.

    The deviations' own sum, 0 but for rounding, corrects both: a constant group has the exact mean.
    """
    mean = tl.sum(tl.sum(values, axis=2), axis=1) / count
    deviation = tl.where(exists, values - mean[:, None, None], 0.0)
    rest = tl.sum(tl.sum(deviation, axis=2), axis=1)
    squares = tl.sum(tl.sum(deviation * deviation, axis=2), axis=1)
    return mean + rest / count, tl.maximum(squares - rest * rest / count, 0.0)


@triton.jit
def _moments(x, second, image, group0, groups, start, end, channels, first_channels, positions,
             GROUP_CHANNELS: tl.constexpr, GROUP_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
             POSITION_TILE: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_SECOND: tl.constexpr):  # fmt: skip
    """Mean and sum of squared deviations [G] over the positions from start to end."""
    mean = tl.zeros((GROUP_TILE,), tl.float32)
    squares = tl.zeros((GROUP_TILE,), tl.float32)
    for at in range(start, end, POSITION_TILE):
        channel, position, exists = _where_tile(at, end, group0, groups, GROUP_TILE, CHANNEL_TILE, POSITION_TILE,
                                                GROUP_CHANNELS)  # fmt: skip
        values = _load_tile(x, second, image, channel, position, exists, channels, first_channels, positions,
                            CHANNELS_LAST, HAS_SECOND)  # fmt: skip
        count = tl.cast(tl.minimum(end - at, POSITION_TILE) * GROUP_CHANNELS, tl.float32)
        before = tl.cast((at - start) * GROUP_CHANNELS, tl.float32)
        tile_mean, tile_squares = _tile_moments(values, exists, count)
        delta = tile_mean - mean
        share = count / (before + count)
        mean += delta * share
        squares += tile_squares + delta * delta * before * share
    return mean, squares


@triton.jit
def _store_tile(y, values, mean, rstd, weight, bias, scale, shift, image, channel, position, exists, channels,
                positions, modulation_stride, CHANNELS_LAST: tl.constexpr, HAS_MODULATION: tl.constexpr,
                SILU: tl.constexpr):  # fmt: skip
    is_channel = channel < channels
    gain = tl.load(weight + channel, mask=is_channel, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=is_channel, other=0.0).to(tl.float32)
    h = (values - mean[:, None, None]) * rstd[:, None, None] * gain + offset
    if HAS_MODULATION:
        row = image.to(tl.int64) * modulation_stride
        h = h * (1.0 + tl.load(scale + row + channel, mask=is_channel, other=0.0).to(tl.float32))
        h += tl.load(shift + row + channel, mask=is_channel, other=0.0).to(tl.float32)
    if SILU:
        # Below -80 the result is 0 in every type; the exponential must not overflow on the way there.
        h = h / (1.0 + tl.exp(tl.minimum(-h, 80.0)))
    at = position * channels + channel if CHANNELS_LAST else channel * positions + position
    tl.store(y + image.to(tl.int64) * channels * positions + at, h.to(y.dtype.element_ty), mask=exists)


@triton.jit
def _normalise(x, second, weight, bias, scale, shift, y, mean, rstd, image, group0, groups, start, end, channels,
               first_channels, positions, modulation_stride, GROUP_CHANNELS: tl.constexpr, GROUP_TILE: tl.constexpr,
               CHANNEL_TILE: tl.constexpr, POSITION_TILE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
               HAS_SECOND: tl.constexpr, HAS_MODULATION: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    for at in range(start, end, POSITION_TILE):
        channel, position, exists = _where_tile(at, end, group0, groups, GROUP_TILE, CHANNEL_TILE, POSITION_TILE,
                                                GROUP_CHANNELS)  # fmt: skip
        values = _load_tile(x, second, image, channel, position, exists, channels, first_channels, positions,
                            CHANNELS_LAST, HAS_SECOND)  # fmt: skip
        _store_tile(y, values, mean, rstd, weight, bias, scale, shift, image, channel, position, exists, channels,
                    positions, modulation_stride, CHANNELS_LAST, HAS_MODULATION, SILU)  # fmt: skip


@triton.jit
def group_norm_silu_whole(x, second, weight, bias, scale, shift, y, groups, channels, first_channels, positions,
                          modulation_stride, eps, GROUP_CHANNELS: tl.constexpr, GROUP_TILE: tl.constexpr,
                          CHANNEL_TILE: tl.constexpr, POSITION_TILE: tl.constexpr, RESIDENT: tl.constexpr,
                          CHANNELS_LAST: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_MODULATION: tl.constexpr,
                          SILU: tl.constexpr):  # fmt: skip
    """Program (image, tile of groups): statistics, then the result."""
    image = tl.program_id(0)
    group0 = tl.program_id(1) * GROUP_TILE
    size = tl.cast(positions * GROUP_CHANNELS, tl.float32)
    if RESIDENT:
        channel, position, exists = _where_tile(0, positions, group0, groups, GROUP_TILE, CHANNEL_TILE,
                                                POSITION_TILE, GROUP_CHANNELS)  # fmt: skip
        values = _load_tile(x, second, image, channel, position, exists, channels, first_channels, positions,
                            CHANNELS_LAST, HAS_SECOND)  # fmt: skip
        mean, squares = _tile_moments(values, exists, size)
        rstd = tl.rsqrt(squares / size + eps)
        _store_tile(y, values, mean, rstd, weight, bias, scale, shift, image, channel, position, exists, channels,
                    positions, modulation_stride, CHANNELS_LAST, HAS_MODULATION, SILU)  # fmt: skip
    else:
        mean, squares = _moments(x, second, image, group0, groups, 0, positions, channels, first_channels, positions,
                                 GROUP_CHANNELS, GROUP_TILE, CHANNEL_TILE, POSITION_TILE, CHANNELS_LAST,
                                 HAS_SECOND)  # fmt: skip
        rstd = tl.rsqrt(squares / size + eps)
        _normalise(x, second, weight, bias, scale, shift, y, mean, rstd, image, group0, groups, 0, positions, channels,
                   first_channels, positions, modulation_stride, GROUP_CHANNELS, GROUP_TILE, CHANNEL_TILE,
                   POSITION_TILE, CHANNELS_LAST, HAS_SECOND, HAS_MODULATION, SILU)  # fmt: skip


@triton.jit
def group_norm_partial(x, second, partial, groups, channels, first_channels, positions, chunk,
                       GROUP_CHANNELS: tl.constexpr, GROUP_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr,
                       POSITION_TILE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
                       HAS_SECOND: tl.constexpr):  # fmt: skip
    """Program (image, tile of groups, part): partial[image, group, part] = mean, sum of squared deviations."""
    image = tl.program_id(0)
    group0 = tl.program_id(1) * GROUP_TILE
    part = tl.program_id(2)
    start = part * chunk
    end = tl.minimum(start + chunk, positions)
    mean, squares = _moments(x, second, image, group0, groups, start, end, channels, first_channels, positions,
                             GROUP_CHANNELS, GROUP_TILE, CHANNEL_TILE, POSITION_TILE, CHANNELS_LAST,
                             HAS_SECOND)  # fmt: skip
    group = group0 + tl.arange(0, GROUP_TILE)
    at = partial + ((image * groups + group) * tl.num_programs(2) + part) * 2
    tl.store(at, mean, mask=group < groups)
    tl.store(at + 1, squares, mask=group < groups)


@triton.jit
def group_norm_silu_apply(x, second, weight, bias, scale, shift, partial, y, groups, channels, first_channels,
                          positions, chunk, modulation_stride, eps, GROUP_CHANNELS: tl.constexpr,
                          GROUP_TILE: tl.constexpr, CHANNEL_TILE: tl.constexpr, POSITION_TILE: tl.constexpr,
                          SPLIT_TILE: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_SECOND: tl.constexpr,
                          HAS_MODULATION: tl.constexpr, SILU: tl.constexpr):  # fmt: skip
    """Program (image, tile of groups, part): the result of a part, from the moments of all parts."""
    image = tl.program_id(0)
    group0 = tl.program_id(1) * GROUP_TILE
    start = tl.program_id(2) * chunk
    group = (group0 + tl.arange(0, GROUP_TILE))[:, None]
    part = tl.arange(0, SPLIT_TILE)[None, :]
    exists = (group < groups) & (part < tl.num_programs(2))
    at = partial + ((image * groups + group) * tl.num_programs(2) + part) * 2
    means = tl.load(at, mask=exists, other=0.0)
    squares = tl.load(at + 1, mask=exists, other=0.0)
    counts = tl.where(exists, tl.minimum(positions - part * chunk, chunk) * GROUP_CHANNELS, 0).to(tl.float32)
    size = tl.cast(positions * GROUP_CHANNELS, tl.float32)
    mean = tl.sum(means * counts, axis=1) / size
    deviation = means - mean[:, None]
    rstd = tl.rsqrt(tl.sum(squares + counts * deviation * deviation, axis=1) / size + eps)
    end = tl.minimum(start + chunk, positions)
    _normalise(x, second, weight, bias, scale, shift, y, mean, rstd, image, group0, groups, start, end, channels,
               first_channels, positions, modulation_stride, GROUP_CHANNELS, GROUP_TILE, CHANNEL_TILE, POSITION_TILE,
               CHANNELS_LAST, HAS_SECOND, HAS_MODULATION, SILU)  # fmt: skip


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    *,
    silu: bool = True,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    second: Tensor | None = None,
) -> Tensor:
    """SiLU(GroupNorm(x) * (1 + scale) + shift); kernels.reference.group_norm_silu and scale_shift_silu say what it is.

    x: [B, C1, H, W] float16, bfloat16 or float32, NCHW or channels-last; second: [B, C2, H, W] like it, read as if
    concatenated behind x along channels. weight, bias: [C1 + C2]; scale, shift: [B, C1 + C2] or None, rows contiguous.
    Returns [B, C1 + C2, H, W] in x's type and layout. The statistics are float32. Raises ValueError for other inputs.
    """
    channels_last = _check(x, weight, bias, num_groups, scale, shift, second)
    batch, first_channels, height, width = x.shape
    channels, positions = len(weight), height * width
    group_channels = channels // num_groups
    launch = plan_launch(batch, num_groups, group_channels, positions, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y = torch.empty((batch, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    other = x if second is None else second
    scale_rows, shift_rows = (weight, weight) if scale is None or shift is None else (scale, shift)
    stride = 0 if scale is None else scale.stride(0)
    shape = (num_groups, channels, first_channels, positions)
    tile = (group_channels, launch.group_tile, launch.channel_tile, launch.position_tile)
    flags = (channels_last, second is not None)
    ending = (scale is not None, silu)
    grid = (batch, triton.cdiv(num_groups, launch.group_tile), launch.splits)
    inputs = (x, other, weight, bias, scale_rows, shift_rows)
    if launch.splits == 1:
        group_norm_silu_whole[grid[:2]](
            *inputs, y, *shape, stride, eps, *tile, launch.is_resident, *flags, *ending, num_warps=launch.num_warps
        )
        return y
    partial = torch.empty((batch, num_groups, launch.splits, 2), dtype=torch.float32, device=x.device)
    group_norm_partial[grid](x, other, partial, *shape, launch.chunk, *tile, *flags, num_warps=launch.num_warps)
    group_norm_silu_apply[grid](
        *inputs, partial, y, *shape, launch.chunk, stride, eps, *tile, triton.next_power_of_2(launch.splits),
        *flags, *ending, num_warps=launch.num_warps,
    )  # fmt: skip
    return y


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, scale: Tensor | None, shift: Tensor | None,
    second: Tensor | None,
) -> bool:  # fmt: skip
    """Whether the maps are channels-last; raises ValueError for what the kernels cannot take."""
    if x.ndim != 4 or not x.is_floating_point() or x.dtype is torch.float64:
        raise ValueError(f"x has shape {tuple(x.shape)} {x.dtype}, expected [B, C, H, W] of 32 or 16 bits")
    channels_last = _is_channels_last(x)
    channels = x.shape[1]
    if second is not None:
        if (second.shape[0], *second.shape[2:]) != (x.shape[0], *x.shape[2:]) or second.dtype != x.dtype:
            raise ValueError(
                f"second is {tuple(second.shape)} {second.dtype}, expected one beside {tuple(x.shape)} {x.dtype}"
            )
        if not second.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format):
            raise ValueError(f"second has strides {second.stride()}, expected the layout of x, {x.stride()}")
        channels += second.shape[1]
    if weight.shape != (channels,) or bias.shape != (channels,) or channels % num_groups:
        raise ValueError(
            f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}, {num_groups} groups, expected to fit {channels}"
        )
    if (scale is None) != (shift is None):
        raise ValueError("scale and shift come together; one of them is None")
    for name, rows in (("scale", scale), ("shift", shift)):
        if rows is not None and (rows.shape != (len(x), channels) or rows.stride(1) != 1):
            raise ValueError(
                f"{name} is {tuple(rows.shape)} with strides {rows.stride()}, expected [{len(x)}, {channels}] in rows"
            )
    if scale is not None and shift is not None and scale.stride(0) != shift.stride(0):
        raise ValueError(
            f"scale and shift have row strides {scale.stride(0)} and {shift.stride(0)}, expected equal ones"
        )
    return channels_last


def _is_channels_last(x: Tensor) -> bool:
    if x.is_contiguous():
        return False
    if x.is_contiguous(memory_format=torch.channels_last):
        return True
    raise ValueError(f"x has strides {x.stride()}, expected NCHW or channels-last; call .contiguous() on it")
