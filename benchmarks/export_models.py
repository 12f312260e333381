"""The checkpoints whose export is measured: the shipped one, random ones of published and smaller shape, or a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import CHECKPOINT, CLASSIFIER
from benchmarks.random_models import ADM_64, DDPM_CIFAR10, write_random_model
from engine.checkpoints.facts import Facts, flag
from engine.errors import CheckpointError, RequestError

DIGITS = "digits"
DIGITS_FACTS: Mapping[str, Any] = {
    "family": "openai-guided",
    "image_size": (32, 32),
    "num_head_channels": 32,
    "noise_schedule": "cosine",
    "prediction": "x0",
    "null_class": 10,
}
"""What assets/digits.pt does not hold (assets/MODEL_CARD.md)."""

RANDOM: Mapping[str, dict[str, Any]] = {
    "ddpm-small": DDPM_CIFAR10
    | {
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "ddpm-width-64": DDPM_CIFAR10 | {"block_out_channels": (64, 128, 128, 128)},
    "ddpm-cifar10": DDPM_CIFAR10,
    "adm-64": ADM_64,
}
"""Options of diffusers' UNet2DModel, smallest first: DDPM's network with fewer blocks, with half the width, as it
is, and ADM's."""

NAMES = (DIGITS, *RANDOM)


@dataclass(frozen=True, slots=True)
class Model:
    """A checkpoint on disk and the arguments that its export takes; classifier: those that add one, or none."""

    name: str
    checkpoint: Path
    arguments: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()

    @property
    def checkpoint_bytes(self) -> int:
        """Of the file, or of every file in the folder."""
        if self.checkpoint.is_file():
            return self.checkpoint.stat().st_size
        return sum(path.stat().st_size for path in self.checkpoint.rglob("*") if path.is_file())


def parse_models(text: str) -> tuple[str, ...]:
    """Names out of "digits,adm-64"; raises RequestError."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in NAMES]:
        raise RequestError(f"unknown model {', '.join(unknown)!r}; --models takes some of {','.join(NAMES)}")
    return names


def make_model(name: str, folder: Path) -> Model:
    """One of NAMES; a random one is written into the folder. Raises MissingPackageError without diffusers."""
    if name == DIGITS:
        classifier = ("--classifier", str(CLASSIFIER), "--classifier-fact", "num_head_channels=32")
        return Model(DIGITS, CHECKPOINT, fact_arguments(DIGITS_FACTS), classifier)
    return Model(name, write_random_model(folder / name, RANDOM[name]))


def given_model(checkpoint: Path, facts: Mapping[str, Any]) -> Model:
    """A file or folder of the user's; raises CheckpointError where there is none."""
    if not checkpoint.exists():
        raise CheckpointError(f"there is no {checkpoint}; pass a checkpoint's file or folder with --checkpoint")
    return Model(checkpoint.stem, checkpoint, fact_arguments(facts))


def fact_arguments(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Facts as the arguments of a command line, by name."""
    words: list[str] = []
    known = [field.name for field in dataclasses.fields(Facts)]
    for name, value in sorted(facts.items(), key=lambda item: known.index(item[0])):
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif isinstance(value, tuple):
            words += [flag(name), ("x" if name == "image_size" else ",").join(map(str, value))]
        else:
            words += [flag(name), str(value)]
    return tuple(words)
