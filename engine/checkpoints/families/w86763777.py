"""w86763777/pytorch-ddpm: a dict with net_model, ema_model, sched, optim, step and x_T.

T is the number of rows of the stored sinusoidal table, the image size that of x_T; everything else about the network
follows from keys and shapes. The betas are linear, their ends flags of the project's script. The x0 that its sampler
limits is not used for the mean, so nothing is limited but the finished image; no noise is added at t = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoints.facts import Facts
from engine.checkpoints.families.chain import Chain, Names, Style, read_chain, rename, time_projections
from engine.checkpoints.families.common import choose_weights
from engine.checkpoints.families.state_dict import StateDict
from engine.checkpoints.types import Assumptions, Translation
from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import NoiseSchedule
from engine.errors import CheckpointError
from engine.networks import config as c
from kernels.reference import timestep_embedding

NAMES: tuple[str, ...] = ("w86763777",)
NEEDS = "a dict with net_model or ema_model, or the state dict of one: time_embedding.timembedding.*, head.weight, ..."

_TABLE = "time_embedding.timembedding.0.weight"
_TABLE_ROUNDING = 5e-3
"""Of a sine in bfloat16; in float16 and float32 it is less."""

_CHAIN = Chain(
    names=Names(
        res={
            "norm1": "block1.0",
            "conv1": "block1.2",
            "norm2": "block2.0",
            "conv2": "block2.3",
            "shortcut": "shortcut",
            "projection": "temb_proj.1",
        },
        attention={"norm": ("group_norm",), "qkv": ("proj_q", "proj_k", "proj_v"), "out": ("proj",)},
    ),
    head="head",
    down="downblocks",
    middle="middleblocks",
    up="upblocks",
    tail_norm="tail.0",
    tail_conv="tail.2",
    attention="attn",
    down_conv="main",
    up_conv="main",
)


def matches(raw: Any) -> bool:
    """Whether the dict holds a network of this project, or is the state dict of one."""
    return isinstance(raw, Mapping) and any(_is_network(v) for v in (raw, raw.get("ema_model"), raw.get("net_model")))


def _is_network(value: Any) -> bool:
    return isinstance(value, Mapping) and {_TABLE, "head.weight"} <= set(value)


def translate(raw: Any, facts: Facts) -> Translation:
    """Config, weights and diffusion conventions; raises CheckpointError where file and facts do not fit."""
    assume = Assumptions(facts)
    content = {"net_model": raw} if _is_network(raw) else raw
    is_averaged = choose_weights(assume, _is_network(content.get("ema_model")), _is_network(content.get("net_model")))
    state = StateDict(content["ema_model" if is_averaged else "net_model"])
    groups = assume.given("num_groups") or 32
    placed = read_chain(state, _CHAIN, Style(groups=groups))
    blocks = tuple(block for block, _ in placed)
    steps, embed_channels = state.shape(_TABLE)
    channels = state.shape("time_embedding.timembedding.1.weight")[0]
    config = c.UNetConfig(
        in_channels=state.shape("head.weight")[1],
        out_channels=state.shape("tail.2.weight")[0],
        image_size=_image_size(content.get("x_T"), assume),
        time=c.TimeConfig(embed_channels, channels, c.EmbeddingOrder.INTERLEAVED),
        blocks=blocks,
    )
    weights = rename(state, placed, _CHAIN.names) | time_projections(state, placed, _CHAIN.names)
    for ours, theirs in (("linear1", "1"), ("linear2", "3")):
        for part in ("weight", "bias"):
            weights[f"time.{ours}.{part}"] = state.take(f"time_embedding.timembedding.{theirs}.{part}")
    _check_table(state)
    state.check_all_used()
    return Translation(NAMES[0], config, weights, _diffusion(steps, assume), assume.made())


def _image_size(x_t: Any, assume: Assumptions) -> tuple[int, int]:
    """Height and width of x_T, the noise that the project's training draws its previews from."""
    given: tuple[int, int] | None = assume.given("image_size")
    if not isinstance(x_t, Tensor) or x_t.ndim != 4:
        size: tuple[int, int] = assume.take("image_size", (32, 32), "the project's CIFAR-10; the file has no x_T")
        return size
    height, width = x_t.shape[2:]
    if given is not None and given != (height, width):
        raise CheckpointError(
            f"x_T of the file is {height}x{width}, and --image-size says {given[0]}x{given[1]}; leave it out"
        )
    return height, width


def _check_table(state: StateDict) -> None:
    """Raises CheckpointError unless the stored time embedding is the sinusoidal one, to rounding."""
    table = state.take(_TABLE)
    if table.is_meta:
        return
    steps, channels = table.shape
    expected = timestep_embedding(torch.arange(steps, dtype=torch.float32), channels, order="interleaved")
    # The angle of row t is rounded to t * 6e-8, by each of the two.
    worst = float((table - expected).abs().max())
    if not worst <= _TABLE_ROUNDING + 1e-6 * steps:
        raise CheckpointError(
            f"{_TABLE} differs by {worst:.2g} from the sinusoidal embedding of {steps} timesteps; a network with "
            "another time embedding is not of this project"
        )


def _diffusion(steps: int, assume: Assumptions) -> Diffusion:
    if assume.given("num_train_timesteps") not in (None, steps):
        raise CheckpointError(
            f"the time table has {steps} rows, and --num-train-timesteps says {assume.given('num_train_timesteps')}; "
            "leave it out"
        )
    if assume.given("noise_schedule") not in (None, "linear"):
        raise CheckpointError("this project has the linear schedule only; leave --noise-schedule out")
    script = "the default of the project's script"
    start, end = assume.take("beta_start", 1e-4, script), assume.take("beta_end", 0.02, script)
    is_clipped = assume.take("clip_denoised", False, "the project's sampler limits the finished image only")
    return Diffusion(
        NoiseSchedule(np.linspace(start, end, steps, dtype=np.float64)),
        Prediction(assume.take("prediction", "eps", script)),
        Variance(assume.take("variance", "fixed_large", script)),
        clip=1.0 if is_clipped else None,
    )
