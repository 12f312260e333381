"""Networks for the tests of the CPU engine: one of each block and option, each family's, and drawn ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import test_family_abarankab as abarankab
import test_family_lucidrains as lucidrains
import test_family_tutorial as tutorial
import test_family_w86763777 as w86763777
from helpers import adm_unet
from hypothesis import strategies as st
from torch import Tensor

from engine.networks import config as c
from kernels.native import library
from kernels.native.library import Isa, NativeError

UP, DOWN = c.Resample.UP, c.Resample.DOWN


def network(
    *blocks: c.Block, channels: int = 3, out: int | None = None, size: tuple[int, int] = (6, 10)
) -> c.UNetConfig:
    return c.UNetConfig(channels, channels if out is None else out, size, c.TimeConfig(8, 12), blocks)


def res(cin: int = 8, cout: int = 8, scale_shift: bool = False, **options: object) -> c.ResBlock:
    return c.ResBlock(cin, cout, scale_shift, **{"groups": 4} | options)


def between(*blocks: c.Block, width: int = 8, end: int = 8, size: tuple[int, int] = (6, 10)) -> c.UNetConfig:
    """Blocks between two convolutions, on maps of `width` channels."""
    return network(c.Conv(3, width), *blocks, c.Conv(end, 3), size=size)


SIDE_IMAGE = network(
    c.ImageSave(),
    c.Conv(3, 8),
    c.Push(),
    res(resample=DOWN, fir=True, output_scale=0.7),
    c.ImageIn(3, 8),
    c.Push(),
    res(),
    c.Pop(),
    res(16, 8, groups_out=2),
    c.ImageOut(8, 5, 4, is_first=True),
    res(resample=UP, fir=True),
    c.Pop(),
    c.ImageOut(16, 5, 4),
    c.Conv(16, 10),
    c.ImageSave(),
    c.Downsample(10, False),
    c.ImageOut(10, 3, 2, is_first=True),
    c.Conv(10, 3),
    c.Upsample(3, False),
    c.ImageAdd(),
    size=(8, 12),
)

BLOCKS: dict[str, c.UNetConfig] = {
    **{f"conv {k}": network(c.Conv(3, 20, k), c.Conv(20, 3, k)) for k in (1, 3, 5, 7)},
    **{f"{norm.value} norm": between(c.NormSiLU(8, 4, 1e-3, norm)) for norm in c.Norm},
    **{f"{act.value}": between(c.NormSiLU(8, 4, activation=act)) for act in c.Activation},
    "nothing": between(c.NormSiLU(8, norm=c.Norm.NONE, activation=c.Activation.NONE)),
    "instance norm": between(c.NormSiLU(8, 0)),
    "res block": between(res()),
    "scale and shift": between(res(scale_shift=True)),
    "shortcut": between(res(8, 20), end=20),
    "asked shortcut": between(res(has_shortcut=True, output_scale=0.5)),
    "no projection": between(res(has_projection=False)),
    "output scale": between(res(output_scale=0.25)),
    "groups out": between(res(groups_out=2), res(8, 12, groups_out=0), end=12),
    **{
        f"res block {how.value}, fir {fir}, to {end}": between(
            res(8, end, scale_shift, resample=how, fir=fir), end=end, size=(5, 7)
        )
        for how in c.Resample
        for fir in (False, True)
        for end, scale_shift in ((8, False), (12, True))
    },
    **{
        f"conv first {norm.value}, to {end}": between(
            res(8, end, True, norm=norm, conv_first=True, activation=c.Activation.GELU),
            res(end, end, True, norm=norm, conv_first=True, has_projection=False, output_scale=0.5),
            end=end,
        )
        for norm in c.Norm
        for end in (8, 12)
    },
    **{f"res block {norm.value} norm": between(res(norm=norm), res(scale_shift=True, norm=norm)) for norm in c.Norm},
    "attention": between(c.Attention(8, 2, 4, 4)),
    "one wide head": between(c.Attention(40, 1, 40, 4), width=40, end=40),
    "attention memory": between(c.Attention(8, 3, 5, 4, memory=4, norm=c.Norm.RMS)),
    "attention cosine": between(c.Attention(8, 2, 4, 4, cosine_scale=10.0, norm=c.Norm.NONE)),
    "attention cosine memory": between(c.Attention(8, 2, 4, 4, cosine_scale=16.0, memory=3, norm=c.Norm.LAYER)),
    "attention on norm": between(c.Attention(8, 2, 4, 4, adds_to_norm=True, output_scale=0.7)),
    **{
        f"linear attention {out.value}": between(
            c.LinearAttention(8, 2, 4, 4, norm=c.Norm.RMS, out_norm=out, memory=memory, divides_values=divides)
        )
        for out, memory, divides in zip(c.Norm, (0, 4, 0, 2, 4), (False, True, True, False, False), strict=True)
    },
    "downsample": between(c.Downsample(8, True), c.Downsample(8, True, out_channels=20), end=20, size=(7, 9)),
    "downsample at the end": between(c.Downsample(8, True, pads_end=True), size=(7, 8)),
    "downsample 4": between(c.Downsample(8, True, 4), size=(8, 9)),
    "downsample 5": between(c.Downsample(8, True, 5), size=(7, 8)),
    "downsample 1": between(c.Downsample(8, True, 1), size=(7, 8)),
    "average": between(c.Downsample(8, False), size=(7, 9)),
    "upsample": between(c.Upsample(8, True), c.Upsample(8, False), size=(3, 4)),
    "transposed": between(c.TransposedConv(8), size=(3, 5)),
    "space to depth": between(c.SpaceToDepth(8), end=32),
    "pad": between(c.Pad(8, 2), res(), c.Pad(8, -3)),
    "side image": SIDE_IMAGE,
    "one pixel": between(res(), c.Attention(8, 2, 4, 4), size=(1, 1)),
    "skips of skips": between(
        *(c.Push(), c.Push(), c.Push(), c.Pop(), c.Push(), c.Pop(), c.Pop(), c.Pop()),
        *(res(48, 20), c.Push(), c.Upsample(20, False), c.Downsample(20, False), c.Pop()),
        *(c.Attention(40, 2, 4, 4), c.Push(), c.Pop(), c.LinearAttention(80, 2, 4, 4), c.Push(), c.Pop()),
        *(res(160, 160), c.Push(), c.Conv(160, 16), c.Pop(), res(176, 8)),
    ),
    **{
        f"{name} of two maps": between(c.Push(), c.Conv(8, width), c.Pop(), block, end=end, size=(6, 8))
        for width in (16, 20)
        for name, block, end in (
            (f"{width}, res block", res(width + 8, 12), 12),
            (f"{width}, res block up", res(width + 8, width + 8, resample=UP), width + 8),
            (f"{width}, res block down to 12", res(width + 8, 12, resample=DOWN), 12),
            (f"{width}, conv first", res(width + 8, width + 8, True, conv_first=True), width + 8),
            (f"{width}, upsample", c.Upsample(width + 8, True), width + 8),
            (f"{width}, downsample", c.Downsample(width + 8, True), width + 8),
            (f"{width}, transposed", c.TransposedConv(width + 8), width + 8),
            (f"{width}, space to depth", c.SpaceToDepth(width + 8), 4 * width + 32),
            (f"{width}, pad", c.Pad(width + 8, 1), width + 8),
            (f"{width}, attention", c.Attention(width + 8, 2, 4, 4, norm=c.Norm.LAYER), width + 8),
            (
                f"{width}, attention on norm",
                c.Attention(width + 8, 2, 4, norm=c.Norm.NONE, adds_to_norm=True),
                width + 8,
            ),
        )
    },
    "pass through": network(size=(4, 6)),
    "end of two maps": network(c.Push(), c.Conv(3, 5), c.Pop(), out=8),
}
"""One of each block and option, odd sizes and channels that are no multiple of 16 among them."""

ADM: dict[str, c.UNetConfig] = {
    "plain": adm_unet(),
    "added": adm_unet(scale_shift=False, conv_resample=False, mult=(1, 1, 2)),
    "updown": adm_unet(updown=True, depth=2, attention=(0, 1)),
    "heads": adm_unet(heads=4, heads_up=2, attention=(0, 1), size=(8, 12)),
    "labels": adm_unet(num_classes=5, null_class=4, learn_sigma=True),
    "condition": adm_unet(channels=3, super_resolution=True),
    "condition first": replace(adm_unet(channels=2, super_resolution=True), cond_first=True),
    "score": replace(adm_unet(), divides_by_timestep=True),
    "number": replace(adm_unet(num_classes=5), label=c.LabelInput.NUMBER),
    "vector": replace(adm_unet(num_classes=5), label=c.LabelInput.VECTOR),
    "label projection": replace(adm_unet(num_classes=5), label_projection=True),
    "time table": replace(adm_unet(), time=c.TimeConfig(32, 128, table_rows=100, activation=c.Activation.MISH)),
    "frequencies": replace(adm_unet(), time=c.TimeConfig(32, 128, has_frequencies=True)),
}
"""Guided-diffusion's networks with every kind of label and time embedding."""


