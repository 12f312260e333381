"""plain: the file of a small training script, a dict with net, epoch and image_size.

Widths, depths and attention follow from keys and shapes, and the file says the image size. The script has 8 groups in
every norm, one head, the cosine schedule and a network that predicts v; its sampler limits x0 to [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engine.checkpoints.facts import Facts
from engine.checkpoints.families.chain import Chain, Names, Style, read_chain, rename, time_projections
from engine.checkpoints.families.state_dict import StateDict
from engine.checkpoints.types import Assumptions, Translation
from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import cosine_schedule
from engine.networks import config as c

NAMES: tuple[str, ...] = ("plain",)
NEEDS = "a dict with net, the state dict, which has stem.weight and embed.0.weight"

_CHAIN = Chain(
    names=Names(
        res={
            "norm1": "norm_a",
            "conv1": "conv_a",
            "norm2": "norm_b",
            "conv2": "conv_b",
            "shortcut": "skip",
            "projection": "time",
        },
        attention={"norm": ("norm",), "qkv": ("qkv",), "out": ("proj",)},
    ),
    head="stem",
    down="encoder",
    middle="bottleneck",
    up="decoder",
    tail_norm="out_norm",
    tail_conv="out",
    attention="attn",
    down_conv="conv",
    up_conv="conv",
)


def matches(raw: Any) -> bool:
    """Whether the file holds a network of this script."""
    return isinstance(raw, Mapping) and isinstance(raw.get("net"), Mapping) and "stem.weight" in raw["net"]


def translate(raw: Any, facts: Facts) -> Translation:
    """Config, weights and diffusion conventions; raises CheckpointError where file and facts do not fit."""
    state, assume = StateDict(raw["net"]), Assumptions(facts)
    placed = read_chain(state, _CHAIN, Style(groups=8))
    size = int(raw["image_size"])
    channels, embed_channels = state.shape("embed.0.weight")
    config = c.UNetConfig(
        in_channels=state.shape("stem.weight")[1],
        out_channels=state.shape("out.weight")[0],
        image_size=(size, size),
        time=c.TimeConfig(embed_channels, channels, c.EmbeddingOrder.SIN_COS),
        blocks=tuple(block for block, _ in placed),
    )
    weights = rename(state, placed, _CHAIN.names) | time_projections(state, placed, _CHAIN.names)
    for ours, theirs in (("linear1", "0"), ("linear2", "2")):
        for part in ("weight", "bias"):
            weights[f"time.{ours}.{part}"] = state.take(f"embed.{theirs}.{part}")
    state.check_all_used()
    diffusion = Diffusion(
        cosine_schedule(assume.take("num_train_timesteps", 1000, "the script's default")),
        Prediction.V,
        Variance(assume.take("variance", "fixed_small", "the script's sampler")),
    )
    return Translation(NAMES[0], config, weights, diffusion, assume.made())
