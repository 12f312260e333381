"""Facts about a checkpoint that its file may not hold: one list, used by load_checkpoint and every command line."""

from __future__ import annotations

import argparse
import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.errors import CheckpointError


def parse_image_size(text: str) -> tuple[int, int]:
    """ "64" or "64x48" (height x width) as (height, width)."""
    parts = text.lower().split("x")
    height, width = int(parts[0]), int(parts[-1])
    if len(parts) > 2 or height <= 0 or width <= 0:
        raise ValueError(text)
    return height, width


def _fact(help_text: str, **argument: Any) -> Any:
    return field(default=None, metadata={"help": help_text, **argument})


@dataclass(frozen=True, slots=True)
class Facts:
    """What the user says about a checkpoint; None means "not said": the file or a documented default decides."""

    family: str | None = _fact("layout of the file, if it cannot be told apart: openai-guided or openai-improved")
    image_size: tuple[int, int] | None = _fact("height x width in pixels, e.g. 64 or 64x48", type=parse_image_size)
    num_heads: int | None = _fact("attention heads in every attention block", type=int)
    num_head_channels: int | None = _fact("channels of one attention head; instead of --num-heads", type=int)
    num_heads_upsample: int | None = _fact("attention heads on the way up, if they differ", type=int)
    attention_order: str | None = _fact(
        "row order of the qkv projection: legacy (head, qkv, dim) or new (qkv, head, dim)", choices=("legacy", "new")
    )
    num_train_timesteps: int | None = _fact("T, number of noise levels in training (default 1000)", type=int)
    noise_schedule: str | None = _fact("betas in training (default linear)", choices=("linear", "cosine"))
    rescale_timesteps: bool | None = _fact("the network was fed t * 1000 / T", action=argparse.BooleanOptionalAction)
    prediction: str | None = _fact("what the network predicts (default eps)", choices=("eps", "x0", "v"))
    variance: str | None = _fact(
        "variance of a DDPM step without variance channels (default fixed_large)",
        choices=("fixed_small", "fixed_large"),
    )
    clip_denoised: bool | None = _fact("limit x0 to [-1, 1] at every step", action=argparse.BooleanOptionalAction)
    null_class: int | None = _fact("label that means no class, for classifier-free guidance", type=int)
    super_resolution: bool | None = _fact(
        "half of the input channels are a low-resolution image", action=argparse.BooleanOptionalAction
    )
    num_res_blocks: int | None = _fact("ResBlocks a level, where a classifier's file leaves it open", type=int)


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
    least = 0 if f.name == "null_class" else 1
    try:
        if kind is parse_image_size:
            return parse_image_size(value if isinstance(value, str) else "x".join(map(str, _pair(value))))
        if kind is int and (isinstance(value, bool) or int(value) != value or value < least):
            raise ValueError(value)
        return int(value) if kind is int else value
    except (TypeError, ValueError, OverflowError) as error:
        wanted = f"a whole number from {least} up" if kind is int else "a height and a width in pixels, like 64x48"
        raise CheckpointError(f"{f.name} is {value!r}; expected {wanted}") from error


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return operator.index(height), operator.index(width)


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
