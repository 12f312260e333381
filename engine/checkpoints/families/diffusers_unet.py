"""The block list of a diffusers UNet2DModel, from its config.json alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from engine.checkpoints.families.diffusers_options import Options, is_count, is_number, is_optional_count
from engine.networks import config as c

Layout = list[tuple[c.Block, str]]
"""Blocks in order, each with the prefix of its tensors in the file."""

_ACTIVATIONS = {
    "silu": c.Activation.SILU,
    "swish": c.Activation.SILU,
    "mish": c.Activation.MISH,
    "gelu": c.Activation.GELU,
    "relu": c.Activation.RELU,
}
_DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "SkipDownBlock2D", "AttnSkipDownBlock2D")
_UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D", "AttnSkipUpBlock2D")

_IMAGE_CHANNELS = 3
"""The side image of Skip blocks has three channels whatever the network's input has."""


@dataclass(frozen=True, slots=True)
class _Style:
    """What the blocks of one part share. groups None: a quarter of the channels, 32 at most."""

    groups: int | None
    attention_groups: int | None
    output_scale: float = 1.0


@dataclass(slots=True)
class Builder:
    """Appends blocks to `layout`, keeping the channel counts of h and of the skip connections."""

    options: Options
    scale_shift: bool
    activation: c.Activation
    eps: float
    head_dim: int | None
    layout: Layout = field(default_factory=list)
    channels: int = 0
    skips: list[int] = field(default_factory=list)

    def add(self, block: c.Block, prefix: str = "") -> None:
        self.layout.append((block, prefix))

    def push(self) -> None:
        self.add(c.Push())
        self.skips.append(self.channels)

    def pop(self) -> None:
        self.add(c.Pop())
        self.channels += self.skips.pop()

    def res(
        self, prefix: str, out: int, style: _Style, resample: c.Resample | None = None, groups: int | None = None
    ) -> None:
        """A ResnetBlock2D; groups: of its first norm, where they follow no rule."""
        groups_out = quarter(out) if style.groups is None else style.groups
        if groups is None:
            groups = quarter(self.channels) if style.groups is None else style.groups
        filters = resample is not None and style.groups is None
        self.add(
            c.ResBlock(
                self.channels,
                out,
                self.scale_shift,
                resample,
                groups,
                self.eps,
                activation=self.activation,
                has_shortcut=filters,
                output_scale=style.output_scale,
                groups_out=None if groups_out == groups else groups_out,
                fir=filters,
            ),
            prefix,
        )
        self.channels = out

    def attention(self, prefix: str, style: _Style) -> None:
        dim = self.channels if self.head_dim is None else self.head_dim
        heads = self.channels // dim
        if not heads:
            raise self.options.wrong("attention_head_dim", f"at most {self.channels}, the channels of {prefix}")
        has_norm = style.attention_groups is not None
        self.add(
            c.Attention(
                self.channels,
                heads,
                dim,
                style.attention_groups or 1,
                self.eps,
                c.Norm.GROUP if has_norm else c.Norm.NONE,
                output_scale=style.output_scale,
            ),
            prefix,
        )


