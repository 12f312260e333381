"""lucidrains' denoising-diffusion-pytorch, releases 0.27 to 2.3: what its Trainer saves, or a bare state dict.

The network is under `model.`, a discrete schedule in float32 buffers beside it; averaged weights are a second such
dictionary. Structure follows from keys and shapes, the objective from the loss weights, and what only the version
tells (engine.checkpoints.families.lucidrains_layout.Release) from the version entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoints.facts import Facts
from engine.checkpoints.families.common import choose_weights, fold_attention_scale, schedule_from_betas
from engine.checkpoints.families.lucidrains_layout import (
    Layout,
    Placed,
    Release,
    attention_prefix,
    has_classes,
    release_of,
)
from engine.checkpoints.families.state_dict import StateDict
from engine.checkpoints.types import Assumptions, Translation
from engine.diffusion.continuous import LogSnr, MonotoneNet, time_slices
from engine.diffusion.prediction import Diffusion, Prediction, Spacing, Variance
from engine.diffusion.schedule import NoiseSchedule, named_schedule
from engine.errors import CheckpointError
from engine.networks import config as c

NAMES: tuple[str, ...] = ("lucidrains",)
NEEDS = (
    "the Trainer's file (model, ema with ema_model.model.*), or a state dict with init_conv.weight and "
    "downs.0.0.block1.proj.weight, alone or below model."
)

_MARKS = ("init_conv.weight", "downs.0.0.block1.proj.weight")
_BUFFERS = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "p2_loss_weight",
    "loss_weight",
)
_SLICES = 500
"""Steps of the project's continuous-time sampler unless it is told otherwise."""


def matches(raw: Any) -> bool:
    """Whether the keys are those of this project."""
    return any(_is_network(part) for part in _parts(raw).values())


def _parts(raw: Any) -> dict[str, dict[str, Tensor]]:
    """The state dicts of the diffusion object in a file: "ema", "raw" or both, with the network below `model.`."""
    if not isinstance(raw, Mapping):
        return {}
    nested = {"raw": raw.get("model"), "ema": raw.get("ema")}
    bare = not any(isinstance(value, Mapping) for value in nested.values())
    parts: dict[str, dict[str, Tensor]] = {}
    for kind, content in ({"raw": raw} if bare else nested).items():
        if isinstance(content, Mapping):
            tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
            averaged = _below(tensors, "ema_model.")
            parts |= {"ema": averaged} if averaged else {kind: tensors}
            if averaged and bare and (online := _below(tensors, "online_model.")):
                parts["raw"] = online
    return {
        kind: {f"model.{key}": value for key, value in part.items()} if _MARKS[0] in part else part
        for kind, part in parts.items()
    }


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _is_network(part: Mapping[str, Tensor]) -> bool:
    return all(f"model.{mark}" in part for mark in _MARKS)


def translate(raw: Any, facts: Facts) -> Translation:
    """Config, weights and diffusion conventions; raises CheckpointError where file and facts do not fit."""
    assume = Assumptions(facts)
    parts = {kind: part for kind, part in _parts(raw).items() if _is_network(part)}
    is_averaged = choose_weights(assume, "ema" in parts, "raw" in parts)
    part = parts["ema" if is_averaged else "raw"]
    state = StateDict(part)
    version = raw.get("version")
    is_of_trainer = isinstance(raw.get("model"), Mapping)
    release = release_of(state, version if isinstance(version, str) else None, is_of_trainer, assume)
    placed = Layout(state, release, assume).blocks()
    config = _config(state, placed, assume)
    weights = _weights(state, placed, config, release)
    diffusion = _diffusion(state, part.get("betas"), config, release, assume)
    state.check_all_used()
    return Translation(NAMES[0], config, weights, diffusion, assume.made())


