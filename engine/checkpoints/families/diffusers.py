"""diffusers folders with a UNet2DModel: the JSON files say everything.

A pipeline folder has unet/ and scheduler/, a model folder has config.json and weights; see
engine.checkpoints.model_folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.facts import Facts
from engine.checkpoints.families.diffusers_options import Options
from engine.checkpoints.families.diffusers_schedule import assumed_scheduler, read_scheduler
from engine.checkpoints.families.diffusers_unet import Layout, read_unet
from engine.checkpoints.families.state_dict import StateDict
from engine.checkpoints.model_folder import FolderContent
from engine.checkpoints.types import Assumptions, Translation
from engine.errors import CheckpointError
from engine.networks import config as c

NAMES: tuple[str, ...] = ("diffusers",)
NEEDS = "a folder with config.json of a UNet2DModel and diffusion_pytorch_model.safetensors or .bin, or with unet/"

# What training with an averaged copy of the network adds to its config.json.
_AVERAGING_KEYS = (
    "decay",
    "min_decay",
    "optimization_step",
    "update_after_step",
    "use_ema_warmup",
    "inv_gamma",
    "power",
)
_LATENT_PARTS = ("vae", "vqvae", "movq", "text_encoder", "bert", "image_encoder")

# Our layer -> theirs.
_RES_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
# Theirs -> its name in releases before 0.13.
_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def matches(raw: Any) -> bool:
    """Whether this is a folder."""
    return isinstance(raw, FolderContent)


def translate(raw: Any, facts: Facts) -> Translation:
    """Config, weights and diffusion conventions of a folder; raises CheckpointError where they do not fit."""
    assume = Assumptions(facts)
    options = Options(raw.unet_config, "config.json")
    options.choice("_class_name", "UNet2DModel", ("UNet2DModel",))
    _check_pipeline(raw.pipeline)
    builder, fields = read_unet(options)
    sample_size = options.take("sample_size", None, _is_size, "a whole number or a pair of them")
    options.check_all_known(_AVERAGING_KEYS)
    schedule = None if raw.scheduler_config is None else Options(raw.scheduler_config, "scheduler_config.json")
    in_channels = next(block.in_channels for block, _ in builder.layout if isinstance(block, c.Conv))
    out_channels = builder.layout[-1][0].out_channels if isinstance(builder.layout[-1][0], c.Conv) else in_channels
    has_range = _has_range(schedule, in_channels, out_channels)
    image_channels = out_channels // 2 if has_range else out_channels
    if image_channels > in_channels:
        raise options.wrong("out_channels", f"at most the {in_channels} of in_channels, or twice them")
    if fields["label"] is c.LabelInput.NUMBER and fields["num_classes"] is None:
        fields["num_classes"] = assume.take("num_classes", 1000, "labels are numbers, the file does not say how many")
    elif fields["label"] is c.LabelInput.TABLE and fields["num_classes"] is not None:
        fields["null_class"] = assume.take("null_class", None, "no label means none")
    config = c.UNetConfig(
        in_channels=image_channels,
        out_channels=out_channels,
        image_size=_image_size(sample_size, assume),
        blocks=tuple(block for block, _ in builder.layout),
        # Pipelines that feed a second image put its channels behind those of x_t.
        cond_channels=in_channels - image_channels,
        **fields,
    )
    diffusion = (
        assumed_scheduler(assume, has_range) if schedule is None else read_scheduler(schedule, assume, has_range)
    )
    return Translation("diffusers", config, _rename(raw.tensors, config, builder.layout), diffusion, assume.made())


def _check_pipeline(pipeline: Mapping[str, Any] | None) -> None:
    parts = [part for part in _LATENT_PARTS if isinstance((pipeline or {}).get(part), list) and any(pipeline[part])]  # type: ignore[index]
    if parts:
        raise CheckpointError(
            f"model_index.json names {', '.join(parts)}: a latent or text pipeline is not supported; pass its unet/ "
            "folder for the network alone"
        )


def _has_range(schedule: Options | None, in_channels: int, out_channels: int) -> bool:
    """Whether half of the output channels are a variance: the scheduler says so, else the channel counts."""
    if schedule is not None and schedule.has("variance_type"):
        named = schedule.take("variance_type", None, lambda value: True, "")
        return bool(named == "learned_range") and out_channels % 2 == 0
    return out_channels == 2 * in_channels


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return value is None or all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)


def _image_size(sample_size: Any, assume: Assumptions) -> tuple[int, int]:
    given = assume.given("image_size")
    if given is not None:
        return (int(given[0]), int(given[1]))
    if sample_size is None:
        raise CheckpointError("config.json: sample_size is null; give the image size with --image-size HxW")
    height, width = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    return (height, width)


def _rename(tensors: Mapping[str, Tensor], config: c.UNetConfig, layout: Layout) -> dict[str, Tensor]:
    """Our weights; raises CheckpointError for a missing tensor or one left over."""
    state = StateDict(tensors)
    weights: dict[str, Tensor] = {}
    projections: list[str] = []
    for index, (block, prefix) in enumerate(layout):
        for ours, theirs in _layers(block, prefix).items():
            _copy(state, weights, f"blocks.{index}{ours}", theirs)
        if isinstance(block, c.Attention):
            _copy_attention(state, weights, f"blocks.{index}", prefix, block)
        elif isinstance(block, c.ResBlock):
            projections.append(f"{prefix}.time_emb_proj")
        elif isinstance(block, c.NormSiLU) and block.norm is c.Norm.AFFINE:
            # center_input_sample: 2 x - 1.
            weights[f"blocks.{index}.norm.weight"] = torch.full((block.channels,), 2.0)
            weights[f"blocks.{index}.norm.bias"] = torch.full((block.channels,), -1.0)
    for part in ("weight", "bias"):
        weights[f"time.projection.{part}"] = torch.cat([state.take(f"{name}.{part}") for name in projections])
    _copy_embeddings(state, weights, config)
    state.check_all_used()
    return weights


def _layers(block: c.Block, prefix: str) -> dict[str, str]:
    """Our layer in a block -> theirs, for layers that have a weight and a bias."""
    match block:
        case c.Conv():
            return {"": prefix}
        case c.ResBlock():
            has_shortcut = block.has_shortcut or block.in_channels != block.out_channels
            names = {f".{ours}": f"{prefix}.{theirs}" for ours, theirs in _RES_BLOCK.items()}
            return names if has_shortcut else {k: v for k, v in names.items() if k != ".shortcut"}
        case c.Attention(norm=c.Norm.GROUP):
            return {".norm": f"{prefix}.group_norm"}
        case c.Downsample() | c.Upsample():
            return {".conv": f"{prefix}.conv"}
        case c.NormSiLU(norm=c.Norm.GROUP):
            return {".norm": prefix}
        case c.ImageIn():
            return {"": f"{prefix}.skip_conv"}
        case c.ImageOut():
            return {".norm": f"{prefix}.skip_norm", ".conv": f"{prefix}.skip_conv"}
        case _:
            return {}


def _copy(state: StateDict, weights: dict[str, Tensor], ours: str, theirs: str) -> None:
    for part in ("weight", "bias"):
        weights[f"{ours}.{part}"] = state.take(f"{theirs}.{part}")


def _copy_attention(state: StateDict, weights: dict[str, Tensor], ours: str, prefix: str, block: c.Attention) -> None:
    """q, k, v stacked, 1/sqrt(head_dim) folded into q; matrices as 1x1 convolutions."""
    for part in ("weight", "bias"):
        q, k, v, out = (
            state.take(f"{prefix}.{old if state.has(f'{prefix}.{old}.') else new}.{part}")
            for new, old in _ATTENTION.items()
        )
        stacked = {"qkv": torch.cat([q * block.head_dim**-0.5, k, v]), "out": out}
        for layer, tensor in stacked.items():
            shape = (*tensor.shape[:2], 1, 1) if part == "weight" else tensor.shape
            weights[f"{ours}.{layer}.{part}"] = tensor.reshape(shape)


def _copy_embeddings(state: StateDict, weights: dict[str, Tensor], config: c.UNetConfig) -> None:
    for number in ("1", "2"):
        _copy(state, weights, f"time.linear{number}", f"time_embedding.linear_{number}")
    assert config.time is not None
    if config.time.table_rows is not None:
        weights["time.table.weight"] = state.take("time_proj.weight")
    if config.time.has_frequencies:
        # Some releases stored the frequencies under two names.
        names = [name for name in ("time_proj.weight", "time_proj.W") if state.has(name)] or ["time_proj.weight"]
        weights["time.frequencies"] = [state.take(name) for name in names][0]
    if config.num_classes is not None and config.label is c.LabelInput.TABLE:
        weights["time.label.weight"] = state.take("class_embedding.weight")
    elif config.label is c.LabelInput.NUMBER:
        for number in ("1", "2"):
            _copy(state, weights, f"time.label_linear{number}", f"class_embedding.linear_{number}")
