"""Facts about a checkpoint that its file may not hold: one list, used by load_checkpoint and every command line."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import CheckpointError, RequestError


def parse_image_size(text: str) -> tuple[int, int]:
    """ "64" or "64x48" (height x width) as (height, width)."""
    parts = text.lower().split("x")
    height, width = int(parts[0]), int(parts[-1])
    if len(parts) > 2 or height <= 0 or width <= 0:
        raise ValueError(text)
    return height, width


def parse_counts(text: str) -> tuple[int, ...]:
    """ "4,4,8" as (4, 4, 8)."""
    counts = tuple(int(part) for part in text.split(","))
    if min(counts) < 1:
        raise ValueError(text)
    return counts


def _fact(help_text: str, **argument: Any) -> Any:
    return field(default=None, metadata={"help": help_text, **argument})


@dataclass(frozen=True, slots=True)
class Facts:
    """What the user says about a checkpoint; None means "not said": the file or a documented default decides."""

    family: str | None = _fact(
        "the project that wrote the file, where it is not plain: openai-guided, openai-improved, lucidrains, "
        "abarankab, w86763777, tutorial or diffusers"
    )
    image_size: tuple[int, int] | None = _fact("height x width in pixels, e.g. 64 or 64x48", type=parse_image_size)
    num_heads: int | None = _fact("attention heads in every attention block", type=int)
    num_head_channels: int | None = _fact("channels of one attention head; instead of --num-heads", type=int)
    num_heads_upsample: int | None = _fact("attention heads on the way up, if they differ", type=int)
    attention_order: str | None = _fact(
        "row order of the qkv projection: legacy (head, qkv, dim) or new (qkv, head, dim)", choices=("legacy", "new")
    )
    num_train_timesteps: int | None = _fact("T, number of noise levels in training (default 1000)", type=int)
    noise_schedule: str | None = _fact(
        "betas in training, or log-SNR in continuous time (default linear)",
        choices=("linear", "cosine", "sigmoid", "learned"),
    )
    rescale_timesteps: bool | None = _fact("the network was fed t * 1000 / T", action=argparse.BooleanOptionalAction)
    prediction: str | None = _fact("what the network predicts (default eps)", choices=("eps", "x0", "v", "x_prev"))
    variance: str | None = _fact(
        "variance of a DDPM step without variance channels (default fixed_large)",
        choices=("fixed_small", "fixed_large"),
    )
    clip_denoised: bool | None = _fact("limit x0 to [-1, 1] at every step", action=argparse.BooleanOptionalAction)
    num_classes: int | None = _fact("how many classes there are, where labels are plain numbers", type=int)
    null_class: int | None = _fact("label that means no class, for classifier-free guidance", type=int)
    super_resolution: bool | None = _fact(
        "half of the input channels are a low-resolution image", action=argparse.BooleanOptionalAction
    )
    num_res_blocks: int | None = _fact("ResBlocks a level, where a classifier's file leaves it open", type=int)
    weights: str | None = _fact(
        "averaged (ema) or raw weights, where a file has both (default ema)", choices=("ema", "raw")
    )
    num_groups: int | None = _fact("groups of every group norm (default 32, or the project's own)", type=int)
    norm: str | None = _fact(
        "normalisation in the blocks (default: what the file's tensors fit, group first)",
        choices=("group", "instance", "batch", "none"),
    )
    activation: str | None = _fact("non-linearity of the blocks (default silu)", choices=("silu", "relu", "mish"))
    time_scale: float | None = _fact("factor on the timestep before its embedding (default 1)", type=float)
    initial_pad: int | None = _fact("pixels of zeros put around the image (default 0)", type=int)
    beta_start: float | None = _fact("first beta of a linear schedule (default 1e-4)", type=float)
    beta_end: float | None = _fact("last beta of a linear schedule (default 0.02)", type=float)
    release: str | None = _fact("version of the project that wrote the file, e.g. 1.7.2 (default: as in the file)")
    level_heads: tuple[int, ...] | None = _fact(
        "attention heads of each level, where they differ, e.g. 4,4,8", type=parse_counts
    )
    level_head_channels: tuple[int, ...] | None = _fact(
        "channels of a head at each level, where they differ, e.g. 32,32,64", type=parse_counts
    )
    time_theta: float | None = _fact("base of the time embedding's frequencies (default 10000)", type=float)
    auto_normalize: bool | None = _fact(
        "the training mapped images from [0, 1] to [-1, 1] (default yes)", action=argparse.BooleanOptionalAction
    )


def flag(name: str) -> str:
    """The command line flag of a fact."""
    return "--" + name.replace("_", "-")


def make_facts(given: Mapping[str, Any]) -> Facts:
    """Facts from keyword arguments; raises CheckpointError for an unknown name or an impossible value."""
    known = {f.name: f for f in dataclasses.fields(Facts)}
    if unknown := sorted(set(given) - set(known)):
        raise CheckpointError(f"unknown checkpoint fact {', '.join(unknown)}; known: {', '.join(known)}")
    return Facts(**{name: None if value is None else _checked(known[name], value) for name, value in given.items()})


def _checked(f: dataclasses.Field[Any], value: Any) -> Any:
    """A fact in its own type; raises CheckpointError for a value that it cannot have."""
    kind, choices = f.metadata.get("type"), f.metadata.get("choices")
    if choices and value not in choices:
        raise CheckpointError(f"{f.name} is {value!r}; expected one of {', '.join(choices)}")
    if f.metadata.get("action") is argparse.BooleanOptionalAction and not isinstance(value, bool):
        raise CheckpointError(f"{f.name} is {value!r}; expected True or False")
    least = 0 if f.name in ("null_class", "initial_pad") else 1
    try:
        if kind is parse_image_size:
            return parse_image_size(value if isinstance(value, str) else "x".join(map(str, _pair(value))))
        if kind is parse_counts:
            return parse_counts(value if isinstance(value, str) else ",".join(map(str, value)))
        if kind is int and (isinstance(value, bool) or int(value) != value or value < least):
            raise ValueError(value)
        if kind is float and (isinstance(value, bool) or not 0 < float(value) < math.inf):
            raise ValueError(value)
        return kind(value) if kind in (int, float) else value
    except (TypeError, ValueError, OverflowError) as error:
        wanted = {
            int: f"a whole number from {least} up",
            float: "a number above 0",
            parse_counts: "whole numbers from 1 up, like 4,4,8",
        }.get(kind, "a height and a width in pixels, like 64x48")
        raise CheckpointError(f"{f.name} is {value!r}; expected {wanted}") from error


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return operator.index(height), operator.index(width)


def facts_from_items(items: Iterable[str], option: str) -> dict[str, Any]:
    """Facts from repeated NAME=VALUE arguments, a value as in Python or else a string; raises RequestError.

    option: what the command line calls such an argument, for the message.
    """
    facts: dict[str, Any] = {}
    for item in items:
        name, separator, text = item.partition("=")
        if not separator:
            raise RequestError(f"{option} takes NAME=VALUE, got {item!r}")
        try:
            facts[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            facts[name] = text
    return facts


def add_fact_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command line one flag for every fact."""
    group = parser.add_argument_group("facts that the checkpoint does not hold")
    for f in dataclasses.fields(Facts):
        options = {k: v for k, v in f.metadata.items()}
        group.add_argument(flag(f.name), dest=f.name, default=None, **options)


def facts_from_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The facts that were given on the command line, for load_checkpoint(path, **facts)."""
    values = {f.name: getattr(args, f.name) for f in dataclasses.fields(Facts)}
    return {name: value for name, value in values.items() if value is not None}
