"""The options of sampling: one frozen value that every verb of a Sampler takes, checked where it is made."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance, Guide
from engine.diffusion.ladder import Steps
from engine.diffusion.noise import NoiseSource, normal
from engine.diffusion.prediction import Diffusion, Variance
from engine.diffusion.solvers import SAMPLERS, StepTable, named_table
from engine.errors import RequestError

Labels = int | Sequence[int] | Sequence[Sequence[float]]
"""One class for all images, a class for each, or a vector for each where the network takes vectors."""


def _check_type(name: str, value: object, kinds: type | tuple[type, ...], expected: str) -> None:
    if not isinstance(value, kinds):
        raise RequestError(f"{name} is {value!r}; expected {expected}")


def _variance(given: Variance | str) -> Variance:
    try:
        return Variance(given)
    except ValueError:
        known = ", ".join(variance.value for variance in Variance)
        raise RequestError(f"unknown variance {given!r}; known: {known}") from None


@dataclass(frozen=True, slots=True, eq=False)
class SamplingOptions:
    """How images are made; every verb of a Sampler takes one, or single fields of it by name.

    steps: how many, a respacing string such as "10,10,10" or "ddim50", or the timesteps themselves, ascending.
    sampler: "ddim" (with eta), "ddpm" (with variance), "dpmpp" or "plms". eta: stochasticity of DDIM, 0 to 1.
    variance: of a DDPM step, a Variance or its name; the checkpoint's own unless given. labels: one class for all
    images, [n] classes, or [n] vectors where the network takes vectors; None draws a class from each seed. seed: image
    i has seed + i. seeds: [n] instead. guidance: by a classifier. guidance_scale: of classifier-free guidance,
    out = without + guidance_scale (with - without), 1 for none; or a ClassifierFreeGuidance. image: the condition
    images [n, Cc, h, w] in [-1, 1] of a network that takes them, resized bilinearly to the network's size. noise: where
    normal numbers come from, e.g. a RecordedNoise instead of the generator. batch_size: the largest batch of the
    network; with classifier-free guidance an image takes two places in it. It never changes an image.

    Raises RequestError for values that no network could take; what does not fit a network is refused by the verb.
    """

    steps: Steps = 50
    sampler: str = "ddim"
    eta: float = 0.0
    variance: Variance | str | None = None
    labels: Labels | None = None
    seed: int = 0
    seeds: Sequence[int] | None = None
    guidance: ClassifierGuidance | None = None
    guidance_scale: float | ClassifierFreeGuidance = 1.0
    image: Tensor | None = None
    noise: NoiseSource = normal
    batch_size: int = 16

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise RequestError(f"unknown sampler {self.sampler!r}; known: {', '.join(SAMPLERS)}")
        if self.variance is not None:
            object.__setattr__(self, "variance", _variance(self.variance))
        _check_type("eta", self.eta, numbers.Real, "a number from 0 to 1")
        _check_type("seed", self.seed, numbers.Integral, "a whole number")
        _check_type(
            "guidance",
            self.guidance,
            (ClassifierGuidance, type(None)),
            "a ClassifierGuidance or None; the strength of classifier-free guidance is guidance_scale",
        )
        _check_type(
            "guidance_scale",
            self.guidance_scale,
            (numbers.Real, ClassifierFreeGuidance),
            "a number or a ClassifierFreeGuidance",
        )
        _check_type("batch_size", self.batch_size, numbers.Integral, "1 or more")
        if self.batch_size < 1:
            raise RequestError(f"batch_size is {self.batch_size}; expected 1 or more")
        _ = self.free_guidance

    @property
    def free_guidance(self) -> ClassifierFreeGuidance:
        """guidance_scale as a ClassifierFreeGuidance; raises RequestError for a number that is not finite."""
        given = self.guidance_scale
        return given if isinstance(given, ClassifierFreeGuidance) else ClassifierFreeGuidance(float(given))

    @property
    def guide(self) -> Guide | None:
        """The classifier of guidance, None without."""
        return None if self.guidance is None else self.guidance.guide

    def table(self, diffusion: Diffusion) -> StepTable:
        """The table of the sampler on a checkpoint's schedule; errors as in engine.diffusion.solvers.named_table."""
        variance = None if self.variance is None else Variance(self.variance)
        plus_plus = self.free_guidance.plus_plus
        return named_table(diffusion, self.sampler, self.steps, eta=self.eta, variance=variance, plus_plus=plus_plus)


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(SamplingOptions))

_DEFAULTS = SamplingOptions()


def changed_options(options: SamplingOptions | None, changes: Mapping[str, Any]) -> SamplingOptions:
    """The options (the defaults for None) with other values of the fields named; RequestError for an unknown name."""
    _check_type(
        "options", options, (SamplingOptions, type(None)), "a SamplingOptions, or single options by name: steps=50"
    )
    for name in changes:
        if name not in OPTION_NAMES:
            raise RequestError(f"unknown option {name!r}; known: {', '.join(OPTION_NAMES)}")
    return dataclasses.replace(options or _DEFAULTS, **changes)


def refuse(options: SamplingOptions, names: Sequence[str], reason: str) -> None:
    """Raises RequestError with this reason where one of the options named is not left at its default."""
    for name in names:
        given, default = getattr(options, name), getattr(_DEFAULTS, name)
        # Not equality alone, which tensors and arrays have for each element.
        if given is not default and not (isinstance(default, int | float | str) and given == default):
            raise RequestError(reason)
