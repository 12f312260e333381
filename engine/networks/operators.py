"""Which implementation of its operators a network calls: the reference, or Triton kernels on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from kernels import reference


class Operators(Protocol):
    """The operators that have a fused form; kernels.reference says what they mean."""

    def group_norm(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        """kernels.reference.group_norm."""
        ...

    def group_norm_silu(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        """kernels.reference.group_norm_silu."""
        ...

    def adaptive_group_norm_silu(
        self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor, shift: Tensor
    ) -> Tensor:
        """kernels.reference.scale_shift_silu of group_norm(x); scale, shift [B, C]."""
        ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """kernels.reference.attention."""
        ...


@dataclass(frozen=True, slots=True)
class ReferenceOperators:
    """kernels.reference itself."""

    def group_norm(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        return reference.group_norm(x, weight, bias, num_groups, eps)

    def group_norm_silu(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        return reference.group_norm_silu(x, weight, bias, num_groups, eps)

    def adaptive_group_norm_silu(
        self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor, shift: Tensor
    ) -> Tensor:
        return reference.scale_shift_silu(reference.group_norm(x, weight, bias, num_groups, eps), scale, shift)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.attention(q, k, v)


REFERENCE = ReferenceOperators()


@dataclass(frozen=True, slots=True)
class TritonOperators:
    """kernels.triton_*; raises ImportError on first use where triton is missing."""

    def group_norm(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        from kernels.triton.group_norm_silu import group_norm_silu

        return group_norm_silu(_dense(x), weight, bias, num_groups, eps, silu=False)

    def group_norm_silu(self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float) -> Tensor:
        from kernels.triton.group_norm_silu import group_norm_silu

        return group_norm_silu(_dense(x), weight, bias, num_groups, eps)

    def adaptive_group_norm_silu(
        self, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float, scale: Tensor, shift: Tensor
    ) -> Tensor:
        from kernels.triton.group_norm_silu import group_norm_silu

        return group_norm_silu(_dense(x), weight, bias, num_groups, eps, scale=scale, shift=shift)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        from kernels.triton.attention import MOST_HEAD_DIM, attention

        return attention(q, k, v) if q.shape[3] <= MOST_HEAD_DIM else reference.attention(q, k, v)


def _dense(x: Tensor) -> Tensor:
    """x in one of the two layouts that the kernels take; a crop of a map is in neither."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


class UsesOperators(nn.Module):
    """A block that calls operators with a fused form."""

    operators: Operators = REFERENCE


def use_operators(network: nn.Module, operators: Operators) -> None:
    """Let every block of a network call these."""
    for module in network.modules():
        if isinstance(module, UsesOperators):
            module.operators = operators