def _diffusers(name: str, folder: Path) -> c.UNetConfig:
    pytest.importorskip("diffusers")
    import test_family_diffusers as diffusers

    return _unet(diffusers.load_checkpoint(diffusers.make_folder(folder, diffusers.LAYOUTS[name])))


def _unet(checkpoint: lucidrains.Checkpoint) -> c.UNetConfig:
    assert isinstance(checkpoint.config, c.UNetConfig)
    return checkpoint.config


def _abarankab(name: str, folder: Path) -> c.UNetConfig:
    arguments, facts = abarankab.OPTIONS[name]
    return _unet(abarankab.load(folder, abarankab.content(arguments), **facts))


def _lucidrains(name: str, folder: Path) -> c.UNetConfig:
    arguments, facts = lucidrains.OLD_RELEASES[name]
    return _unet(lucidrains.load_old(folder, arguments, **facts))


FAMILIES: dict[str, Callable[[Path], c.UNetConfig]] = {
    **{f"abarankab {name}": partial(_abarankab, name) for name in abarankab.OPTIONS},
    **{f"lucidrains {name}": partial(_lucidrains, name) for name in lucidrains.OLD_RELEASES},
    **{f"diffusers {name}": partial(_diffusers, name) for name in ("plain", "skip")},
    "tutorial": lambda folder: _unet(tutorial.load(folder, tutorial.network(), num_heads=4)),
    "w86763777": lambda folder: _unet(w86763777.load(folder, w86763777.content())),
}
"""The families' networks as their translators read them from files."""