def _config(state: StateDict, placed: list[Placed], assume: Assumptions) -> c.UNetConfig:
    blocks = tuple(block for block, _ in placed)
    channels_in, channels_out = state.shape("model.init_conv.weight")[1], state.shape("model.final_conv.weight")[0]
    is_self_conditioned = channels_in == 2 * channels_out
    channels = channels_out if is_self_conditioned else channels_in
    if channels_out not in (channels, 2 * channels):
        raise CheckpointError(
            f"the network takes {channels_in} channels and gives {channels_out}; expected as many, twice as many "
            "(learned variance) or half as many (self-conditioning). Weighted objectives (2 C + 2) are not supported"
        )
    if assume.given("image_size") is None:
        factor = 2 ** c.count_downsamplings(blocks)
        raise CheckpointError(
            f"the image size is not in the file; give it with --image-size HxW (a multiple of {factor} each way)"
        )
    classes = state.shape("model.classes_emb.weight")[0] if has_classes(state) else None
    return c.UNetConfig(
        in_channels=channels,
        out_channels=channels_out,
        image_size=assume.given("image_size"),
        time=_time(state, assume),
        blocks=blocks,
        num_classes=None if classes is None else classes + 1,
        null_class=classes,
        cond_channels=channels if is_self_conditioned else 0,
        cond_first=is_self_conditioned,
        self_condition=is_self_conditioned,
        label_projection=classes is not None,
    )


def _time(state: StateDict, assume: Assumptions) -> c.TimeConfig:
    order, gelu = c.EmbeddingOrder.SIN_COS, c.Activation.GELU
    channels, embed_channels = state.shape("model.time_mlp.1.weight")
    if state.has("model.time_mlp.0.weights"):
        return c.TimeConfig(embed_channels, channels, order, has_frequencies=True, keeps_timestep=True, activation=gelu)
    # An argument of the main network from 1.8 on.
    can_differ = not state.has("model.mid_attn.fn.")
    theta = assume.take("time_theta", 10000.0, "the default of the project") if can_differ else 10000.0
    return c.TimeConfig(embed_channels, channels, order, shift=1.0, theta=theta, activation=gelu)


def _weights(state: StateDict, placed: list[Placed], config: c.UNetConfig, release: Release) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        weights[f"time.linear1.{part}"] = state.take(f"model.time_mlp.1.{part}")
        weights[f"time.linear2.{part}"] = state.take(f"model.time_mlp.3.{part}")
    assert config.time is not None
    if config.time.has_frequencies:
        weights["time.frequencies"] = state.take("model.time_mlp.0.weights")
    projections: list[Tensor] = []
    biases: list[Tensor] = []
    for index, (block, prefix) in enumerate(placed):
        ours = f"blocks.{index}"
        match block:
            case c.Conv():
                weights |= _linear(state, ours, prefix)
            case c.Downsample():
                weights |= _linear(state, f"{ours}.conv", prefix)
            case c.ResBlock():
                weights |= _res(state, ours, prefix, block, release)
                projections.append(state.take(f"{prefix}.mlp.1.weight"))
                biases.append(state.take(f"{prefix}.mlp.1.bias"))
            case c.Attention() | c.LinearAttention():
                weights |= _attention(state, ours, prefix, block)
    stacked = torch.cat(projections)
    weights["time.projection.weight"] = stacked[:, : config.time.channels].contiguous()
    weights["time.projection.bias"] = torch.cat(biases)
    if config.num_classes is not None:
        weights["time.label.weight"] = _label_rows(state, stacked[:, config.time.channels :])
    return weights


def _linear(state: StateDict, ours: str, prefix: str) -> dict[str, Tensor]:
    return {f"{ours}.{part}": state.take(f"{prefix}.{part}") for part in ("weight", "bias")}


def _norm(state: StateDict, ours: str, prefix: str, norm: c.Norm) -> dict[str, Tensor]:
    if norm is c.Norm.GROUP:
        return _linear(state, ours, prefix)
    return {f"{ours}.weight": state.take(f"{prefix}.g").flatten()}


def _res(state: StateDict, ours: str, prefix: str, block: c.ResBlock, release: Release) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for number in (1, 2):
        weights |= _linear(state, f"{ours}.conv{number}", f"{prefix}.block{number}.proj")
        weights |= _norm(state, f"{ours}.norm{number}", f"{prefix}.block{number}.norm", block.norm)
        if release.standardises_weights:
            weights[f"{ours}.conv{number}.weight"] = standardised(weights[f"{ours}.conv{number}.weight"])
    if block.in_channels != block.out_channels or block.has_shortcut:
        weights |= _linear(state, f"{ours}.shortcut", f"{prefix}.res_conv")
    return weights


