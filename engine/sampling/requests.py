"""The images asked for as checked requests: seeds, conditions and their other half, guidance."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.diffusion.guidance import EVERYWHERE, ClassifierFreeGuidance, ClassifierGuidance, Interval
from engine.diffusion.noise import LABELS, uniform
from engine.diffusion.solvers import StepTable
from engine.errors import RequestError
from engine.networks.config import ClassifierConfig, LabelInput, UNetConfig
from engine.networks.inputs import UNCONDITIONED, Conditions
from engine.sampling.options import Labels, SamplingOptions

logger = logging.getLogger(__name__)

MOST_SHIFT = 1e3
"""Largest factor of a gradient in x0 that is no accident: 1 / sqrt(abar) where an image is still 1e-3 of x_t."""


@dataclass(frozen=True, slots=True)
class ImageGuidance:
    """Classifier guidance of one image: towards which class, how strongly, and at which training timesteps.

    scale: 0 for none. interval: as in ClassifierGuidance.
    """

    label: int
    scale: float = 1.0
    interval: Interval = EVERYWHERE


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One image to make: its place in the result, table, seed, conditions and guidance.

    conditions: of this one image, each tensor a batch of one; a label that a network takes, the image that it takes.
    without: the other half of classifier-free guidance, as conditions too; None where the network has none.
    free_guidance: classifier-free guidance, None for none. guidance: by the slots' classifier, None for none. x_start:
    [C, H, W] to begin with instead of draw 0 of the seed. known, mask: [C, H, W], an image of which the mask's zeros
    are kept.
    """

    index: int
    table: StepTable
    seed: int
    conditions: Conditions = UNCONDITIONED
    without: Conditions | None = None
    free_guidance: ClassifierFreeGuidance | None = None
    guidance: ImageGuidance | None = None
    x_start: Tensor | None = None
    known: Tensor | None = None
    mask: Tensor | None = None

    @property
    def label(self) -> int | None:
        """The image's class: the classifier's where there is guidance, else the network's; None for no class."""
        if self.guidance is not None:
            return self.guidance.label
        label = self.conditions.label
        return int(label) if label is not None and label.numel() == 1 else None


def check_entry(request: Request, config: UNetConfig, has_guide: bool) -> None:
    """Raises RequestError where a request does not fit a network, or slots with or without a classifier."""
    if config.num_classes is not None and request.conditions.label is None:
        raise RequestError("this network takes a label; give the request conditions with one")
    if config.cond_channels and not config.self_condition and request.conditions.image is None:
        raise RequestError("this network takes a condition image; pass image")
    if (request.known is None) != (request.mask is None):
        raise RequestError("a known image and its mask belong together; give both or neither")
    free = request.free_guidance
    if free is not None and free.is_active and request.without is None:
        raise RequestError(_NO_OTHER_HALF)
    if request.guidance is not None and request.guidance.scale and not has_guide:
        raise RequestError("the request asks for guidance by a classifier; give its guide to run() or slots()")


_NO_OTHER_HALF = (
    "classifier-free guidance needs a label that means none, and this checkpoint names none; leave guidance_scale out, "
    "or export the checkpoint with --null-class"
)


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
    labels, guidance = _labels(config, n, seeds, options), options.guidance
    free = options.free_guidance
    images = _images(config, n, options.image)
    conditions = [Conditions(_label_tensor(config, label), image) for label, image in zip(labels, images, strict=True)]
    others = [_without(config, given) for given in conditions]
    if free.is_active and others[0] is None:
        raise RequestError(_NO_OTHER_HALF)
    pulls = [None] * n if guidance is None else _pulls(guidance, labels, table)
    return [
        Request(i, table, seeds[i], conditions[i], others[i], free if free.is_active else None, pulls[i])
        for i in range(n)
    ]


