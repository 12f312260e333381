"""What the verbs of a sampler give beside images: previews and progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from engine.sampling.slot_batch import Step


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


def previews(steps: Iterable[Step]) -> Iterator[Preview]:
    """Each step of each image as a preview, in the order of the steps."""
    taken: Counter[int] = Counter()
    for step in steps:
        index = step.request.index
        taken[index] += 1
        image = step.x_prev.clamp(-1, 1) if step.is_last else None
        yield Preview(index, taken[index], len(step.request.table), step.x0.clamp(-1, 1), image)
