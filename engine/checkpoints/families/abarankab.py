"""abarankab/DDPM: the state dict of its diffusion object.

Network and averaged network stand under `model.` and `ema_model.`, the schedule in float32 buffers at the top. Widths,
depths, attention and classes follow from keys and shapes; activation, groups, scale of the timestep and padding do not.
Its sampler never limits x0, has variance beta_t and adds no noise at t = 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.facts import Facts
from engine.checkpoints.families.chain import Chain, Names, Placed, Style, read_chain, rename, time_projections
from engine.checkpoints.families.common import choose_weights, schedule_from_betas
from engine.checkpoints.families.state_dict import StateDict
from engine.checkpoints.types import Assumptions, Translation
from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import NoiseSchedule
from engine.errors import CheckpointError
from engine.networks import config as c

NAMES: tuple[str, ...] = ("abarankab",)
NEEDS = "the diffusion object's state dict with betas, remove_noise_coeff, model.init_conv.weight and ema_model.*"

_BUFFERS = {
    "betas",
    "alphas",
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "reciprocal_sqrt_alphas",
    "remove_noise_coeff",
    "sigma",
}
_CHAIN = Chain(
    names=Names(
        res={
            "norm1": "norm_1",
            "conv1": "conv_1",
            "norm2": "norm_2",
            "conv2": "conv_2.1",
            "shortcut": "residual_connection",
            "projection": "time_bias",
        },
        attention={"norm": ("norm",), "qkv": ("to_qkv",), "out": ("to_out",)},
    ),
    head="init_conv",
    down="downs",
    middle="mid",
    up="ups",
    tail_norm="out_norm",
    tail_conv="out_conv",
    attention="attention",
    down_conv="downsample",
    up_conv="upsample.1",
)


def matches(raw: Any) -> bool:
    """Whether the keys are those of this project's diffusion object."""
    if not isinstance(raw, Mapping) or not {"betas", "remove_noise_coeff"} <= set(raw):
        return False
    return any(f"{model}.init_conv.weight" in raw for model in ("model", "ema_model"))


def translate(raw: Any, facts: Facts) -> Translation:
    """Config, weights and diffusion conventions; raises CheckpointError where file and facts do not fit."""
    assume = Assumptions(facts)
    state = _network(raw, assume)
    pad = assume.take("initial_pad", 0, "the default of the project's U-Net")
    placed = read_chain(state, _CHAIN, _style(state, assume))
    if not state.has("time_mlp."):
        placed = _without_time(state, placed, assume)
    if pad:
        image, last = placed[0][0], placed[-1][0]
        assert isinstance(image, c.Conv)
        assert isinstance(last, c.Conv)
        placed = [(c.Pad(image.in_channels, pad), ""), *placed, (c.Pad(last.out_channels, -pad), "")]
    config = _config(state, placed, pad, assume)
    weights = rename(state, placed, _CHAIN.names) | _time_and_labels(state, config, placed)
    state.check_all_used()
    return Translation(NAMES[0], config, weights, _diffusion(_schedule(raw, assume), assume), assume.made())


def _network(raw: Mapping[str, Any], assume: Assumptions) -> StateDict:
    """The chosen network's tensors; raises CheckpointError for tensors outside both networks and the buffers."""
    groups: dict[str, dict[str, Any]] = {"model": {}, "ema_model": {}}
    for key, value in raw.items():
        group, _, name = str(key).partition(".")
        if group in groups and name:
            groups[group][name] = value
        elif key not in _BUFFERS and isinstance(value, Tensor):
            raise CheckpointError(f"{key} is no buffer of this project; the file is of a modified version")
    is_averaged = choose_weights(assume, has_ema=bool(groups["ema_model"]), has_raw=bool(groups["model"]))
    return StateDict(groups["ema_model" if is_averaged else "model"])