def standardised(weight: Tensor) -> Tensor:
    """(w - mean) / sqrt(var + 1e-5) over each output's weights [O, I, k, k].

    Qiao et al., Weight standardization (2019), eq. 9.
    """
    w = weight.double()
    mean = w.mean(dim=(1, 2, 3), keepdim=True)
    variance = (w - mean).square().mean(dim=(1, 2, 3), keepdim=True)
    return ((w - mean) / torch.sqrt(variance + 1e-5)).float()


def _attention(state: StateDict, ours: str, prefix: str, block: c.Attention | c.LinearAttention) -> dict[str, Tensor]:
    is_linear = isinstance(block, c.LinearAttention)
    inner = attention_prefix(state, prefix)
    qkv = state.take(f"{inner}.to_qkv.weight")
    if isinstance(block, c.Attention) and block.cosine_scale is None:
        qkv = fold_attention_scale(qkv, block.heads)
    weights = _norm(state, f"{ours}.norm", f"{prefix}.norm", block.norm)
    weights |= {f"{ours}.qkv.weight": qkv, f"{ours}.qkv.bias": torch.zeros(len(qkv))}
    weights |= _linear(state, f"{ours}.out", f"{inner}.to_out.0" if is_linear else f"{inner}.to_out")
    if is_linear:
        weights |= _norm(state, f"{ours}.out_norm", f"{inner}.to_out.1", block.norm)
    if block.memory:
        memory = state.take(f"{inner}.mem_kv")
        weights[f"{ours}.memory"] = memory.transpose(2, 3).contiguous() if is_linear else memory
    return weights


def _label_rows(state: StateDict, projection: Tensor) -> Tensor:
    """[classes + 1, P]: what each class, and no class in the last row, adds to the stacked time projections.

    A block projects SiLU of the class embedding's MLP beside SiLU of the time's; the class part is a table.
    """
    table = torch.cat([state.take("model.classes_emb.weight"), state.take("model.null_classes_emb")[None]]).double()
    for layer in (0, 2):
        weight, bias = (state.take(f"model.classes_mlp.{layer}.{part}").double() for part in ("weight", "bias"))
        table = F.linear(table, weight, bias)
        table = F.gelu(table) if layer == 0 else F.silu(table)
    return (table @ projection.double().T).float()


def _diffusion(
    state: StateDict, betas: Tensor | None, config: c.UNetConfig, release: Release, assume: Assumptions
) -> Diffusion:
    """betas: [T] as stored, since their dtype tells how far they were rounded."""
    is_learned = config.out_channels == 2 * config.in_channels
    variance = Variance.LEARNED_RANGE if is_learned else Variance.FIXED_SMALL
    is_clipped = assume.given("clip_denoised") is not False
    if betas is None and config.time is not None and config.time.has_frequencies:
        prediction = Prediction(assume.take("prediction", "eps", "the file does not say; v-param files predict v"))
        log_snr = _log_snr(state, prediction, assume)
        return Diffusion(
            NoiseSchedule(time_slices(log_snr, _SLICES).betas),
            prediction,
            variance,
            clip=1.0 if is_clipped else None,
            data_range=(0.0, 1.0),
            log_snr=log_snr,
        )
    schedule = _schedule(betas, assume)
    prediction = Prediction.EPS if is_learned else _prediction(state, schedule, assume)
    if is_learned and assume.given("prediction") is not None:
        prediction = Prediction(assume.given("prediction"))
    is_mapped = has_classes(state) or assume.take("auto_normalize", True, "the default of the project")
    for name in _BUFFERS:
        if state.has(name):
            state.take(name)
    return Diffusion(
        schedule,
        prediction,
        variance,
        clip=1.0 if is_clipped else None,
        data_range=(0.0, 1.0) if is_mapped else (-1.0, 1.0),
        spacing=Spacing.TRUNCATED,
        # The others re-derive it: learned variance and the class-conditional sampler do not, nor do old releases,
        # but only where the network predicts eps.
        keeps_eps=is_learned or (prediction is Prediction.EPS and (has_classes(state) or release.keeps_eps)),
    )


