"""How good sampled digits are: read by the evaluator, compared with real digits, and checked for copies.

    python -m recipes.digits_quality --samples samples.npz --out assets/quality.json

The file is in guided-diffusion's layout: arr_0 uint8 [n, H, W, C] and arr_1 labels [n].
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.files import atomic_path
from judging.digits import CLASSES, EVALUATOR, Digits, load_split
from judging.evaluator import load_evaluator, read_digits
from judging.image_sets import as_floats
from judging.metrics import Moments, frechet

SUBSET_SEED = 7


@dataclass(frozen=True, slots=True)
class FrechetComparison:
    """Distances to one reference set from samples and from real digits, `count` of each, all classes equal.

    The distance grows as the count falls, for real digits too: only figures of one row compare.
    """

    real: str
    reference: str
    count: int
    reference_count: int
    samples_distance: float
    real_distance: float


@dataclass(frozen=True, slots=True)
class NeighbourDistances:
    """L2 distance in pixel space ([-1, 1] values) from each image to its nearest training image."""

    count: int
    median: float
    percentile_5: float
    minimum: float


@dataclass(frozen=True, slots=True)
class Quality:
    """The figures of one set of samples.

    samples_below_held_out_minimum counts samples nearer to a training image than any held-out digit is.
    """

    count: int
    accuracy: float
    accuracy_per_class: tuple[float, ...]
    held_out_accuracy: float
    frechet_to_train: float
    frechet: tuple[FrechetComparison, ...]
    neighbours_samples: NeighbourDistances
    neighbours_held_out: NeighbourDistances
    samples_below_held_out_minimum: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class _Set:
    """Features [N, D] and labels [N] of one set of digits."""

    features: Tensor
    labels: Tensor


def nearest_distances(images: Tensor, train: Tensor, batch: int = 500) -> Tensor:
    """For each of images [N, ...], the L2 distance to its nearest of train [M, ...]: [N] float64."""
    flat, reference = images.flatten(1).double(), train.flatten(1).double()
    return torch.cat([torch.cdist(part, reference).min(dim=1).values for part in flat.split(batch)])


def evaluate(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer[Any]], evaluator: Path = EVALUATOR
) -> Quality:
    """The figures of images uint8 [n, 32, 32, 1] that were sampled as labels [n].

    Raises ValueError for other shapes or types, and where a class has no sample: the reference holds all ten.
    """
    samples = _to_digits(images, labels)
    model, parts = load_evaluator(evaluator), load_split()
    logits, features = read_digits(model, samples.images)
    right = (logits.argmax(dim=1) == samples.labels).double()
    held_logits, held_features = read_digits(model, parts["held_out"].images)
    sets = {name: _Set(read_digits(model, part.images)[1], part.labels) for name, part in parts.items()}
    to_train = nearest_distances(samples.images, parts["train"].images)
    held_to_train = nearest_distances(parts["held_out"].images, parts["train"].images)
    return Quality(
        count=len(right),
        accuracy=float(right.mean()),
        accuracy_per_class=tuple(float(right[samples.labels == k].mean()) for k in range(CLASSES)),
        held_out_accuracy=float((held_logits.argmax(dim=1) == parts["held_out"].labels).double().mean()),
        frechet_to_train=frechet(features, Moments.of(sets["train"].features)),
        frechet=_comparisons(_Set(features, samples.labels), sets),
        neighbours_samples=_summary(to_train),
        neighbours_held_out=_summary(held_to_train),
        samples_below_held_out_minimum=int((to_train < held_to_train.min()).sum()),
    )


def _to_digits(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.integer[Any]]) -> Digits:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 1):
        raise ValueError(f"images must be uint8 [n, 32, 32, 1], got {images.dtype} {list(images.shape)}")
    if labels.shape != (len(images),):
        raise ValueError(f"labels must be [{len(images)}], one for each image, got {list(labels.shape)}")
    if set(np.unique(labels)) != set(range(CLASSES)):
        raise ValueError(f"samples must cover the classes 0 to 9 and no other, got {np.unique(labels).tolist()}")
    return Digits(as_floats(images), torch.from_numpy(labels.astype(np.int64)))


def _comparisons(samples: _Set, sets: dict[str, _Set]) -> tuple[FrechetComparison, ...]:
    unseen = _Set(
        torch.cat([sets["held_out"].features, sets["evaluator"].features]),
        torch.cat([sets["held_out"].labels, sets["evaluator"].labels]),
    )
    half = _balanced_rows(sets["train"].labels, len(sets["train"].labels) // (2 * CLASSES))
    rest = torch.ones(len(sets["train"].labels), dtype=torch.bool)
    rest[half] = False
    one_half = _Set(sets["train"].features[half], sets["train"].labels[half])
    other_half = _Set(sets["train"].features[rest], sets["train"].labels[rest])
    pairs = (
        ("held_out + evaluator parts", unseen, "train part", sets["train"]),
        ("held_out part", sets["held_out"], "train part", sets["train"]),
        ("other half of the train part", one_half, "half of the train part", other_half),
    )
    return tuple(_compare(samples, *pair) for pair in pairs)


def _compare(samples: _Set, real_name: str, real: _Set, reference_name: str, reference: _Set) -> FrechetComparison:
    per_class = min(int(torch.bincount(labels).min()) for labels in (samples.labels, real.labels))
    of_samples, of_real = (_balanced_rows(s.labels, per_class) for s in (samples, real))
    moments = Moments.of(reference.features)
    return FrechetComparison(
        real=real_name,
        reference=reference_name,
        count=CLASSES * per_class,
        reference_count=len(reference.labels),
        samples_distance=frechet(samples.features[of_samples], moments),
        real_distance=frechet(real.features[of_real], moments),
    )


def _balanced_rows(labels: Tensor, per_class: int) -> Tensor:
    """Indices of per_class random members of each class."""
    generator = torch.Generator().manual_seed(SUBSET_SEED)
    order = torch.randperm(len(labels), generator=generator)
    return torch.cat([order[labels[order] == k][:per_class] for k in range(CLASSES)])


def _summary(distances: Tensor) -> NeighbourDistances:
    return NeighbourDistances(
        count=len(distances),
        median=float(distances.median()),
        percentile_5=float(distances.quantile(0.05)),
        minimum=float(distances.min()),
    )


def report(quality: Quality) -> str:
    """The figures as lines for a reader."""
    lines = [
        f"{quality.count} samples; the evaluator reads {quality.accuracy:.2%} as their label "
        f"(held-out digits: {quality.held_out_accuracy:.2%})",
        "by class: " + "  ".join(f"{k}: {value:.1%}" for k, value in enumerate(quality.accuracy_per_class)),
        "Fréchet distance in the evaluator's features:",
        f"  all {quality.count} samples to the train part: {quality.frechet_to_train:.3f}",
    ]
    lines += [
        f"  to {row.reference} ({row.reference_count}), {row.count} each: "
        f"samples {row.samples_distance:.3f}, real ({row.real}) {row.real_distance:.3f}"
        for row in quality.frechet
    ]
    lines.append("L2 distance to the nearest training image (median / 5th percentile / minimum):")
    lines += [
        f"  {name}: {row.median:.2f} / {row.percentile_5:.2f} / {row.minimum:.2f}"
        for name, row in (
            (f"{quality.neighbours_samples.count} samples", quality.neighbours_samples),
            (f"{quality.neighbours_held_out.count} held-out digits", quality.neighbours_held_out),
        )
    ]
    lines.append(f"  samples nearer than any held-out digit: {quality.samples_below_held_out_minimum}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure sampled digits against real ones.")
    parser.add_argument("--samples", type=Path, required=True, help="npz with arr_0 (images) and arr_1 (labels)")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--evaluator", type=Path, default=EVALUATOR, help="weights of the evaluator")
    args = parser.parse_args()
    with np.load(args.samples) as file:
        quality = evaluate(file["arr_0"], file["arr_1"], args.evaluator)
    if args.out is not None:
        with atomic_path(args.out) as temporary:
            temporary.write_text(json.dumps(quality.to_dict(), indent=2) + "\n")
    print(report(quality))


if __name__ == "__main__":
    main()
