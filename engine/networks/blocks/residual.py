"""The residual block of DDPM-family networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from engine.errors import BackendError
from engine.networks.blocks.base import Block, Shapes, Tensors
from engine.networks.blocks.target import ONE, THREE, NormRule, Operand, Target, Then, Window
from engine.networks.kinds import Activation, Norm, Resample
from engine.networks.layers import Normalise, resample


@dataclass(frozen=True, slots=True)
class ResBlock(Block):
    """norm, activation, (resample), conv, time projection, norm, activation, conv, plus the shortcut.

    conv_first: conv, norm, time projection, activation, conv, norm, activation instead. scale_shift: the projection is
    (scale, shift) on a norm's result (the second norm, or the first if conv_first) rather than added before the norm.
    has_projection: False for a block that does not see the timestep. resample: applied after the first activation and
    on the shortcut. A 1x1 convolution sits on the shortcut where the channel counts differ or has_shortcut says so.
    output_scale: factor on the sum. groups_out: groups of the second norm, if they differ. fir: resampling filters with
    (1, 3, 3, 1) rather than repeating or averaging. Weights: norm1, conv1, norm2, conv2, shortcut.
    """

    in_channels: int
    out_channels: int
    scale_shift: bool
    resample: Resample | None = None
    groups: int = 32
    eps: float = 1e-5
    norm: Norm = Norm.GROUP
    activation: Activation = Activation.SILU
    conv_first: bool = False
    has_projection: bool = True
    has_shortcut: bool = False
    output_scale: float = 1.0
    groups_out: int | None = None
    fir: bool = False

    int8_convolutions: ClassVar[tuple[str, ...]] = ("conv1", "conv2")
    inner_norms: ClassVar[tuple[str, ...]] = ("norm2",)

    @property
    def projection_channels(self) -> int:
        if not self.has_projection:
            return 0
        return self.out_channels * (2 if self.scale_shift else 1)

    @property
    def resampling(self) -> Resample | None:
        return self.resample

    @property
    def second_groups(self) -> int:
        """Groups of the second norm."""
        return self.groups if self.groups_out is None else self.groups_out

    @property
    def convolves_shortcut(self) -> bool:
        """Whether a 1x1 convolution sits on the shortcut."""
        return self.in_channels != self.out_channels or self.has_shortcut

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.in_channels, self.out_channels)
        shapes.require_norm(self.out_channels if self.conv_first else self.in_channels, self.norm, self.groups)
        if self.groups_out is not None:
            shapes.require_norm(self.out_channels, self.norm, self.groups_out)

    def module(self) -> nn.Module:
        return ResBlockModule(self)

    def run(self, module: nn.Module, tensors: Tensors) -> None:
        h = tensors.cast(tensors.h)
        tensors.h = module(h, next(tensors.projections).to(h.dtype) if self.has_projection else None)

    def lower(self, name: str, target: Target) -> None:
        row = target.take_row(self.projection_channels)
        lower = self._lower_conv_first if self.conv_first else self._lower_norm_first
        target.h = lower(name, target, row)

    def _lower_norm_first(self, name: str, target: Target, row: int | None) -> Operand:
        shortcut, channels = target.h, self.out_channels
        h = target.normalise(f"{name}.norm1", target.h, self._rule(self.groups))
        window = THREE
        if self.resample is not None:
            shortcut = target.resample(shortcut, self.resample, self.fir)
            if self.resample is Resample.UP and not self.fir:
                window = Window(is_upsampled=True)
            else:
                h = target.resample(h, self.resample, self.fir)
        added, modulated = (None, row) if self.scale_shift else (row, None)
        h = target.conv(f"{name}.conv1", h, channels, window, Then(row=added))
        h = target.normalise(f"{name}.norm2", h, self._rule(self.second_groups), Then(row=modulated))
        if self.convolves_shortcut:
            then = Then(extra=shortcut, extra_name=f"{name}.shortcut", scale=self.output_scale)
        else:
            then = Then(add=shortcut, scale=self.output_scale)
        return target.conv(f"{name}.conv2", h, channels, then=then)

    def _lower_conv_first(self, name: str, target: Target, row: int | None) -> Operand:
        if self.resample is not None:
            raise BackendError(f"{name} resamples behind its convolution; choose another backend than native")
        channels = self.out_channels
        h = target.conv(f"{name}.conv1", target.h, channels)
        h = target.normalise(f"{name}.norm1", h, self._rule(self.groups), Then(row=row))
        h = target.conv(f"{name}.conv2", h, channels)
        shortcut = target.h
        if self.convolves_shortcut:
            shortcut = target.conv(f"{name}.shortcut", shortcut, channels, ONE)
        then = Then(add=shortcut, scale=self.output_scale)
        return target.normalise(f"{name}.norm2", h, self._rule(self.second_groups), then)

    def _rule(self, groups: int) -> NormRule:
        return NormRule(self.norm, groups, self.eps, self.activation)


class ResBlockModule(nn.Module):
    """Residual block of DDPM (Ho et al., 2020) and its scale-shift form (Improved DDPM, section 3)."""

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        cin, cout = block.in_channels, block.out_channels
        self.block = block
        self.norm1 = Normalise(cout if block.conv_first else cin, block.norm, block.groups, block.eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = Normalise(cout, block.norm, block.second_groups, block.eps)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.shortcut = nn.Conv2d(cin, cout, 1) if block.convolves_shortcut else nn.Identity()

    def forward(self, x: Tensor, projection: Tensor | None) -> Tensor:
        """x [B, Cin, H, W] and this block's time projection [B, Cout or 2 Cout] -> [B, Cout, H', W']."""
        h = self._conv_first(x, projection) if self.block.conv_first else self._norm_first(x, projection)
        total = h + self.shortcut(resample(x, self.block.resample, self.block.fir))
        return total if self.block.output_scale == 1.0 else total * self.block.output_scale

    def _norm_first(self, x: Tensor, projection: Tensor | None) -> Tensor:
        act = self.block.activation
        h = self.conv1(resample(self.norm1.activated(x, act), self.block.resample, self.block.fir))
        if projection is None:
            h = self.norm2.activated(h, act)
        elif self.block.scale_shift:
            h = self.norm2.modulated(h, projection, act)
        else:
            h = self.norm2.activated(h + projection[:, :, None, None], act)
        return self.conv2(h)

    def _conv_first(self, x: Tensor, projection: Tensor | None) -> Tensor:
        act = self.block.activation
        h = self.conv1(x)
        h = self.norm1.activated(h, act) if projection is None else self.norm1.modulated(h, projection, act)
        return self.norm2.activated(self.conv2(h), act)