def _schedule(betas: Tensor | None, assume: Assumptions) -> NoiseSchedule:
    given = assume.given("noise_schedule")
    if betas is None:
        steps = assume.take("num_train_timesteps", 1000, "the default of the project")
        kind = assume.take("noise_schedule", "sigmoid", "the default of the project since 1.5; the file has no betas")
        return named_schedule(kind, steps)
    schedule = schedule_from_betas(betas)
    if given and not np.allclose(schedule.betas, named_schedule(given, len(betas)).betas, rtol=1e-6, atol=0):
        raise CheckpointError(f"the file's betas are not the {given} schedule's; leave --noise-schedule out")
    steps = assume.given("num_train_timesteps")
    if steps not in (None, len(betas)):
        raise CheckpointError(f"the file has {len(betas)} betas, not {steps}; leave --num-train-timesteps out")
    return schedule


def _prediction(state: StateDict, schedule: NoiseSchedule, assume: Assumptions) -> Prediction:
    """What the network predicts: the loss weights in the file tell, else the user or the default of the time."""
    if not state.has("betas"):
        return Prediction(assume.take("prediction", "v", "the default of the project since 1.6.4"))
    if not state.has("loss_weight"):
        return Prediction(assume.take("prediction", "eps", "the default of releases as old as this file"))
    found, given = find_objective(state.take("loss_weight"), schedule), assume.given("prediction")
    if found is None and given is None:
        raise CheckpointError("the file's loss_weight fits no known objective; give --prediction eps, x0 or v")
    if found is None:
        return Prediction(given)
    if given not in (None, found[0].value):
        raise CheckpointError(
            f"the file's loss_weight is that of a network that predicts {found[0].value}, --prediction says {given}; "
            "leave it out"
        )
    return found[0]


def find_objective(loss_weight: Tensor, schedule: NoiseSchedule) -> tuple[Prediction, float, float] | None:
    """The objective that gives the loss weights [T], and the limits of the snr in them; None if none or several do.

    With s = snr limited to gamma the weight is s / snr for eps, s for x0 and s / (snr + 1) for v; Hang et al., Min-SNR
    (2023), section 3.4. Releases before 1.5.8 limit it from below instead. Mostly there is no limit.
    """
    abar = schedule.alphas_cumprod
    snr = abar / (1 - abar)
    fitting = []
    for prediction, factor in ((Prediction.EPS, snr), (Prediction.X0, np.ones_like(snr)), (Prediction.V, snr + 1)):
        limited = loss_weight.double().numpy() * factor
        for low, high in ((0.0, float(limited.max())), (float(limited.min()), math.inf)):
            # bfloat16 rounds to 4e-3.
            if np.allclose(limited, np.clip(snr, low, high), rtol=1e-2, atol=1e-7):
                fitting.append((prediction, low, high))
                break
    return fitting[0] if len(fitting) == 1 else None


def _log_snr(state: StateDict, prediction: Prediction, assume: Assumptions) -> LogSnr:
    """The continuous-time schedule: learned if the file holds its network, else by name."""
    if not state.has("log_snr."):
        if prediction is Prediction.V:
            kind = assume.take("noise_schedule", "cosine", "the only one of the v-param diffusion")
        else:
            kind = assume.take("noise_schedule", "linear", "the default of the continuous-time diffusion")
        if kind == "learned":
            raise CheckpointError("the file holds no learned schedule (log_snr.*); is --noise-schedule right?")
        if kind == "sigmoid":
            raise CheckpointError("there is no sigmoid schedule in continuous time; give linear or cosine")
        return LogSnr(kind)
    if assume.given("noise_schedule") not in (None, "learned"):
        raise CheckpointError("the file holds a learned schedule (log_snr.*); leave --noise-schedule out")

    def values(name: str) -> tuple[float, ...]:
        return tuple(state.take(f"log_snr.net.{name}").double().abs().flatten().tolist())

    net = MonotoneNet(
        slope=values("1.net.weight")[0],
        shift=values("1.net.bias")[0],
        inner=values("2.fn.0.net.weight"),
        inner_shift=values("2.fn.0.net.bias"),
        outer=values("2.fn.2.net.weight"),
        outer_shift=values("2.fn.2.net.bias")[0],
    )
    return LogSnr("learned", net)
