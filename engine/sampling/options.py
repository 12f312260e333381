"""What the verbs of a sampler take and give: options, plans, previews."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from engine.diffusion.noise import NoiseSource
from engine.diffusion.prediction import Variance
from engine.diffusion.solvers import Steps
from engine.errors import RequestError
from engine.sampling.requests import Labels
from engine.sampling.slots import Request, Step


class Options(TypedDict, total=False):
    """Keyword arguments of Sampler.sample, and of the verbs that say so."""

    steps: Steps
    sampler: str
    eta: float
    variance: Variance | None
    labels: Labels | None
    seed: int
    seeds: Sequence[int] | None
    guidance: ClassifierGuidance | None
    cfg_scale: float | ClassifierFreeGuidance
    cond: Tensor | None
    noise: NoiseSource
    batch_size: int


@dataclass(frozen=True, slots=True, eq=False)
class Preview:
    """One step of stream(): image number index, step of steps (from 1), x0 [C, H, W] in [-1, 1].

    image: the finished image [C, H, W] in [-1, 1] at the last step, else None.
    """

    index: int
    step: int
    steps: int
    x0: Tensor
    image: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """Every step of progressive(): x after it and the x0 it went by, each [n, steps, C, H, W] float32."""

    x: Tensor
    x0: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    requests: list[Request]
    guidance: ClassifierGuidance | None
    noise: NoiseSource
    batch_size: int

    def starting_at(self, starts: Iterable[Tensor]) -> Plan:
        """The same with these [C, H, W] instead of the first noise."""
        requests = [dataclasses.replace(r, x_start=x) for r, x in zip(self.requests, starts, strict=True)]
        return dataclasses.replace(self, requests=requests)


def previews(steps: Iterable[Step]) -> Iterator[Preview]:
    taken: Counter[int] = Counter()
    for step in steps:
        index = step.request.index
        taken[index] += 1
        image = step.x_prev.clamp(-1, 1) if step.is_last else None
        yield Preview(index, taken[index], len(step.request.table), step.x0.clamp(-1, 1), image)


def deterministic(options: Options, verb: str) -> Options:
    """The options, unless they ask for another sampler than DDIM with eta 0."""
    if options.get("sampler", "ddim") != "ddim" or options.get("eta", 0.0) != 0:
        raise RequestError(f"{verb} is DDIM with eta 0; leave sampler and eta out")
    return options


def great_circle(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """The point at share `weight` of the angle from one noise to another, same shape; DDIM (2021), eq. 67."""
    a, b = first.double(), second.double()
    cosine = float((a * b).sum() / (a.norm() * b.norm()))
    angle = math.acos(min(1.0, max(-1.0, cosine)))
    if math.sin(angle) < 1e-6:
        return first
    at_first, at_second = (math.sin(share * angle) / math.sin(angle) for share in (1 - weight, weight))
    return (at_first * a + at_second * b).to(first.dtype)
