"""Images and likelihoods of one variant: what it made, how fast, and what the scorers say of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.core.report import Row, Value
from engine.errors import RequestError
from engine.images import save_npz, to_uint8
from engine.networks.config import LabelInput, UNetConfig
from engine.sampling.sampler import Sampler
from judging.image_sets import ImageSet, Labels, as_floats, as_rgb
from judging.metrics import Psnr, psnr
from judging.scorers import FeatureScorer, Figures, Score


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """How images are made: count of them from seeds 0 to count - 1, classes in turn."""

    sampler: str
    count: int
    batch_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One variant at one number of steps. images: float32 [N, C, H, W]. is_finite: no NaN nor infinity among them."""

    variant: str
    steps: int
    images: Tensor
    labels: Labels | None
    images_per_s: float
    is_finite: bool
    scores: Sequence[Score]
    psnr: Psnr | None

    def row(self) -> Row:
        """The row of a report."""
        figures: Figures = {"images_per_s": self.images_per_s}
        if self.psnr is not None:
            whole, median, least = self.psnr.whole, self.psnr.median, self.psnr.least
            figures |= {"psnr_db": whole, "psnr_median_db": median, "psnr_least_db": least}
        return samples_row(self.variant, self.steps, len(self.images), self.scores, figures)


def samples_row(
    variant: str, steps: int | None, count: int, scores: Sequence[Score], figures: Figures | None = None
) -> Row:
    """A row about images, which all scorers have seen."""
    whole = dict(figures or {"images_per_s": None})
    for score in scores:
        whole |= score.figures
    return Row({"variant": variant, "measured": "samples", "steps": steps, "images": count}, whole)


def classes_in_turn(config: UNetConfig, count: int) -> Labels | None:
    """The label of each image; None for a network without labels, RequestError for one that takes vectors."""
    if config.num_classes is None:
        return None
    if config.label is not LabelInput.TABLE:
        raise RequestError("this network takes label vectors; quality is measured of networks with classes or none")
    classes = [row for row in range(config.num_classes) if row != config.null_class]
    return np.resize(np.array(classes, dtype=np.int64), count)


def make_cell(
    variant: str,
    sampler: Sampler,
    request: ImageRequest,
    steps: int,
    scorers: Sequence[FeatureScorer],
    reference: Cell | None,
) -> Cell:
    """Make the images, timed after one batch that is not, and have them judged.

    Images that are not finite are not judged. reference: the fp32 variant's at as many steps, for PSNR.
    """
    labels = classes_in_turn(sampler.config, request.count)
    first = min(request.batch_size, request.count)
    _sample(sampler, request, first, min(steps, 2), labels)
    start = time.perf_counter()
    images = _sample(sampler, request, request.count, steps, labels)
    seconds = time.perf_counter() - start
    is_finite = bool(torch.isfinite(images).all())
    scores = [scorer.score(to_uint8(images), labels) for scorer in scorers] if is_finite else []
    beside = psnr(images, reference.images) if reference is not None and is_finite and reference.is_finite else None
    return Cell(variant, steps, images, labels, request.count / seconds, is_finite, scores, beside)


def _sample(sampler: Sampler, request: ImageRequest, count: int, steps: int, labels: Labels | None) -> Tensor:
    given = None if labels is None else labels[:count].tolist()
    return sampler.sample(
        count, steps=steps, sampler=request.sampler, labels=given, seed=0, batch_size=request.batch_size
    )


def save_cell(folder: Path, sampler: str, cell: Cell) -> Path:
    """Write folder/samples-VARIANT-SAMPLER-STEPS.npz, which guided-diffusion's evaluator reads; returns its path.

    The evaluator's network has an input of three channels, so grey images are written as RGB.
    """
    path = folder / f"samples-{cell.variant.replace(' ', '-')}-{sampler}-{cell.steps}.npz"
    save_npz(path, as_rgb(to_uint8(cell.images)), cell.labels)
    return path


def bound_row(variant: str, sampler: Sampler, request: ImageRequest, real: ImageSet, steps: int) -> Row:
    """Bits per dimension of real images, mean and its standard error: None where they are not finite.

    Raises RequestError where the bound is not defined, or images do not fit the network.
    """
    assert real.images is not None
    images = as_floats(real.images)
    wanted = (sampler.config.in_channels, *sampler.config.image_size)
    if tuple(images.shape[1:]) != wanted:
        raise RequestError(f"images of {real.name} are {list(images.shape[1:])}; this network makes {list(wanted)}")
    takes_labels = sampler.config.num_classes is not None
    labels = real.labels.tolist() if takes_labels and real.labels is not None else None
    bits = sampler.nll(images, steps=steps, labels=labels, seed=0, batch_size=request.batch_size).double()
    case: dict[str, Value] = {"variant": variant, "measured": "likelihood", "steps": steps, "images": len(bits)}
    if not bool(torch.isfinite(bits).all()):
        return Row(case, {"bits_per_dim": None, "bits_per_dim_error": None})
    error = float(bits.std()) / math.sqrt(len(bits)) if len(bits) > 1 else None
    return Row(case, {"bits_per_dim": float(bits.mean()), "bits_per_dim_error": error})