def quarter(channels: int) -> int:
    """Groups of a Skip block's norms."""
    return max(1, min(channels // 4, 32))


def read_unet(options: Options) -> tuple[Builder, dict[str, Any]]:
    """The layout, and the fields of UNetConfig that the config decides (all but blocks, channels and image size)."""
    widths: list[int] = options.take("block_out_channels", [224, 448, 672, 896], _is_counts, "a list of whole numbers")
    down = _kinds(options, "down_block_types", _DOWN, [_DOWN[0], *[_DOWN[1]] * 3], len(widths))
    up = _kinds(options, "up_block_types", _UP, [*[_UP[1]] * 3, _UP[0]], len(widths))
    norm_groups: int | None = options.take("norm_num_groups", 32, is_optional_count, "a whole number or null")
    if norm_groups is None and not all("Skip" in kind for kind in down + up):
        raise options.wrong("norm_num_groups", "a whole number (null is for networks of Skip blocks alone)")
    time_shift = options.choice("resnet_time_scale_shift", "default", ("default", "scale_shift"))
    builder = Builder(
        options,
        scale_shift=time_shift == "scale_shift",
        activation=_activation(options),
        eps=options.number("norm_eps", 1e-5),
        head_dim=options.take("attention_head_dim", 8, is_optional_count, "a whole number or null"),
    )
    plain = _Style(norm_groups or 1, norm_groups)
    layers: int = options.take("layers_per_block", 2, is_count, "a whole number")
    in_channels: int = options.take("in_channels", 3, is_count, "a whole number")
    builder.channels = in_channels
    if options.flag("center_input_sample", False):
        builder.add(c.NormSiLU(in_channels, norm=c.Norm.AFFINE, activation=c.Activation.NONE), "center_input_sample")
    if _has_image(options, "down_block_types", down):
        if in_channels != _IMAGE_CHANNELS:
            raise options.wrong("in_channels", f"{_IMAGE_CHANNELS}, which Skip blocks need")
        builder.add(c.ImageSave())
    builder.add(c.Conv(in_channels, widths[0]), "conv_in")
    builder.channels = widths[0]
    builder.push()
    for index, kind in enumerate(down):
        _down_block(builder, kind, f"down_blocks.{index}", widths[index], layers, plain, index + 1 == len(widths))
    _middle(builder, norm_groups)
    has_image = _has_image(options, "up_block_types", up)
    for index, kind in enumerate(up):
        style = _skip_style(has_attention=kind.startswith("Attn")) if "Skip" in kind else plain
        _up_block(builder, kind, f"up_blocks.{index}", widths[-1 - index], layers, style, index + 1 == len(widths))
    builder.add(c.NormSiLU(builder.channels, norm_groups or quarter(widths[0]), builder.eps), "conv_norm_out")
    out_channels: int = options.take("out_channels", 3, is_count, "a whole number")
    builder.add(c.Conv(builder.channels, out_channels), "conv_out")
    if has_image:
        if out_channels != _IMAGE_CHANNELS:
            raise options.wrong("out_channels", f"{_IMAGE_CHANNELS}, which Skip blocks need")
        builder.add(c.ImageAdd())
    options.take("dropout", 0.0, is_number, "a number")
    return builder, _time_and_label(options, widths[0])


def _skip_style(has_attention: bool) -> _Style:
    return _Style(None, 32 if has_attention else None, math.sqrt(0.5))


def _down_block(builder: Builder, kind: str, prefix: str, out: int, layers: int, plain: _Style, is_last: bool) -> None:
    options = builder.options
    has_attention, is_skip = kind.startswith("Attn"), "Skip" in kind
    style = _skip_style(has_attention) if is_skip else plain
    for layer in range(layers):
        builder.res(f"{prefix}.resnets.{layer}", out, style)
        if has_attention:
            builder.attention(f"{prefix}.attentions.{layer}", style)
        builder.push()
    downsampling = options.choice("downsample_type", "conv", ("conv", "resnet", None)) or "conv"
    padding = options.take("downsample_padding", 1, lambda value: value in (0, 1), "0 or 1")
    if is_last:
        return
    if is_skip:
        builder.res(f"{prefix}.resnet_down", out, style, c.Resample.DOWN)
        builder.add(c.ImageIn(_IMAGE_CHANNELS, out), prefix)
    elif kind == "ResnetDownsampleBlock2D" or (has_attention and downsampling == "resnet"):
        builder.res(f"{prefix}.downsamplers.0", out, style, c.Resample.DOWN)
    else:
        builder.add(c.Downsample(out, conv=True, pads_end=padding == 0), f"{prefix}.downsamplers.0")
    builder.push()


def _middle(builder: Builder, norm_groups: int | None) -> None:
    options = builder.options
    scale = options.number("mid_block_scale_factor", 1)
    has_attention = options.flag("add_attention", True)
    given = options.take("attn_norm_num_groups", None, is_optional_count, "a whole number or null")
    groups = norm_groups or quarter(builder.channels)
    style = _Style(groups, given or (None if builder.scale_shift else groups), 1 / scale)
    if options.choice("mid_block_type", "UNetMidBlock2D", ("UNetMidBlock2D", None)) is None:
        return
    builder.res("mid_block.resnets.0", builder.channels, style)
    if has_attention:
        builder.attention("mid_block.attentions.0", style)
    builder.res("mid_block.resnets.1", builder.channels, style)


def _up_block(builder: Builder, kind: str, prefix: str, out: int, layers: int, style: _Style, is_last: bool) -> None:
    has_attention, is_skip = kind.startswith("Attn"), "Skip" in kind
    for layer in range(layers + 1):
        before, skip = builder.channels, builder.skips[-1]
        builder.pop()
        # diffusers divides only the skip connection's channels by four here.
        groups = min(before + skip // 4, 32) if is_skip and has_attention else None
        builder.res(f"{prefix}.resnets.{layer}", out, style, groups=groups)
        if has_attention and not is_skip:
            builder.attention(f"{prefix}.attentions.{layer}", style)
    if has_attention and is_skip:
        builder.attention(f"{prefix}.attentions.0", style)
    upsampling = builder.options.choice("upsample_type", "conv", ("conv", "resnet", None)) or "conv"
    if is_last:
        return
    if is_skip:
        is_first = not any(isinstance(block, c.ImageOut) for block, _ in builder.layout)
        builder.add(c.ImageOut(out, _IMAGE_CHANNELS, quarter(out), builder.eps, is_first), prefix)
        builder.res(f"{prefix}.resnet_up", out, style, c.Resample.UP)
    elif kind == "ResnetUpsampleBlock2D" or (has_attention and upsampling == "resnet"):
        builder.res(f"{prefix}.upsamplers.0", out, style, c.Resample.UP)
    else:
        builder.add(c.Upsample(out, conv=True), f"{prefix}.upsamplers.0")


def _time_and_label(options: Options, width: int) -> dict[str, Any]:
    """Fields of UNetConfig: time, label, num_classes, divides_by_timestep."""
    kind = options.choice("time_embedding_type", "positional", ("positional", "fourier", "learned"))
    flips = options.flag("flip_sin_to_cos", True)
    shift = options.take("freq_shift", 0, is_number, "a number")
    rows = options.take("num_train_timesteps", None, is_optional_count, "a whole number or null")
    channels = options.take("time_embedding_dim", None, is_optional_count, "a whole number or null") or 4 * width
    activation = _activation(options)
    match kind:
        case "fourier":
            time = c.TimeConfig(
                2 * width,
                channels,
                c.EmbeddingOrder.SIN_COS,
                has_frequencies=True,
                takes_log=True,
                projection_activation=activation,
            )
        case "learned":
            if rows is None:
                raise options.wrong("num_train_timesteps", "a whole number, the rows of the learned time embedding")
            time = c.TimeConfig(width, channels, table_rows=rows, projection_activation=activation)
        case _:
            order = c.EmbeddingOrder.COS_SIN if flips else c.EmbeddingOrder.SIN_COS
            if width // 2 == shift:
                raise options.wrong("freq_shift", f"less than {width // 2}, half the first of block_out_channels")
            time = c.TimeConfig(width, channels, order, float(shift), projection_activation=activation)
    embedding = options.choice("class_embed_type", None, (None, "timestep", "identity"))
    classes = options.take("num_class_embeds", None, is_optional_count, "a whole number or null")
    labels = {None: c.LabelInput.TABLE, "timestep": c.LabelInput.NUMBER, "identity": c.LabelInput.VECTOR}
    return {
        "time": time,
        "label": labels[embedding],
        # A vector has no number; any count makes the network take labels.
        "num_classes": 1 if embedding == "identity" else classes,
        "divides_by_timestep": kind == "fourier",
    }


def _activation(options: Options) -> c.Activation:
    name = options.take("act_fn", "silu", lambda v: str(v).lower() in _ACTIVATIONS, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[str(name).lower()]


def _is_counts(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(is_count(entry) for entry in value)


def _kinds(options: Options, key: str, known: tuple[str, ...], default: list[str], levels: int) -> list[str]:
    """The block types of a config, with the old prefix UNetRes removed."""
    names = options.take(
        key,
        default,
        lambda value: (
            isinstance(value, list | tuple) and all(str(name).removeprefix("UNetRes") in known for name in value)
        ),
        f"a list of {', '.join(known)}",
    )
    if len(names) != levels:
        raise options.wrong(key, f"{levels} block types, as many as block_out_channels has entries")
    return [str(name).removeprefix("UNetRes") for name in names]


def _has_image(options: Options, key: str, kinds: list[str]) -> bool:
    """Whether the side image exists on this way; raises CheckpointError where it would not meet h at its size."""
    is_down = key.startswith("down")
    skips = ["Skip" in kind for kind in kinds]
    resampling = skips[:-1]
    run = resampling if is_down else [not value for value in skips]
    if any(later and not earlier for earlier, later in zip(run, run[1:], strict=False)):
        order = "before every other block that halves the resolution" if is_down else "up to the last"
        raise options.wrong(key, f"the Skip blocks in one run, {order}")
    return any(resampling)