WIDTHS = (1, 2, 3, 5, 8, 16, 17, 20, 32)


class Draw:
    """A block list that is being drawn, with the channels and size behind its last block."""

    def __init__(self, draw: st.DrawFn, channels: int, size: tuple[int, int]) -> None:
        self.draw, self.channels, self.size = draw, channels, size
        self.blocks: list[c.Block] = []

    def some(self, *values):
        return self.draw(st.sampled_from(values))

    def add(self, block: c.Block, channels: int | None = None) -> None:
        self.blocks.append(block)
        self.channels = self.channels if channels is None else channels
        height, width = self.size
        self.size = block.size_after(height), block.size_after(width)

    def groups(self, channels: int) -> int:
        return self.some(*(n for n in (0, 1, 2, 4, 5, 8) if n == 0 or channels % n == 0))

    def segment(self, depth: int) -> None:
        kinds = [self.conv, self.res_block, self.attention, self.linear_attention, self.norm]
        if depth:
            kinds += [self.skip, self.skip, self.resampled, self.resampled, self.padded, self.side_image]
        for _ in range(self.draw(st.integers(0, 2))):
            kind = self.some(*kinds)
            if kind in kinds[5:]:
                kind(depth - 1)
            else:
                kind()

    def conv(self) -> None:
        out = self.some(*WIDTHS)
        self.add(c.Conv(self.channels, out, self.some(1, 3, 5, 7)), out)

    def res_block(self, how: c.Resample | None = None) -> None:
        conv_first = how is None and self.some(False, True)
        out, has_projection = self.some(self.channels, *WIDTHS), self.some(True, True, False)
        block = c.ResBlock(
            self.channels, out, conv_first or self.some(False, True), how,
            self.groups(out if conv_first else self.channels), norm=self.some(*c.Norm),
            activation=self.some(*c.Activation), conv_first=conv_first,
            has_projection=has_projection, has_shortcut=self.some(False, True), output_scale=self.some(1.0, 0.7),
            groups_out=self.groups(out), fir=self.some(False, True),
        )  # fmt: skip
        self.add(block, out)

    def attention(self) -> None:
        self.add(
            c.Attention(
                self.channels, self.some(1, 2), self.some(1, 4, 5, 16), self.groups(self.channels),
                norm=self.some(*c.Norm), memory=self.some(0, 3), cosine_scale=self.some(None, 8.0),
                adds_to_norm=self.some(False, True), output_scale=self.some(1.0, 0.7),
            )
        )  # fmt: skip

    def linear_attention(self) -> None:
        self.add(
            c.LinearAttention(
                self.channels, self.some(1, 2), self.some(1, 4, 5, 16), self.groups(self.channels),
                norm=self.some(*c.Norm), out_norm=self.some(*c.Norm), memory=self.some(0, 3),
                divides_values=self.some(False, True),
            )
        )  # fmt: skip

    def norm(self) -> None:
        norm, act = self.some(*c.Norm), self.some(*c.Activation)
        self.add(c.NormSiLU(self.channels, self.groups(self.channels), norm=norm, activation=act))

    def skip(self, depth: int) -> None:
        saved = self.channels
        self.add(c.Push())
        self.segment(depth)
        self.add(c.Pop(), self.channels + saved)

    def down(self) -> None:
        kind = self.some("conv", "average", "res", "depth")
        if kind == "res":
            self.res_block(DOWN)
        elif kind == "depth" and self.channels <= 20 and not any(n % 2 for n in self.size):
            self.add(c.SpaceToDepth(self.channels), 4 * self.channels)
        elif kind == "conv":
            kernel, at_end = self.some((3, False), (3, True), (1, False), (4, False), (5, False))
            out = self.some(*WIDTHS)
            self.add(c.Downsample(self.channels, True, kernel, at_end, out), out)
        else:
            self.add(c.Downsample(self.channels, False))

    def up(self) -> None:
        kind = self.some("conv", "nearest", "res", "transposed")
        if kind == "res":
            self.res_block(UP)
        else:
            transposed = c.TransposedConv(self.channels)
            self.add(transposed if kind == "transposed" else c.Upsample(self.channels, kind == "conv"))

    def resampled(self, depth: int) -> None:
        """Half the size and back; at an odd size only where that is the end of the list."""
        if any(n % 2 for n in self.size):
            return
        self.down()
        self.segment(depth)
        self.up()

    def padded(self, depth: int) -> None:
        pixels = self.some(1, 2)
        self.add(c.Pad(self.channels, pixels))
        self.segment(depth)
        self.add(c.Pad(self.channels, -pixels))

    def side_image(self, depth: int) -> None:
        """A side image on the way down, and another on the way up."""
        if any(n % 2 for n in self.size):
            return
        image = self.channels
        self.add(c.ImageSave())
        self.down()
        self.add(c.ImageIn(image, self.channels))
        self.add(c.ImageOut(self.channels, 4, self.groups(self.channels) or 1, is_first=True))
        self.up()
        if self.some(False, True):
            self.add(c.ImageOut(self.channels, 4, 1))
        else:
            self.add(c.Conv(self.channels, 4), 4)
            self.add(c.ImageAdd())


def instruction_sets() -> tuple[Isa, ...]:
    """Of the library and this machine; none without a library."""
    best: dict[str, Isa] = {}
    for precision in ("fp32", "bf16"):
        try:
            best[precision] = library.best_isa(precision)
        except NativeError:
            continue
    return tuple(isa for isa in Isa if isa.precision in best and isa <= best[isa.precision])


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


# A network in which no block sees the timestep has a linear layer without rows.
EMPTY_LAYER = "ignore:Initializing zero-element tensors is a no-op:UserWarning"


@st.composite
def networks(draw: st.DrawFn) -> c.UNetConfig:
    """Small networks of any blocks that fit together, odd sizes and skips of skips among them."""
    size = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    channels = draw(st.sampled_from((1, 3, 16, 20)))
    drawn = Draw(draw, channels, size)
    drawn.conv()
    drawn.segment(3)
    if min(drawn.size) > 1 and draw(st.booleans()):
        drawn.down()
    return c.UNetConfig(channels, drawn.channels, size, c.TimeConfig(8, 12), tuple(drawn.blocks))
