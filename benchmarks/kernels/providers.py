"""Who computes the operators: torch, the reference that the eager backend runs on a CPU, and our kernels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.core.report import Missing
from benchmarks.core.timing import Variant, per_call
from benchmarks.kernels.native_operators import NativeOperators
from engine.device import Device
from engine.networks.operators import TritonOperators
from kernels.native.library import reason_against

NormSilu = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]
"""kernels.reference.group_norm_silu: x [B, C, H, W], weight, bias [C], num_groups, eps."""
ModulatedNormSilu = Callable[[Tensor, Tensor, Tensor, int, float, Tensor, Tensor], Tensor]
"""The same with scale, shift [B, C] between: kernels.reference.scale_shift_silu of group_norm."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""kernels.reference.attention: q, k, v [B, heads, N, head_dim], 1/sqrt(head_dim) part of q."""
Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]
"""3 x 3, stride 1, zeros around: x [B, C, H, W], weight [C', C, 3, 3], bias [C']."""


MakeVariant = Callable[[str, Callable[[], object], Device], Variant]
"""What times one call of an operator: its name, the call, the device."""


@dataclass(frozen=True, slots=True)
class Provider:
    """One implementation of each operator; None where it has none."""

    name: str
    norm_silu: NormSilu | None = None
    modulated_norm_silu: ModulatedNormSilu | None = None
    attention: Attention | None = None
    convolution: Convolution | None = None
    variant: MakeVariant = per_call


BASELINE = "torch"
"""What every other provider is compared with."""


def torch_provider() -> Provider:
    """torch's own operators, called one by one."""
    return Provider(BASELINE, _norm_silu, _modulated_norm_silu, _scaled_dot_product, _convolution)


def triton_provider() -> Provider:
    """Our Triton kernels, as the eager backend calls them on a GPU; they have no convolution."""
    operators = TritonOperators()
    return Provider(
        "triton",
        norm_silu=operators.group_norm_silu,
        modulated_norm_silu=operators.adaptive_group_norm_silu,
        attention=operators.attention,
    )


def native_provider() -> Provider:
    """The kernels of the CPU engine, each inside a program of its own; without the copies of its maps in and out."""
    operators = NativeOperators(torch.get_num_threads())
    return Provider(
        "native",
        norm_silu=operators.norm_silu,
        modulated_norm_silu=operators.modulated_norm_silu,
        attention=operators.attention,
        convolution=operators.convolution,
        variant=operators.variant,
    )


def find_providers(device: torch.device) -> tuple[tuple[Provider, ...], tuple[Missing, ...]]:
    """Those that can be timed on a device, the baseline first, and those that cannot."""
    found, missing = [torch_provider()], []
    if device.type != "cuda":
        if (reason := reason_against()) is None:
            found.append(native_provider())
        else:
            missing.append(Missing("native (group norm, attention, convolution)", reason))
        missing.append(
            Missing(
                "triton (group norm, attention)",
                "its kernels need an NVIDIA GPU, and this machine's torch sees none; Triton's interpreter on a CPU is "
                "for correctness and says nothing of speed",
            )
        )
    elif importlib.util.find_spec("triton") is None:
        missing.append(Missing("triton (group norm, attention)", "not installed; pip install triton"))
    else:
        found.append(triton_provider())
    return tuple(found), tuple(missing)


def _norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
    return F.silu(F.group_norm(x, num_groups, weight, bias, eps))


def _modulated_norm_silu(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor, shift: Tensor
) -> Tensor:
    normed = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(torch.addcmul(shift[:, :, None, None], normed, 1 + scale[:, :, None, None]))


def _scaled_dot_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)