def images_at_a_time(requests: Sequence[Request], batch_size: int) -> int:
    """How many of these images a network of this largest batch steps in one call, 1 at least.

    With classifier-free guidance an image takes two places in it.
    """
    is_doubled = any(r.free_guidance is not None and r.free_guidance.is_active for r in requests)
    return max(1, batch_size // 2 if is_doubled else batch_size)


def _without(config: UNetConfig, conditions: Conditions) -> Conditions | None:
    """The other half of classifier-free guidance: the label that means none, beside the same image."""
    if config.null_class is None or config.label is not LabelInput.TABLE or conditions.label is None:
        return None
    return Conditions(torch.full_like(conditions.label, config.null_class), conditions.image)


def unlabelled(config: UNetConfig, options: SamplingOptions) -> SamplingOptions:
    """Options in which no label means the null class, rather than one drawn from a seed.

    Raises RequestError where the network needs labels and none of them means none.
    """
    if options.labels is not None or config.num_classes is None:
        return options
    if config.null_class is None:
        raise RequestError("this network needs labels, and none of them means none; pass labels")
    return dataclasses.replace(options, labels=config.null_class)


def _label_tensor(config: UNetConfig, label: int | tuple[float, ...]) -> Tensor | None:
    """[1] or [1, D], as LabelInput says; None where the network takes no label."""
    if config.num_classes is None:
        return None
    return torch.tensor([label], dtype=torch.int64 if config.label is LabelInput.TABLE else torch.float32)


def _pulls(
    guidance: ClassifierGuidance, labels: Sequence[int | tuple[float, ...]], table: StepTable
) -> list[ImageGuidance | None]:
    if not math.isfinite(guidance.scale):
        raise RequestError(f"the guidance scale is {guidance.scale}; expected a finite number")
    if guidance.scale and guidance.interval == EVERYWHERE:
        _warn_of_wild_rows(table)
    return [ImageGuidance(y, guidance.scale, guidance.interval) for y in labels if isinstance(y, int)]


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
    config: UNetConfig, n: int, seeds: list[int], options: SamplingOptions
) -> Sequence[int | tuple[float, ...]]:
    """A class or a vector for each image; 0 where nothing takes labels."""
    classifier = None if options.guidance is None else options.guidance.guide.config
    if classifier is not None:
        check_classifier(config, classifier)
    if config.label is LabelInput.VECTOR:
        return _label_vectors(config, n, options.labels)
    classes = _classes(config, n, seeds, options.labels, classifier)
    if classifier is not None and (wrong := [y for y in classes if y >= classifier.num_classes]):
        raise RequestError(
            f"label {wrong[0]} is unknown to the classifier, which has classes 0 to {classifier.num_classes - 1}; "
            "choose one of these or leave guidance out"
        )
    return classes


def check_classifier(config: UNetConfig, classifier: ClassifierConfig) -> None:
    """Raises RequestError where a classifier cannot guide a network: other images, or labels that are no classes."""
    if config.label is LabelInput.VECTOR:
        raise RequestError("this network takes label vectors, which a classifier does not know; leave guidance out")
    if (classifier.in_channels, classifier.image_size) != (config.in_channels, config.image_size):
        raise RequestError(
            f"the classifier reads {classifier.in_channels} channels of {classifier.image_size}, the network makes "
            f"{config.in_channels} of {config.image_size}; use the classifier trained for it"
        )


def _classes(
    config: UNetConfig, n: int, seeds: list[int], labels: Labels | None, classifier: ClassifierConfig | None
) -> list[int]:
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
    """The label vectors of a network that takes them."""
    width = config.label_channels
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


def _images(config: UNetConfig, n: int, image: Tensor | None) -> list[Tensor | None]:
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
    return list(resize_condition(image, config.image_size).split(1))


def resize_condition(image: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A low-resolution image [n, Cc, h, w] at the network's size, bilinear as in guided-diffusion's SuperResModel."""
    if tuple(image.shape[2:]) == image_size:
        return image.float()
    return F.interpolate(image.float(), image_size, mode="bilinear")
