"""OpenAI's improved-diffusion and guided-diffusion (ADM): U-Nets, super-resolution U-Nets and classifiers.

A file is a bare state dict. Widths, depths, resampling and attention placement follow from keys and shapes; heads,
attention order, schedule, rescaling and image size are facts from the user or documented defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.facts import Facts
from engine.checkpoints.families.openai_layout import block_keys, block_prefixes, classifier_prefixes, fold_qkv
from engine.checkpoints.families.openai_structure import Levels, find_levels
from engine.checkpoints.families.state_dict import StateDict, submodules
from engine.checkpoints.types import Assumptions, Translation
from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import named_schedule
from engine.errors import CheckpointError
from engine.networks import config as c

NAMES: tuple[str, ...] = ("openai-guided", "openai-improved")
NEEDS = "a bare state dict with time_embed.0.weight, input_blocks.0.0.weight and out.0.weight (the EMA file)"

# Level multipliers of the published models; the image size is not in the file but they belong together.
_PUBLISHED_SIZES = {
    (1, 2, 2, 2): 32,
    (1, 2, 3, 4): 64,
    (1, 1, 2, 3, 4): 128,
    (1, 1, 2, 2, 4, 4): 256,
    (0.5, 1, 1, 2, 2, 4, 4): 512,
}


def matches(raw: Any) -> bool:
    """Whether the keys are those of an OpenAI U-Net or classifier."""
    return isinstance(raw, Mapping) and {"time_embed.0.weight", "input_blocks.0.0.weight"} <= set(raw)


def translate(raw: Any, facts: Facts) -> Translation:
    """Config, weights and diffusion conventions of a state dict; raises CheckpointError where they do not fit."""
    state = StateDict(raw)
    assume = Assumptions(facts)
    is_classifier = not state.has("output_blocks.")
    levels = find_levels(state, facts.num_res_blocks, _known_halvings(state, facts))
    family = facts.family or ("openai-guided" if is_classifier or levels.resamples_in_blocks else None)
    if family is None:
        family = assume.take("family", "openai-guided", "improved and guided files look alike")
    if levels.other_depths:
        others = ", ".join(map(str, levels.other_depths))
        assume.take("num_res_blocks", 2, f"the default of guided-diffusion; {others} would fit the file as well")
    heads = _Heads(state, facts, assume, family)
    config = _classifier(state, levels, heads, assume) if is_classifier else _unet(state, levels, heads, assume)
    weights = _rename(state, config, legacy=heads.legacy)
    state.check_all_used()
    diffusion = _diffusion(config, assume, family)
    return Translation(family, config, weights, diffusion, assume.made())


def _known_halvings(state: StateDict, facts: Facts) -> int | None:
    """How often a classifier halves the image, from its pool's positions and the image size, where both are known."""
    if facts.image_size is None or not state.has("out.2.positional_embedding"):
        return None
    tokens = state.shape("out.2.positional_embedding")[1] - 1
    return round(math.log2(facts.image_size[0] * facts.image_size[1] / max(tokens, 1)) / 2)


