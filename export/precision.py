"""Which numbers an artefact computes in, what stays in float32, and why.

fp16 is a property of the network, not of a builder flag: the module is cast in torch and then exported, so that every
library reads the same types from the file. Four things stay in float32:

    sin/cos of the timestep     at timestep 999 half precision is off by a whole radian; so would learned frequencies be
    group-norm statistics       a mean over up to 10^5 values, and squares that overflow at 65504 (stash_type 1)
    softmax                     exponentials of attention scores span more than half precision's range
    network input and output    the sampler's state is float32; the casts fuse into the neighbouring kernels
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from engine.errors import ExportError
from engine.unet import UNet

FP32 = "fp32 throughout"
FP16 = (
    "fp16 weights and activations; fp32: sin/cos of the timestep, group-norm statistics, softmax, network input and "
    "output"
)


def half_unet(unet: UNet) -> UNet:
    """A copy of the network in float16; raises ExportError for a weight beyond float16's range."""
    half = copy.deepcopy(unet).half()
    if unet.config.time.has_frequencies:
        half.time.frequencies = copy.deepcopy(unet.time.frequencies)
    for name, value in half.named_parameters():
        if not bool(torch.isfinite(value).all()):
            largest = float(unet.get_parameter(name).abs().max())
            raise ExportError(
                f"{name} reaches {largest:.3g}, beyond fp16's 65504; export this checkpoint in fp32 with: "
                "python -m export.to_onnx CHECKPOINT"
            )
    return half


_ACCUMULATING = {
    torch.ops.aten.conv2d,
    torch.ops.aten.convolution,
    torch.ops.aten.linear,
    torch.ops.aten.addmm,
    torch.ops.aten.mm,
    torch.ops.aten.bmm,
    torch.ops.aten.matmul,
}


class GpuHalf(TorchDispatchMode):
    """Inside this context float16 convolutions and matrix products run on a CPU as a GPU computes them.

    Products are summed in float32 and the result is rounded to float16, so an intermediate beyond 65504 becomes
    infinite here as it would there. A CPU's own float16 kernels do the same forty times more slowly, and ONNX
    Runtime's CPU provider keeps float32 between the operators of a float16 file, which hides such an overflow.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func.overloadpacket not in _ACCUMULATING or not _is_half(args):
            return func(*args, **given)
        return func(*tree_map(_to_float, args), **given).half()


def _is_half(args: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.dtype is torch.float16 for value in args)


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype is torch.float16 else value
