"""Networks that judge images: an evaluator of digits, and the InceptionV3 of FID as the package torch-fidelity has it.

A judge turns images into features; a scorer holds a judge and a reference, and turns images into figures.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from engine.checkpoints.reading import read_file
from engine.checkpoints.unwrapping import without_wrappers
from engine.errors import BackendError, CheckpointError, RequestError
from engine.images import Bytes
from judging.evaluator import load_evaluator, read_digits
from judging.image_sets import ImageSet, Labels, as_floats, as_rgb
from judging.metrics import (
    Float64,
    Moments,
    around,
    frechet,
    frechet_resampled,
    inception_score,
    precision_recall,
    wilson,
)

CONFIDENCE = 0.95
BATCH = 50

Figures = dict[str, float | None]


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What a judge sees in N images: features [N, D] and logits [N, K]."""

    features: Tensor
    logits: Tensor


class Judge(Protocol):
    """A network that reads images.

    name: for a reader. frechet_name: of the Fréchet distance in its features. prefix: of its other figures.
    reads_labels: whether its logits are of the labels that images are sampled with.
    """

    @property
    def name(self) -> str: ...
    @property
    def frechet_name(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    @property
    def reads_labels(self) -> bool: ...
    def read(self, images: Bytes) -> Reading:
        """images: uint8 [N, H, W, C]."""
        ...


class DigitsJudge:
    """The evaluator of digits, a small CNN; its distance is called Fréchet distance, never FID."""

    name, frechet_name, prefix, reads_labels = "digits evaluator", "frechet", "", True

    def __init__(self, weights: Path) -> None:
        self._model = load_evaluator(weights)

    def read(self, images: Bytes) -> Reading:
        """images: uint8 [N, 32, 32, 1], or grey as RGB. Raises RequestError for others."""
        if images.shape[1:3] != (32, 32) or bool((images != images[..., :1]).any()):
            raise RequestError(f"the digits' evaluator reads grey images of 32x32, got {list(images.shape[1:])}")
        logits, features = read_digits(self._model, as_floats(images[..., :1]))
        return Reading(features, logits)


class InceptionJudge:
    """The InceptionV3 of FID, Google's network of 2015-12-05, by torch-fidelity; grey images are read as RGB.

    Its figures compare with those of published tables. The logits are without the bias of the last layer, which the
    original Inception Score leaves out.
    """

    name, frechet_name, prefix, reads_labels = "InceptionV3", "fid", "inception_", False

    def __init__(self, weights: Path) -> None:
        """weights: a file as torch-fidelity or pytorch-fid publishes it; nothing in it is executed.

        Raises BackendError without torch-fidelity, CheckpointError for another file.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load_inception(weights).to(self._device)

    @torch.inference_mode()
    def read(self, images: Bytes) -> Reading:
        """images: uint8 [N, H, W, C]."""
        parts = torch.from_numpy(as_rgb(images)).permute(0, 3, 1, 2).split(BATCH)
        seen = [
            self._model(part.to(self._device))
            for part in tqdm(parts, self.name, disable=not sys.stderr.isatty(), leave=False)
        ]
        features, logits = (torch.cat([each[place].cpu() for each in seen]) for place in (0, 1))
        return Reading(features, logits)


def _load_inception(path: Path) -> Any:
    network = _fidelity_inception()
    weights = without_wrappers(read_file(path))
    if not isinstance(weights, Mapping):
        raise CheckpointError(f"{path} holds a {type(weights).__name__}; expected a state dict")
    # torch-fidelity unpickles what it is given; it is given a copy of the tensors that were read safely.
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "inception.pth"
        torch.save({name: value for name, value in weights.items() if isinstance(value, Tensor)}, copy)
        try:
            return network("inception-v3", ["2048", "logits_unbiased"], str(copy))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(
                f"{path} is not the InceptionV3 of FID ({reason}); pass weights-inception-2015-12-05-6726825d.pth of "
                "torch-fidelity or pt_inception-2015-12-05-6726825d.pth of pytorch-fid"
            ) from error


def _fidelity_inception() -> Any:
    """torch-fidelity's class; raises BackendError where the package is not installed."""
    spec = importlib.util.find_spec("torch_fidelity")
    if spec is None or spec.submodule_search_locations is None:
        raise BackendError(
            "figures by InceptionV3 need the package torch-fidelity; install it with: "
            "pip install --no-deps torch-fidelity"
        )
    with _without_its_init("torch_fidelity", list(spec.submodule_search_locations)):
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    return FeatureExtractorInceptionV3


@contextmanager
def _without_its_init(name: str, places: list[str]) -> Iterator[None]:
    """Import parts of a package without its __init__.py, which in torch-fidelity wants torchvision for other networks.

    Afterwards the package is as if it had never been imported, for whoever imports it whole.
    """
    if name in sys.modules:
        yield
        return
    package = ModuleType(name)
    package.__path__ = places
    sys.modules[name] = package
    try:
        yield
    finally:
        for each in [each for each in sys.modules if each.partition(".")[0] == name]:
            del sys.modules[each]


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """figures: name -> number. right: [N] bool, which images are read as their label.

    resampled: distances of sets drawn from the images, see judging.metrics.frechet_resampled.
    """

    figures: Figures
    right: Tensor | None = None
    resampled: Float64 = field(default_factory=lambda: np.empty(0))
    frechet_name: str = "frechet"

    @property
    def distance(self) -> float | None:
        """The Fréchet distance to the reference."""
        return self.figures.get(self.frechet_name)


class FeatureScorer:
    """Figures of images in one judge's features, beside a reference."""

    def __init__(self, judge: Judge, reference: ImageSet) -> None:
        """Moments that the reference's file holds are taken before those of its images; ValueError without either."""
        self._judge, self.name = judge, f"{judge.name}, beside {reference.name}"
        self._features = None if reference.images is None else judge.read(reference.images).features
        moments = reference.pooled or (None if self._features is None else Moments.of(self._features))
        if moments is None:
            raise ValueError(f"{reference.name} holds neither images nor moments")
        self._moments = moments

    def score(self, images: Bytes, labels: Labels | None) -> Score:
        """Fréchet distance, precision and recall; accuracy where the judge reads labels, else Inception Score."""
        judge, reading = self._judge, self._judge.read(images)
        named, prefix = judge.frechet_name, judge.prefix
        distance = frechet(reading.features, self._moments)
        resampled = frechet_resampled(reading.features, self._moments)
        figures: Figures = {named: distance}
        if (interval := around(distance, resampled, CONFIDENCE)) is not None:
            figures |= {f"{named}_low": max(0.0, interval.low), f"{named}_high": interval.high}
        found = None if self._features is None else precision_recall(reading.features, self._features)
        if found is not None:
            figures |= {f"{prefix}precision": found.precision, f"{prefix}recall": found.recall}
        if not judge.reads_labels:
            score = inception_score(reading.logits)
            return Score(
                figures | {f"{prefix}score": score.mean, f"{prefix}score_std": score.std}, None, resampled, named
            )
        right = None if labels is None else reading.logits.argmax(dim=1) == torch.from_numpy(labels)
        return Score((_accuracy(right) if right is not None else {}) | figures, right, resampled, named)


def _accuracy(right: Tensor) -> Figures:
    hits = int(right.sum())
    interval = wilson(hits, len(right), CONFIDENCE)
    return {"accuracy": hits / len(right), "accuracy_low": interval.low, "accuracy_high": interval.high}
