"""What several blocks' modules are made of: normalisation, non-linearity, change of resolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.networks.kinds import Activation, Norm, Resample
from engine.networks.operators import UsesOperators
from kernels import reference as ops

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.RELU: F.relu,
    Activation.MISH: F.mish,
    Activation.GELU: F.gelu,
    Activation.NONE: lambda x: x,
}


def activate(x: Tensor, activation: Activation) -> Tensor:
    """A pointwise non-linearity of x, any shape."""
    return _ACTIVATIONS[activation](x)


class Normalise(UsesOperators):
    """Any normalisation of engine.networks.kinds.Norm; the block that owns it decides what is fused with it.

    With float32 weights in a half-precision network (engine.networks.half) the norm and what is fused with it are
    computed in float32, and the result is rounded once.
    """

    def __init__(self, channels: int, norm: Norm, groups: int, eps: float) -> None:
        super().__init__()
        self.norm, self.groups, self.eps = norm, groups or channels, eps
        if norm is not Norm.NONE:
            self.weight = nn.Parameter(torch.ones(channels))
        if norm in (Norm.GROUP, Norm.AFFINE):
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> same shape and dtype."""
        return self._normalise(self._taken(x)).to(x.dtype)

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """activation(norm(x)), in one operator where there is one."""
        h = self._taken(x)
        if self.norm is Norm.GROUP and activation is Activation.SILU:
            h = self.operators.group_norm_silu(h, self.weight, self.bias, self.groups, self.eps)
        else:
            h = activate(self._normalise(h), activation)
        return h.to(x.dtype)

    def modulated(self, x: Tensor, projection: Tensor, activation: Activation) -> Tensor:
        """activation(norm(x) * (1 + scale) + shift), in one operator where there is one; projection [B, 2C] is both."""
        h = self._taken(x)
        scale, shift = projection.to(h.dtype).chunk(2, dim=1)
        if activation is not Activation.SILU:
            h = activate(self._normalise(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None], activation)
        elif self.norm is not Norm.GROUP:
            h = ops.scale_shift_silu(self._normalise(h), scale, shift)
        else:
            norm = (self.weight, self.bias, self.groups, self.eps)
            h = self.operators.adaptive_group_norm_silu(h, *norm, scale, shift)
        return h.to(x.dtype)

    def _taken(self, x: Tensor) -> Tensor:
        return x if self.norm is Norm.NONE else x.to(self.weight.dtype)

    def _normalise(self, x: Tensor) -> Tensor:
        match self.norm:
            case Norm.GROUP:
                return self.operators.group_norm(x, self.weight, self.bias, self.groups, self.eps)
            case Norm.RMS:
                return ops.rms_norm(x, self.weight)
            case Norm.LAYER:
                return ops.channel_layer_norm(x, self.weight, self.eps)
            case Norm.AFFINE:
                return x * self.weight[:, None, None] + self.bias[:, None, None]
            case Norm.NONE:
                return x


def resample(x: Tensor, how: Resample | None, fir: bool = False) -> Tensor:
    """x [B, C, H, W] at half, double or the same resolution; without parameters."""
    if fir and how is not None:
        return ops.fir_upsample(x) if how is Resample.UP else ops.fir_downsample(x)
    if how is Resample.UP:
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    if how is Resample.DOWN:
        return F.avg_pool2d(x, 2)
    return x