class _Heads:
    """How many heads each attention has; the file does not say."""

    def __init__(self, state: StateDict, facts: Facts, assume: Assumptions, family: str) -> None:
        widths = [shape[1] for key, shape in state.shapes() if key.endswith(".qkv.weight")]
        self.legacy = True
        self._channels, self._count = facts.num_head_channels, facts.num_heads
        self._count_up = facts.num_heads_upsample
        if family == "openai-improved" and facts.attention_order == "new":
            raise CheckpointError("improved-diffusion has the legacy attention order only; leave --attention-order out")
        if widths and self._channels is None and self._count is None:
            if family == "openai-guided" and self._count_up is None and all(w % 64 == 0 for w in widths):
                self._channels = assume.take("num_head_channels", 64, "as in OpenAI's published ADM models")
            else:
                self._count = assume.take("num_heads", 4, "the default of OpenAI's training scripts")
        if widths and family == "openai-guided":
            order = assume.take("attention_order", "legacy", "the default of guided-diffusion")
            self.legacy = order == "legacy"

    def block(self, channels: int, inner: int, on_way_up: bool) -> c.Attention:
        """The Attention of this width; raises CheckpointError for a count that does not divide it."""
        count = self._count_up if on_way_up and self._count_up is not None else self._count
        if self._channels is not None:
            if channels % self._channels:
                raise CheckpointError(
                    f"an attention of {channels} channels cannot have heads of {self._channels} channels; give the "
                    "training's value with --num-head-channels or --num-heads"
                )
            count = channels // self._channels
        if not count or channels % count:
            raise CheckpointError(
                f"an attention of {channels} channels cannot have {count} heads; give the training's number with "
                "--num-heads or --num-head-channels"
            )
        if inner != 3 * channels:
            raise CheckpointError(f"a qkv projection has {inner} rows, expected 3 x {channels}")
        return c.Attention(channels, count, channels // count)


def _encoder(state: StateDict, levels: Levels, heads: _Heads) -> tuple[list[list[c.Block]], list[c.Block]]:
    """The groups of input_blocks, and the blocks of middle_block."""
    groups: list[list[c.Block]] = []
    channels = 0
    for index in range(levels.num_groups):
        prefix = f"input_blocks.{index}"
        if index in levels.down_at and not levels.resamples_in_blocks:
            groups.append([c.Downsample(channels, conv=state.has(f"{prefix}.0.op."))])
            continue
        how = c.Resample.DOWN if index in levels.down_at else None
        groups.append(_group(state, prefix, heads, how, on_way_up=False))
        channels = state.shape(f"{prefix}.0.weight" if index == 0 else f"{prefix}.0.in_layers.2.weight")[0]
    return groups, _group(state, "middle_block", heads, None, on_way_up=False)


def _group(state: StateDict, prefix: str, heads: _Heads, first: c.Resample | None, on_way_up: bool) -> list[c.Block]:
    """The blocks under one prefix; its first ResBlock resamples by `first`, a second one on the way up doubles."""
    blocks: list[c.Block] = []
    for name in submodules(state, prefix):
        if state.has(f"{name}.in_layers."):
            out, cin = state.shape(f"{name}.in_layers.2.weight")[:2]
            scale_shift = state.shape(f"{name}.emb_layers.1.weight")[0] == 2 * out
            is_second = on_way_up and any(isinstance(b, c.ResBlock) for b in blocks)
            how = c.Resample.UP if is_second else first
            if state.has(f"{name}.skip_connection.") and state.shape(f"{name}.skip_connection.weight")[-1] != 1:
                raise CheckpointError(f"{name} has a 3x3 skip convolution (use_conv), which no published model has")
            blocks.append(c.ResBlock(cin, out, scale_shift, how))
        elif state.has(f"{name}.qkv."):
            inner, channels = state.shape(f"{name}.qkv.weight")[:2]
            blocks.append(heads.block(channels, inner, on_way_up))
        elif state.has(f"{name}.conv."):
            blocks.append(c.Upsample(state.shape(f"{name}.conv.weight")[0], conv=True))
        elif state.has(f"{name}.weight"):
            out, cin, kernel = state.shape(f"{name}.weight")[:3]
            blocks.append(c.Conv(cin, out, kernel))
        else:
            raise CheckpointError(f"{name} is no ResBlock, attention, resampling or convolution")
    return blocks


def _unet(state: StateDict, levels: Levels, heads: _Heads, assume: Assumptions) -> c.UNetConfig:
    groups, middle = _encoder(state, levels, heads)
    blocks = [block for group in groups for block in (*group, c.Push())] + middle
    for index in range(levels.num_groups):
        group = _group(state, f"output_blocks.{index}", heads, None, on_way_up=True)
        if levels.upsamples_without_weights(index, group):
            last = group[-1]
            group.append(c.Upsample(last.out_channels if isinstance(last, c.ResBlock) else _width(last), conv=False))
        blocks += [c.Pop(), *group]
    out_channels, width = state.shape("out.2.weight")[:2]
    blocks += [c.NormSiLU(width), c.Conv(width, out_channels, state.shape("out.2.weight")[2])]
    in_channels = state.shape("input_blocks.0.0.weight")[1]
    is_doubled = 2 * out_channels == in_channels or bool(assume.given("super_resolution"))
    if not is_doubled and out_channels == in_channels and in_channels in (2, 6):
        is_doubled = assume.take(
            "super_resolution", True, f"{in_channels} channels in and out: image, condition, range"
        )
    image_channels = in_channels // 2 if is_doubled else in_channels
    if out_channels not in (image_channels, 2 * image_channels):
        raise CheckpointError(
            f"{in_channels} channels in and {out_channels} out fit neither an image network (out = in or 2 in) nor a "
            "super-resolution network (out = in / 2 or in); is --super-resolution right?"
        )
    num_classes = state.shape("label_emb.weight")[0] if state.has("label_emb.") else None
    return c.UNetConfig(
        in_channels=image_channels,
        out_channels=out_channels,
        image_size=_image_size(state, levels, blocks, assume),
        time=_time(state),
        blocks=tuple(blocks),
        num_classes=num_classes,
        null_class=assume.take("null_class", None, "no label means none") if num_classes else None,
        cond_channels=in_channels - image_channels,
    )


def _time(state: StateDict) -> c.TimeConfig:
    channels, embed_channels = state.shape("time_embed.0.weight")
    return c.TimeConfig(embed_channels, channels)


def _classifier(state: StateDict, levels: Levels, heads: _Heads, assume: Assumptions) -> c.ClassifierConfig:
    groups, middle = _encoder(state, levels, heads)
    blocks: list[c.Block] = [block for group in groups for block in group] + middle
    width = state.shape("out.0.weight")[0]
    if state.has("out.2.positional_embedding"):
        tokens = state.shape("out.2.positional_embedding")[1] - 1
        num_classes = state.shape("out.2.c_proj.weight")[0]
        attention = heads.block(width, state.shape("out.2.qkv_proj.weight")[0], on_way_up=False)
        pool: c.Block = c.AttentionPool(width, attention.heads, attention.head_dim, tokens, num_classes)
    elif state.has("out.3.weight") and len(state.shape("out.3.weight")) == 4:
        num_classes = state.shape("out.3.weight")[0]
        pool = c.AveragePool(width, num_classes)
    else:
        raise CheckpointError('the classifier pools in the "spatial" way; "attention" and "adaptive" are supported')
    return c.ClassifierConfig(
        in_channels=state.shape("input_blocks.0.0.weight")[1],
        image_size=_image_size(state, levels, blocks, assume, tokens if isinstance(pool, c.AttentionPool) else None),
        time=_time(state),
        blocks=(*blocks, c.NormSiLU(width), pool),
        num_classes=num_classes,
    )


def _width(block: c.Block) -> int:
    return block.channels if isinstance(block, c.Attention) else 0


def _image_size(
    state: StateDict, levels: Levels, blocks: list[c.Block], assume: Assumptions, tokens: int | None = None
) -> tuple[int, int]:
    """The user's size; else the square that an attention pool's positions imply or that published widths imply."""
    factor = 2 ** len(levels.down_at)
    if tokens is not None and round(tokens**0.5) ** 2 == tokens:
        side = round(tokens**0.5) * factor
        return assume.take("image_size", (side, side), f"{tokens} positions in the attention pool")
    base = state.shape("time_embed.0.weight")[1]
    widths: dict[int, float] = {}
    level = 0
    for block in blocks:
        if isinstance(block, c.Pop):
            break
        if isinstance(block, c.ResBlock) and block.resample is None:
            widths.setdefault(level, block.out_channels / base)
        level += isinstance(block, c.Downsample) or (isinstance(block, c.ResBlock) and block.resample is not None)
    side = _PUBLISHED_SIZES.get(tuple(widths[i] for i in sorted(widths)))
    if side is None and assume.given("image_size") is None:
        raise CheckpointError(
            f"the image size is not in the file; give it with --image-size HxW (a multiple of {factor} each way)"
        )
    return assume.take("image_size", (side, side), "the published model with these widths")


def _diffusion(config: c.UNetConfig | c.ClassifierConfig, assume: Assumptions, family: str) -> Diffusion:
    steps = assume.take("num_train_timesteps", 1000, "the default of OpenAI's training scripts")
    kind = assume.take("noise_schedule", "linear", "the default of OpenAI's training scripts")
    schedule = named_schedule(kind, steps)
    is_improved = family == "openai-improved"
    rescale = assume.take(
        "rescale_timesteps", is_improved, f"the default of {family.removeprefix('openai-')}-diffusion"
    )
    scale = 1000.0 / steps if rescale else 1.0
    if isinstance(config, c.ClassifierConfig):
        return Diffusion(schedule, timestep_scale=scale)
    if config.out_channels == 2 * config.in_channels:
        variance = Variance.LEARNED_RANGE
    else:
        variance = Variance(assume.take("variance", "fixed_large", "sigma_small is off by default"))
    prediction = Prediction(assume.take("prediction", "eps", "predict_xstart is off by default"))
    is_clipped = assume.take("clip_denoised", True, "the default of OpenAI's sampling scripts")
    return Diffusion(schedule, prediction, variance, clip=1.0 if is_clipped else None, timestep_scale=scale)


def _rename(state: StateDict, config: c.UNetConfig | c.ClassifierConfig, legacy: bool) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        weights[f"time.linear1.{part}"] = state.take(f"time_embed.0.{part}")
        weights[f"time.linear2.{part}"] = state.take(f"time_embed.2.{part}")
    if isinstance(config, c.UNetConfig) and config.num_classes is not None:
        weights["time.label.weight"] = state.take("label_emb.weight")
    prefixes = block_prefixes if isinstance(config, c.UNetConfig) else classifier_prefixes
    projections: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for index, block, prefix in prefixes(config.blocks):
        for part, stacked in projections.items():
            for ours, theirs in block_keys(index, block, prefix).items():
                weights[f"{ours}.{part}"] = _our_tensor(state.take(f"{theirs}.{part}"), block, ours, legacy)
            if isinstance(block, c.ResBlock):
                stacked.append(state.take(f"{prefix}.emb_layers.1.{part}"))
        if isinstance(block, c.AttentionPool):
            weights[f"blocks.{index}.position"] = state.take(f"{prefix}.positional_embedding")
    for part, stacked in projections.items():
        weights[f"time.projection.{part}"] = torch.cat(stacked)
    return weights


def _our_tensor(tensor: Tensor, block: c.Block, name: str, legacy: bool) -> Tensor:
    if isinstance(block, (c.Attention, c.AttentionPool)) and name.endswith(".qkv"):
        # AttentionPool2d uses the new order whatever the flag says.
        tensor = fold_qkv(tensor, block.heads, legacy and isinstance(block, c.Attention))
    if isinstance(block, c.Attention) and tensor.ndim > 1:
        return tensor.reshape(*tensor.shape[:2], 1, 1)
    if isinstance(block, (c.AttentionPool, c.AveragePool)) and tensor.ndim > 1:
        return tensor.reshape(tensor.shape[:2])
    return tensor
