"""The U-Net of a widely read DDPM tutorial: a bare state dict with proj1, down_0..3, middle, up_0..3 and proj2.

Every level holds a resampling layer and attention whether it uses them or not. As in the tutorial, all levels of the
way down but the first begin by halving, all of the way up but the last end by doubling, and the two lowest resolutions
attend. The time embedding has sines, then cosines, of angles t * 10000^(-i / (half - 1)); attention adds its result to
the normalised input. Sampling: variance beta_t, x0 is never limited.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from engine.checkpoints.facts import Facts
from engine.checkpoints.families.chain import (
    Names,
    Placed,
    Style,
    attention_block,
    read_conv,
    rename,
    res_block,
    time_projections,
)
from engine.checkpoints.families.state_dict import StateDict
from engine.checkpoints.types import Assumptions, Translation
from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import NoiseSchedule
from engine.errors import CheckpointError
from engine.networks import config as c

NAMES: tuple[str, ...] = ("tutorial",)
NEEDS = "a bare state dict with time_embedding.embed1.weight, proj1.weight, down_0.*, middle.*, up_0.* and proj2.weight"

_LEVELS, _ATTENDING_LEVELS = 4, 2
_IDLE = re.compile(
    r"down_0\.down_sample\.|up_3\.up_sample\.|down_[01]\.down_block[12]\.attn\.|up_[23]\.up_block[123]\.attn\."
)
"""The layers that the tutorial's levels make and do not run."""

_NAMES = Names(
    res={
        "norm1": "norm1",
        "conv1": "conv1",
        "norm2": "norm2",
        "conv2": "conv2",
        "shortcut": "shortcut",
        "projection": "time_proj",
    },
    attention={"norm": ("norm",), "qkv": ("proj",), "out": ("output",)},
)


def matches(raw: Any) -> bool:
    """Whether the keys are those of the tutorial's U-Net."""
    needed = {"time_embedding.embed1.weight", "proj1.weight", "proj2.weight"}
    return isinstance(raw, Mapping) and needed <= set(raw)


def translate(raw: Any, facts: Facts) -> Translation:
    """Config, weights and diffusion conventions; raises CheckpointError where file and facts do not fit."""
    state = StateDict(raw)
    assume = Assumptions(facts)
    placed = _Reader(state, assume).read()
    config = c.UNetConfig(
        in_channels=state.shape("proj1.weight")[1],
        out_channels=state.shape("proj2.weight")[0],
        image_size=assume.take("image_size", (32, 32), "the tutorial's CIFAR-10"),
        time=c.TimeConfig(
            embed_channels=state.shape("time_embedding.embed1.weight")[1],
            channels=state.shape("time_embedding.embed1.weight")[0],
            order=c.EmbeddingOrder.SIN_COS,
            shift=1.0,
        ),
        blocks=tuple(block for block, _ in placed),
    )
    weights = rename(state, placed, _NAMES) | time_projections(state, placed, _NAMES)
    for ours, theirs in (("linear1", "embed1"), ("linear2", "embed2")):
        for part in ("weight", "bias"):
            weights[f"time.{ours}.{part}"] = state.take(f"time_embedding.{theirs}.{part}")
    for key in filter(_IDLE.match, list(state.keys())):
        state.take(key)
    state.check_all_used()
    return Translation(NAMES[0], config, weights, _diffusion(assume), assume.made())


class _Reader:
    """Walks the levels in the order of the tutorial's forward pass."""

    def __init__(self, state: StateDict, assume: Assumptions) -> None:
        self._state = state
        self._style = Style(groups=assume.take("num_groups", 32, "the tutorial's"))
        self._heads = _heads(state, assume)

    def read(self) -> list[Placed]:
        placed: list[Placed] = [(read_conv(self._state, "proj1"), "proj1")]
        for level in range(_LEVELS):
            name = f"down_{level}"
            if level > 0:
                half = f"{name}.down_sample"
                placed.append((c.Downsample(self._state.shape(f"{half}.weight")[0], conv=True), half))
            placed.append((c.Push(), ""))
            for part in (1, 2):
                attends = level >= _LEVELS - _ATTENDING_LEVELS
                placed += [*self._block(f"{name}.down_block{part}", attends), (c.Push(), "")]
        placed.append((self._res("middle.residual_block1"), "middle.residual_block1"))
        placed.append((self._attention("middle.attn"), "middle.attn"))
        placed.append((self._res("middle.residual_block2"), "middle.residual_block2"))
        for level in range(_LEVELS):
            name = f"up_{level}"
            for part in (1, 2, 3):
                placed += [(c.Pop(), ""), *self._block(f"{name}.up_block{part}", level < _ATTENDING_LEVELS)]
            if level < _LEVELS - 1:
                double = f"{name}.up_sample"
                placed.append((c.TransposedConv(self._state.shape(f"{double}.weight")[0]), double))
        return [*placed, (read_conv(self._state, "proj2"), "proj2")]

    def _block(self, prefix: str, attends: bool) -> list[Placed]:
        res, attention = f"{prefix}.residual_block", f"{prefix}.attn"
        tail: list[Placed] = [(self._attention(attention), attention)] if attends else []
        return [(self._res(res), res), *tail]

    def _res(self, prefix: str) -> c.ResBlock:
        return res_block(self._state, prefix, _NAMES, self._style)

    def _attention(self, prefix: str) -> c.Attention:
        return attention_block(self._state, prefix, _NAMES, self._style, self._heads, adds_to_norm=True)


def _heads(state: StateDict, assume: Assumptions) -> int:
    """The number of heads: several of the block's full width show in the file; others, of a part of it, do not."""
    rows, channels = state.shape("middle.attn.proj.weight")
    if rows == 3 * channels:
        heads: int = assume.take("num_heads", 1, "the tutorial's")
        return heads
    if rows % (3 * channels) or assume.given("num_heads") not in (None, rows // (3 * channels)):
        raise CheckpointError(
            f"middle.attn.proj has {rows} rows for {channels} channels, {rows / (3 * channels):g} heads of full width; "
            "leave --num-heads out"
        )
    return rows // (3 * channels)


def _diffusion(assume: Assumptions) -> Diffusion:
    if assume.given("noise_schedule") not in (None, "linear"):
        raise CheckpointError("the tutorial has the linear schedule only; leave --noise-schedule out")
    steps = assume.take("num_train_timesteps", 1000, "the tutorial's")
    start, end = assume.take("beta_start", 1e-4, "the tutorial's"), assume.take("beta_end", 0.02, "the tutorial's")
    is_clipped = assume.take("clip_denoised", False, "the tutorial never limits x0")
    return Diffusion(
        NoiseSchedule(np.linspace(start, end, steps, dtype=np.float64)),
        Prediction(assume.given("prediction") or "eps"),
        Variance(assume.take("variance", "fixed_large", "the tutorial's beta_t")),
        clip=1.0 if is_clipped else None,
    )
