"""Which kernels are compiled ahead of time, for which shapes, and what each must move and compute at least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kernels.triton import attention as triton_attention
from kernels.triton import group_norm_silu as triton_group_norm_silu
from kernels.triton import update as triton_update


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A kernel at one shape.

    types: of its parameters in order, in Triton's words; the constexprs' values follow in `constants`.
    moved: bytes read once and written once; operations: multiplications and additions of its matrix products.
    most_registers, most_shared: ceilings of registers a thread and bytes of shared memory on every architecture.
    """

    name: str
    shape: str
    kernel: Any
    types: tuple[str, ...]
    constants: tuple[Any, ...]
    num_warps: int
    num_stages: int
    moved: int
    operations: int
    most_registers: int
    most_shared: int


def cases() -> tuple[KernelCase, ...]:
    """Every kernel, at shapes of the DDPM CIFAR-10 network, of ADM 64 and of a single 256x256 image."""
    return (
        _group_norm("NCHW", 64, 128, 32, 32 * 32),
        _group_norm("channels-last", 64, 128, 32, 32 * 32, channels_last=True),
        _group_norm("NCHW, scale and shift", 16, 384, 32, 32 * 32, modulation=True),
        _group_norm("channels-last, scale and shift", 16, 384, 32, 32 * 32, channels_last=True, modulation=True),
        _group_norm("NCHW, two inputs", 64, 512, 32, 16 * 16, second=True),
        _group_norm("channels-last, two inputs", 64, 512, 32, 16 * 16, channels_last=True, second=True),
        *_split_group_norm("NCHW", 1, 256, 32, 256 * 256),
        *_split_group_norm("channels-last", 1, 256, 32, 256 * 256, channels_last=True),
        _attention(64, 1, 256, 256, "fp16"),
        _attention(16, 6, 1024, 64, "fp16"),
        _attention(16, 12, 64, 64, "bf16"),
        _attention(4, 8, 256, 128, "fp16"),
        _attention(1, 1, 4096, 512, "fp16"),
        _attention(16, 6, 1024, 64, "fp32"),
        _attention(1, 1, 1024, 512, "fp32"),
        _update("noise", 64, 3 * 32 * 32),
        _update("noise, gradient, variance", 64, 3 * 64 * 64, grad=True, variance=True),
        _update("everything", 64, 3 * 64 * 64, grad=True, variance=True, raw=True, extras=True),
        _quantile(64, 3 * 64 * 64),
    )


def _shape_of_norm(batch: int, channels: int, groups: int, positions: int) -> str:
    return f"B={batch} C={channels} groups={groups} HW={positions}, fp16"


def _group_norm(
    how: str, batch: int, channels: int, groups: int, positions: int, channels_last: bool = False,
    modulation: bool = False, second: bool = False,
) -> KernelCase:  # fmt: skip
    launch = triton_group_norm_silu.plan_launch(batch, groups, channels // groups, positions, channels_last)
    assert launch.splits == 1
    tile = (channels // groups, launch.group_tile, launch.channel_tile, launch.position_tile)
    return KernelCase(
        f"GroupNorm+SiLU, {how}",
        _shape_of_norm(batch, channels, groups, positions),
        triton_group_norm_silu.group_norm_silu_whole,
        ("*fp16",) * 7 + ("i32",) * 5 + ("fp32",),
        (*tile, launch.is_resident, channels_last, second, modulation, True),
        launch.num_warps,
        3,
        moved=2 * 2 * batch * channels * positions,
        operations=0,
        most_registers=128,
        most_shared=2048,
    )


def _split_group_norm(
    how: str, batch: int, channels: int, groups: int, positions: int, channels_last: bool = False
) -> tuple[KernelCase, KernelCase]:
    launch = triton_group_norm_silu.plan_launch(batch, groups, channels // groups, positions, channels_last)
    assert launch.splits > 1
    tile = (channels // groups, launch.group_tile, launch.channel_tile, launch.position_tile)
    shape, read = _shape_of_norm(batch, channels, groups, positions), 2 * batch * channels * positions
    statistics = KernelCase(
        f"GroupNorm moments of {launch.splits} parts, {how}",
        shape,
        triton_group_norm_silu.group_norm_partial,
        ("*fp16", "*fp16", "*fp32") + ("i32",) * 5,
        (*tile, channels_last, False),
        launch.num_warps,
        3,
        moved=read,
        operations=0,
        most_registers=128,
        most_shared=2048,
    )
    result = KernelCase(
        f"GroupNorm+SiLU of {launch.splits} parts, {how}",
        shape,
        triton_group_norm_silu.group_norm_silu_apply,
        ("*fp16",) * 6 + ("*fp32", "*fp16") + ("i32",) * 6 + ("fp32",),
        (*tile, 1 << (launch.splits - 1).bit_length(), channels_last, False, False, True),
        launch.num_warps,
        3,
        moved=2 * read,
        operations=0,
        most_registers=128,
        most_shared=2048,
    )
    return statistics, result


def _attention(batch: int, heads: int, tokens: int, head_dim: int, dtype: str) -> KernelCase:
    size = 4 if dtype == "fp32" else 2
    launch = triton_attention.plan_launch(head_dim, tokens, tokens, size)
    return KernelCase(
        "attention",
        f"B={batch} heads={heads} N={tokens} head_dim={head_dim}, {dtype}",
        triton_attention.attention_forward,
        (f"*{dtype}",) * 4 + ("i32",) * 19,
        (head_dim, launch.query_tile, launch.key_tile, launch.dim_tile, False),
        launch.num_warps,
        launch.num_stages,
        moved=4 * size * batch * heads * tokens * head_dim,
        operations=4 * batch * heads * tokens * tokens * head_dim,
        most_registers=255,
        most_shared=100 * 1024,
    )


def _update(
    what: str, slots: int, elements: int, grad: bool = False, variance: bool = False, raw: bool = False,
    extras: bool = False,
) -> KernelCase:  # fmt: skip
    ints, floats = ("*i32",), ("*fp32",)
    # Read: x_t, x0, out; written: x_t, x0. Extras read older (3), known and mask and write older (3).
    maps = 5 + grad + variance + raw + 8 * extras
    return KernelCase(
        f"update, {what}",
        f"B={slots} CHW={elements}, fp32",
        triton_update.solver_step,
        floats + ints * 6 + floats * 9 + ("i32",) * 4,
        (triton_update.QUADS, True, grad, raw, variance, extras),
        4,
        3,
        moved=4 * maps * slots * elements,
        operations=0,
        most_registers=128,
        most_shared=8192,
    )


def _quantile(slots: int, elements: int) -> KernelCase:
    return KernelCase(
        "quantile of abs(x0)",
        f"B={slots} CHW={elements}, fp32",
        triton_update.abs_quantile,
        ("*fp32", "*i32", "*fp32", "*fp32", "*fp32", "i32", "i32"),
        (triton_update.SELECT_TILE,),
        8,
        3,
        moved=2 * 4 * slots * elements,
        operations=0,
        most_registers=128,
        most_shared=2048,
    )