def _style(state: StateDict, assume: Assumptions) -> Style:
    """Norm and activation of the blocks; raises CheckpointError for a norm that the file's tensors exclude."""
    activation = c.Activation(assume.take("activation", "silu", "the default of the project's scripts"))
    fitting: tuple[str, ...] = ("none", "instance")
    if state.has("out_norm."):
        fitting = ("batch",) if state.has("out_norm.running_mean") else ("group", "instance")
    kind = assume.given("norm") or fitting[0]
    if kind not in fitting:
        raise CheckpointError(f"the file's norms are {' or '.join(fitting)} by their tensors, and --norm says {kind}")
    if len(fitting) > 1:
        assume.take("norm", kind, f"the file fits {fitting[1]} norm as well")
    if kind == "group":
        groups = assume.take("num_groups", 32, "the default of the project's U-Net")
        return Style(c.Norm.GROUP, groups, activation)
    norms = {"instance": c.Norm.GROUP, "batch": c.Norm.AFFINE, "none": c.Norm.NONE}
    return Style(norms[kind], 0, activation)


def _config(state: StateDict, placed: list[Placed], pad: int, assume: Assumptions) -> c.UNetConfig:
    blocks = tuple(block for block, _ in placed)
    convs = [block for block in blocks if isinstance(block, c.Conv)]
    labels = [prefix for block, prefix in placed if isinstance(block, c.ResBlock) and state.has(f"{prefix}.class_bias")]
    side = 32 - 2 * pad
    activation = next(block.activation for block in blocks if isinstance(block, c.ResBlock))
    return c.UNetConfig(
        in_channels=convs[0].in_channels,
        out_channels=convs[-1].out_channels,
        image_size=assume.take("image_size", (side, side), "32 with its padding, as in the project's scripts"),
        time=_time(state, activation, assume) if state.has("time_mlp.") else None,
        blocks=blocks,
        num_classes=state.shape(f"{labels[0]}.class_bias.weight")[0] if labels else None,
        label_projection=bool(labels),
    )


def _time(state: StateDict, activation: c.Activation, assume: Assumptions) -> c.TimeConfig:
    channels, embed_channels = state.shape("time_mlp.1.weight")
    return c.TimeConfig(
        embed_channels,
        channels,
        order=c.EmbeddingOrder.SIN_COS,
        scale=assume.take("time_scale", 1.0, "the default of the project's U-Net"),
        projection_activation=activation,
    )


def _without_time(state: StateDict, placed: list[Placed], assume: Assumptions) -> list[Placed]:
    """The blocks of a network made with time_emb_dim None; raises CheckpointError for a fact about its time."""
    if assume.given("time_scale") is not None:
        raise CheckpointError(
            "the network does not see the timestep (it was made with time_emb_dim None), and --time-scale says "
            f"{assume.given('time_scale')}; leave it out"
        )
    has_labels = any(state.has(f"{prefix}.class_bias.") for _, prefix in placed if prefix)

    def blind(block: c.Block) -> c.Block:
        return dataclasses.replace(block, has_projection=has_labels) if isinstance(block, c.ResBlock) else block

    return [(blind(block), prefix) for block, prefix in placed]


def _time_and_labels(state: StateDict, config: c.UNetConfig, placed: list[Placed]) -> dict[str, Tensor]:
    """The time MLP and projections, and the blocks' label tables side by side; what of them the network has."""
    weights: dict[str, Tensor] = {}
    if config.time is not None:
        weights |= time_projections(state, placed, _CHAIN.names)
        for ours, theirs in (("linear1", "time_mlp.1"), ("linear2", "time_mlp.3")):
            for part in ("weight", "bias"):
                weights[f"time.{ours}.{part}"] = state.take(f"{theirs}.{part}")
    if config.num_classes is not None:
        tables = [
            state.take(f"{prefix}.class_bias.weight") for block, prefix in placed if isinstance(block, c.ResBlock)
        ]
        weights["time.label.weight"] = torch.cat(tables, dim=1)
    return weights


def _schedule(raw: Mapping[str, Any], assume: Assumptions) -> NoiseSchedule:
    """The schedule of the file; raises CheckpointError if the user says another length."""
    betas = raw["betas"]
    if assume.given("num_train_timesteps") not in (None, len(betas)):
        raise CheckpointError(
            f"the file has {len(betas)} betas, and --num-train-timesteps says {assume.given('num_train_timesteps')}; "
            "leave it out"
        )
    return schedule_from_betas(betas)


def _diffusion(schedule: NoiseSchedule, assume: Assumptions) -> Diffusion:
    is_clipped = assume.take("clip_denoised", False, "the project's sampler never limits x0")
    return Diffusion(
        schedule,
        Prediction(assume.given("prediction") or "eps"),
        Variance(assume.given("variance") or "fixed_large"),
        clip=1.0 if is_clipped else None,
    )
