"""Which numbers an artefact computes in, what stays in float32, and why.

A type is a property of the network, not of a builder flag: the module is cast in torch and then exported, so that
every library reads the same types from the file. Four things stay in float32 in every half-precision network:

    sin/cos of the timestep     at timestep 999 half precision is off by a whole radian; so would learned frequencies be
    group-norm statistics       a mean over up to 10^5 values, and squares that overflow at 65504 (stash_type 1)
    softmax                     exponentials of attention scores span more than half precision's range
    network input and output    the sampler's state is float32; the casts fuse into the neighbouring kernels

export.fp32_parts names further parts for the network at hand.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from engine.errors import ExportError
from engine.networks.half import cast_unet
from engine.networks.unet import UNet


class Precision(Enum):
    """What a plan computes in; INT8 is FP16 with ResBlocks' 3x3 convolutions in 8 bits."""

    FP16 = "fp16"
    BF16 = "bf16"
    FP32 = "fp32"
    INT8 = "int8"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations, 8-bit ones excepted."""
        return {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}.get(self, torch.float16)


IN_FLOAT = "fp32: sin/cos of the timestep, group-norm statistics, softmax, network input and output"
NOTES = {
    Precision.FP32: "fp32 throughout",
    Precision.FP16: f"fp16 weights and activations; {IN_FLOAT}",
    Precision.BF16: f"bf16 weights and activations; {IN_FLOAT}, norms with their SiLU, rounded once",
    Precision.INT8: f"as fp16 ({IN_FLOAT}), with int8 3x3 convolutions in ResBlocks, whose results are fp32",
}


def typed_unet(unet: UNet, precision: Precision, fp32_parts: Collection[str] = ()) -> UNet:
    """A copy in the precision's type, but for the parts named as engine.networks.half does.

    Raises ExportError for a weight beyond the type's range.
    """
    typed = cast_unet(copy.deepcopy(unet), precision.dtype, fp32_parts)
    for name, value in typed.named_parameters():
        if not bool(torch.isfinite(value).all()):
            largest = float(unet.get_parameter(name).abs().max())
            raise ExportError(
                f"{name} reaches {largest:.3g}, beyond {precision.value}'s "
                f"{torch.finfo(precision.dtype).max:.5g}; export this checkpoint in fp32 with: "
                "python -m export.to_onnx CHECKPOINT"
            )
    return typed


_ACCUMULATING = {
    torch.ops.aten.conv2d,
    torch.ops.aten.convolution,
    torch.ops.aten.linear,
    torch.ops.aten.addmm,
    torch.ops.aten.mm,
    torch.ops.aten.bmm,
    torch.ops.aten.matmul,
}

_HALF = (torch.float16, torch.bfloat16)


class GpuHalf(TorchDispatchMode):
    """Inside this context half-precision convolutions and matrix products run on a CPU as a GPU computes them.

    Products are summed in float32 and the result is rounded, so a float16 intermediate beyond 65504 becomes infinite
    here as it would there. A CPU's own float16 kernels do the same forty times more slowly, and ONNX
    Runtime's CPU provider keeps float32 between the operators of a float16 file, which hides such an overflow.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        half = _half_type(args) if func.overloadpacket in _ACCUMULATING else None
        if half is None:
            return func(*args, **given)
        return func(*tree_map(_to_float, args), **given).to(half)


def _half_type(args: tuple[Any, ...]) -> torch.dtype | None:
    return next((value.dtype for value in args if isinstance(value, Tensor) and value.dtype in _HALF), None)


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _HALF else value
