"""The images asked for as checked requests: seeds, labels, conditions and guidance."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from engine.diffusion.guidance import EVERYWHERE, ClassifierGuidance, require_null_class
from engine.diffusion.noise import LABELS, uniform
from engine.diffusion.solvers import StepTable
from engine.errors import RequestError
from engine.networks.config import ClassifierConfig, LabelInput, UNetConfig
from engine.sampling.options import Labels, SamplingOptions
from engine.sampling.slots import Request

logger = logging.getLogger(__name__)

MOST_SHIFT = 1e3
"""Largest factor of a gradient in x0 that is no accident: 1 / sqrt(abar) where an image is still 1e-3 of x_t."""


def make_requests(config: UNetConfig, n: int, table: StepTable, options: SamplingOptions) -> list[Request]:
    """n requests for one table, checked against the network.

    Of the options those apply that belong to an image: labels, seed, seeds, guidance, guidance_scale and image. Raises
    RequestError.
    """
    if n < 1:
        raise RequestError(f"n is {n}; expected 1 or more images")
    seeds = [options.seed + i for i in range(n)] if options.seeds is None else [int(s) for s in options.seeds]
    if len(seeds) != n:
        raise RequestError(f"{len(seeds)} seeds given for {n} images")
    guidance, labels = options.guidance, options.labels
    vectors = _label_vectors(config, n, labels)
    if vectors and guidance is not None:
        raise RequestError("this network takes label vectors, which a classifier does not know; leave guidance out")
    classes = _labels(config, n, None if vectors else labels, seeds, guidance)
    known = guidance.guide.config.num_classes if guidance is not None else None
    if known is not None and (wrong := [y for y in classes if y >= known]):
        raise RequestError(
            f"label {wrong[0]} is unknown to the classifier, which has classes 0 to {known - 1}; choose one of "
            "these or leave guidance out"
        )
    conds = _conditions(config, n, options.image)
    scale = guidance.scale if guidance is not None else 0.0
    if not math.isfinite(scale):
        raise RequestError(f"the guidance scale is {scale}; expected a finite number")
    if guidance is not None and scale and guidance.interval == EVERYWHERE:
        _warn_of_wild_rows(table)
    cfg = options.free_guidance
    if cfg.is_active:
        require_null_class(config)
    is_labelled = config.num_classes is not None
    return [
        Request(
            i,
            table,
            seeds[i],
            vectors[i] if vectors else classes[i] if is_labelled else 0,
            classes[i],
            scale,
            cond=conds[i],
            cfg=cfg if cfg.is_active else None,
        )
        for i in range(n)
    ]


def _warn_of_wild_rows(table: StepTable) -> None:
    """Where x_t is noise alone, (1 - abar) / sqrt(abar) turns a classifier's error into the whole image."""
    wild = np.flatnonzero(np.abs(table.H) > MOST_SHIFT)
    if len(wild):
        logger.warning(
            "classifier guidance at timestep %g shifts x0 by %.2g times the gradient, for x_t holds next to no image "
            "there; leave such timesteps out with steps='ddimN' (which starts later) or a guidance interval",
            table.timestep[wild[0]],
            abs(table.H[wild[0]]),
        )


def _labels(
    config: UNetConfig, n: int, labels: Labels | None, seeds: list[int], guidance: ClassifierGuidance | None
) -> list[int]:
    classifier = None if guidance is None else guidance.guide.config
    rows = _label_count(config, classifier)
    if rows is None:
        if labels is not None:
            raise RequestError("this network takes no labels and no classifier was given; leave labels out")
        return [0] * n
    if labels is None:
        return _drawn_labels(drawable_labels(config, classifier), seeds)
    given = [labels] * n if isinstance(labels, int) else [int(y) for y in labels if not isinstance(y, Sequence)]
    if len(given) != n:
        raise RequestError(f"{len(given)} labels given for {n} images")
    if wrong := [y for y in given if not 0 <= y < rows]:
        raise RequestError(f"label {wrong[0]} does not exist; this checkpoint has labels 0 to {rows - 1}")
    return given


def _label_vectors(config: UNetConfig, n: int, labels: Labels | None) -> list[tuple[float, ...]]:
    """The label vectors of a network that takes them, else nothing."""
    if config.label is not LabelInput.VECTOR:
        return []
    width = config.time_channels
    given = [] if labels is None or isinstance(labels, int) else list(labels)
    if len(given) != n or any(not isinstance(y, Sequence) or len(y) != width for y in given):
        raise RequestError(
            f"this network takes a vector of {width} numbers as each image's label; pass labels as {n} lists of "
            f"{width} numbers"
        )
    return [tuple(float(number) for number in vector) for vector in given if isinstance(vector, Sequence)]


def drawable_labels(config: UNetConfig, classifier: ClassifierConfig | None = None) -> list[int]:
    """The classes that are drawn where no label is given: all but the null class; none where nothing takes labels.

    classifier: the guiding classifier's, whose classes count where the network takes no labels.
    """
    return [y for y in range(_label_count(config, classifier) or 0) if y != config.null_class]


def _label_count(config: UNetConfig, classifier: ClassifierConfig | None) -> int | None:
    if config.num_classes is None and classifier is not None:
        return classifier.num_classes
    return config.num_classes


def _drawn_labels(classes: list[int], seeds: list[int]) -> list[int]:
    """A class for each seed, uniform over these."""
    u = uniform(seeds, [0] * len(seeds), stream=LABELS)
    return [classes[int(value * len(classes))] for value in u]


def _conditions(config: UNetConfig, n: int, image: Tensor | None) -> list[Tensor | None]:
    channels = 0 if config.self_condition else config.cond_channels
    if channels == 0:
        if image is not None:
            raise RequestError("this network takes no condition image; leave image out")
        return [None] * n
    if image is None or image.ndim != 4 or tuple(image.shape[:2]) != (n, channels):
        got = "nothing" if image is None else f"shape {tuple(image.shape)}"
        raise RequestError(
            f"this network takes a condition image for each image: image [{n}, {channels}, h, w], got {got}"
        )
    return list(resize_condition(image, config.image_size))


def resize_condition(image: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A low-resolution image [n, Cc, h, w] at the network's size, bilinear as in guided-diffusion's SuperResModel."""
    if tuple(image.shape[2:]) == image_size:
        return image.float()
    return F.interpolate(image.float(), image_size, mode="bilinear")
