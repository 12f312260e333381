"""Networks that judge images: the digits' evaluator and InceptionV3. A judge turns images into features; a scorer
holds a judge and a reference, and turns images into figures."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.image_sets import ImageSet, Labels, as_floats, as_rgb
from benchmarks.inception import load_inception
from benchmarks.metrics import (
    SPLITS,
    Moments,
    around,
    frechet,
    frechet_resampled,
    inception_score,
    precision_recall,
    wilson,
)
from benchmarks.timing import Float64
from engine.errors import RequestError
from engine.images import Bytes, save_images
from recipes.evaluator import load_evaluator, read_digits
from recipes.quality import EVALUATOR

CONFIDENCE = 0.95
BATCH = 50

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What a judge sees in N images: features [N, D], logits [N, K], and spatial features [N, S] where it has them."""

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None


class Judge(Protocol):
    """A network that reads images.

    name: for a reader. frechet_name: of the Fréchet distance in its features. prefix: of its other figures.
    """

    @property
    def name(self) -> str: ...
    @property
    def frechet_name(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    def read(self, images: Bytes) -> Reading:
        """images uint8 [N, H, W, C]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """figures: name -> number. right: [N] bool, which images are read as their label. resampled: see metrics.py."""

    figures: Figures
    right: Tensor | None = None
    resampled: Float64 = field(default_factory=lambda: np.empty(0))
    frechet_name: str = "frechet"

    @property
    def distance(self) -> float | None:
        return self.figures.get(self.frechet_name)


class Scorer(Protocol):
    """Figures of images beside a reference that it holds."""

    @property
    def name(self) -> str: ...
    def score(self, images: Bytes, labels: Labels | None) -> Score: ...


@dataclass(frozen=True, slots=True, eq=False)
class FeatureReference:
    """A reference as one judge sees it. features: [M, D], None where only moments are known."""

    pooled: Moments
    features: Tensor | None
    spatial: Moments | None

    @classmethod
    def read(cls, judge: Judge, images: ImageSet) -> FeatureReference:
        """Moments that a file holds are taken before those of the images in it; raises ValueError without either."""
        if images.images is None:
            if images.pooled is None:
                raise ValueError(f"{images.name} holds neither images nor moments")
            return cls(images.pooled, None, images.spatial)
        reading = judge.read(images.images)
        spatial = None if reading.spatial is None else Moments.of(reading.spatial)
        return cls(images.pooled or Moments.of(reading.features), reading.features, images.spatial or spatial)


class DigitsJudge:
    """The shipped evaluator, a small CNN that saw none of the diffusion model's training digits."""

    name, frechet_name, prefix = "digits evaluator", "frechet", ""

    def __init__(self, weights: Path = EVALUATOR) -> None:
        self._model = load_evaluator(weights)

    def read(self, images: Bytes) -> Reading:
        """images uint8 [N, 32, 32, 1], or grey as RGB; raises RequestError for others."""
        if images.shape[1:3] != (32, 32) or bool((images != images[..., :1]).any()):
            raise RequestError(f"the digits' evaluator reads grey images of 32x32, got {list(images.shape[1:])}")
        logits, features = read_digits(self._model, as_floats(images[..., :1]))
        return Reading(features, logits)


class InceptionJudge:
    """The InceptionV3 of FID; grey images are read as RGB."""

    name, frechet_name, prefix = "InceptionV3", "fid", "inception_"

    def __init__(self, weights: Path) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_inception(weights).to(self._device)

    @torch.inference_mode()
    def read(self, images: Bytes) -> Reading:
        parts = torch.from_numpy(as_rgb(images)).permute(0, 3, 1, 2).split(BATCH)
        seen = [
            self._model(part.to(self._device))
            for part in tqdm(parts, "InceptionV3", disable=not sys.stderr.isatty(), leave=False)
        ]
        pooled, logits, spatial = (
            torch.cat([getattr(each, name).cpu() for each in seen]) for name in ("pooled", "logits", "spatial")
        )
        return Reading(pooled, logits, spatial)


class FeatureScorer:
    """Figures in one judge's features."""

    def __init__(self, judge: Judge, reference: ImageSet) -> None:
        self._judge = judge
        self._reference = FeatureReference.read(judge, reference)
        self.name = f"{judge.name}, beside {reference.name}"

    def score(self, images: Bytes, labels: Labels | None) -> Score:
        """Fréchet distance, precision and recall; accuracy where labels are the judge's; IS and sFID of Inception."""
        reading, prefix, named = self._judge.read(images), self._judge.prefix, self._judge.frechet_name
        distance = frechet(reading.features, self._reference.pooled)
        resampled = frechet_resampled(reading.features, self._reference.pooled)
        figures: Figures = {named: distance}
        if (interval := around(distance, resampled, CONFIDENCE)) is not None:
            figures |= {f"{named}_low": max(0.0, interval.low), f"{named}_high": interval.high}
        figures |= self._manifold_figures(reading, prefix)
        if reading.spatial is not None:
            score = inception_score(reading.logits)
            figures |= {
                "sfid": None if self._reference.spatial is None else frechet(reading.spatial, self._reference.spatial),
                f"{prefix}score": score.mean,
                f"{prefix}score_std": score.std,
            }
            return Score(figures, None, resampled, named)
        right = None if labels is None else reading.logits.argmax(dim=1) == torch.from_numpy(labels)
        return Score((_accuracy(right) if right is not None else {}) | figures, right, resampled, named)

    def _manifold_figures(self, reading: Reading, prefix: str) -> Figures:
        if self._reference.features is None:
            return {}
        found = precision_recall(reading.features, self._reference.features)
        if found is None:
            return {}
        return {f"{prefix}precision": found.precision, f"{prefix}recall": found.recall}


def _accuracy(right: Tensor) -> Figures:
    hits = int(right.sum())
    interval = wilson(hits, len(right), CONFIDENCE)
    return {"accuracy": hits / len(right), "accuracy_low": interval.low, "accuracy_high": interval.high}


TORCH_FIDELITY = {
    "fid": "frechet_inception_distance",
    "inception_score": "inception_score_mean",
    "inception_score_std": "inception_score_std",
}
"""Our names of torch-fidelity's figures. Its precision and recall are left out: they take the first input for the real
one, where FID takes either and IS the generated one, and its versions use different networks for them."""


class TorchFidelityScorer:
    """FID and IS by the package torch-fidelity, which fetches InceptionV3's weights itself."""

    def __init__(self, reference: ImageSet) -> None:
        """Raises RequestError where the package is not installed, or for a reference without images."""
        if reference.images is None:
            raise RequestError(f"torch-fidelity compares images; {reference.name} holds statistics only")
        self.name = f"torch-fidelity, beside {reference.name}"
        self._reference = reference.images
        self._calculate = _calculate_metrics()

    def score(self, images: Bytes, labels: Labels | None) -> Score:
        """The figures; labels are not used."""
        with TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("images", "reference")]
            for path, each in zip(paths, (images, self._reference), strict=True):
                save_images(path, as_rgb(each))
            found = self._calculate(
                input1=str(paths[0]),
                input2=str(paths[1]),
                cuda=torch.cuda.is_available(),
                isc=True,
                fid=True,
                isc_splits=min(SPLITS, len(images)),
                cache=False,
                verbose=False,
            )
        return Score({ours: float(found[theirs]) for ours, theirs in TORCH_FIDELITY.items()}, frechet_name="fid")


def _calculate_metrics() -> Callable[..., Mapping[str, float]]:
    try:
        module = import_module("torch_fidelity")
    except ImportError as error:
        raise RequestError(
            "--torch-fidelity needs the package torch-fidelity and torchvision; install them with: "
            "pip install torch-fidelity, or pass --inception WEIGHTS.pth instead"
        ) from error
    return module.calculate_metrics
