"""The sampling core: a batch is a set of slots, each at its own row of its own table.

Slots take the network's result, their row's coefficients and their own noise, and nothing of their batch mates.
sample() fills the slots with images and refills them as they finish.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends import Backend, open_backend
from engine.bundle import Bundle
from engine.config import LabelInput
from engine.errors import RequestError
from engine.guidance import ClassifierGuidance
from engine.noise import LABELS, NOISE, NoiseSource, normal, uniform
from engine.prediction import Variance
from engine.solvers import COLUMNS, Steps, StepTable, ddim_table, ddpm_table, dpmpp_table
from kernels.reference import Coefficients, solver_update

_TIMESTEP = COLUMNS.index("timestep")
_NOISE_SCALE = COLUMNS.index("S")


Labels = int | Sequence[int] | Sequence[Sequence[float]]
"""One class for all images, a class for each, or a vector for each where the network takes vectors."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One image to make: its place in the result, table, seed, labels and condition.

    label: for the network, a vector where it takes vectors; classifier_label: for guidance of strength scale. x_start:
    [C, H, W] to begin with instead of draw 0 of the seed. cond: [Cc, H, W].
    """

    index: int
    table: StepTable
    seed: int
    label: int | tuple[float, ...] = 0
    classifier_label: int = 0
    scale: float = 0.0
    x_start: Tensor | None = None
    cond: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one step did to one slot: x_prev and x0 [C, H, W], and whether the image is finished."""

    request: Request
    x_prev: Tensor
    x0: Tensor
    is_last: bool


class Slots:
    """The state of up to `capacity` images in progress on one backend.

    noise: where normals come from, (seeds, draws, shape, stream) -> [B, C, H, W]; engine.noise.normal unless injected.
    """

    def __init__(
        self,
        backend: Backend,
        capacity: int,
        guidance: ClassifierGuidance | None = None,
        noise: NoiseSource = normal,
    ) -> None:
        config = backend.manifest.config
        self._backend, self._guidance, self._noise = backend, guidance, noise
        self._shape = (config.in_channels, *config.image_size)
        self._requests: list[Request | None] = [None] * capacity
        self._row = np.zeros(capacity, dtype=np.int64)
        self._tables: dict[int, StepTable] = {}
        self._arrays: dict[int, np.ndarray] = {}
        self._x_t = torch.zeros(capacity, *self._shape)
        self._x0 = torch.zeros(capacity, *self._shape)
        self._is_self_conditioned = config.self_condition
        has_cond = config.cond_channels > 0 and not config.self_condition
        self._cond = torch.zeros(capacity, config.cond_channels, *config.image_size) if has_cond else None
        self._is_labelled = config.num_classes is not None
        self._label_type = torch.int64 if config.label is LabelInput.TABLE else torch.float32

    @property
    def free(self) -> list[int]:
        """Numbers of the empty slots."""
        return [i for i, request in enumerate(self._requests) if request is None]

    @property
    def is_empty(self) -> bool:
        return all(request is None for request in self._requests)

    def enter(self, slot: int, request: Request) -> None:
        """Put an image into an empty slot."""
        if self._requests[slot] is not None:
            raise RequestError(f"slot {slot} is taken")
        start = request.x_start
        if start is None:
            start = torch.from_numpy(self._noise([request.seed], [0], self._shape, NOISE)[0])
        if self._cond is not None:
            if request.cond is None:
                raise RequestError("this network takes a condition image; pass cond")
            self._cond[slot] = request.cond
        key = id(request.table)
        self._tables[key] = request.table
        self._arrays.setdefault(key, request.table.to_array().astype(np.float32))
        self._requests[slot], self._row[slot] = request, 0
        self._x_t[slot], self._x0[slot] = start, 0.0

    def step(self) -> list[Step]:
        """Advance every image by its next row; finished images leave their slots."""
        live = [i for i, request in enumerate(self._requests) if request is not None]
        requests = [self._requests[i] for i in live]
        rows = np.stack([self._arrays[id(r.table)][self._row[i]] for i, r in zip(live, requests, strict=True)])  # type: ignore[union-attr]
        x_prev, x0 = self._advance(live, [r for r in requests if r is not None], rows)
        self._x_t[live], self._x0[live] = x_prev, x0
        self._row[live] += 1
        steps = []
        for position, slot in enumerate(live):
            request = self._requests[slot]
            assert request is not None
            is_last = bool(self._row[slot] == len(request.table))
            steps.append(Step(request, x_prev[position], x0[position], is_last))
            if is_last:
                self._requests[slot] = None
        return steps

    def _advance(self, live: list[int], requests: list[Request], rows: np.ndarray) -> tuple[Tensor, Tensor]:
        device = self._backend.device
        x_t = self._x_t[live]
        timestep = torch.from_numpy(rows[:, _TIMESTEP].copy())
        label = torch.tensor([r.label for r in requests], dtype=self._label_type) if self._is_labelled else None
        cond = self._cond[live] if self._cond is not None else None
        if self._is_self_conditioned:
            # Chen et al., Analog bits (2022), section 3.2: the x0 of the step before, zeros at first.
            cond = self._x0[live]
        sent = [None if value is None else value.to(device) for value in (x_t, timestep, label, cond)]
        out = self._backend(sent[0], sent[1], sent[2], sent[3]).to(x_t.device)  # type: ignore[arg-type]
        columns = torch.from_numpy(rows)[:, :, None, None, None]
        named = {name: columns[:, i] for i, name in enumerate(COLUMNS) if i != _TIMESTEP}
        return solver_update(
            Coefficients(**named),
            x_t,
            out,
            x0_before=self._x0[live],
            grad=self._gradient(x_t, timestep, requests),
            noise=self._draw(live, requests, rows),
        )

    def _gradient(self, x_t: Tensor, timestep: Tensor, requests: list[Request]) -> Tensor | None:
        if self._guidance is None or all(r.scale == 0 for r in requests):
            return None
        y = torch.tensor([r.classifier_label for r in requests])
        scale = torch.tensor([r.scale for r in requests], dtype=torch.float32)
        return self._guidance.guide(x_t, timestep, y, scale)[0]

    def _draw(self, live: list[int], requests: list[Request], rows: np.ndarray) -> Tensor | None:
        """Normals for the images whose row adds noise; the k-th executed step uses draw k + 1."""
        needs = np.flatnonzero(rows[:, _NOISE_SCALE] != 0)
        if not len(needs):
            return None
        seeds = [requests[i].seed for i in needs]
        draws = [int(self._row[live[i]]) + 1 for i in needs]
        z = torch.zeros(len(live), *self._shape)
        z[needs] = torch.from_numpy(self._noise(seeds, draws, self._shape, NOISE))
        return z


class Sampler:
    """Images from a bundle: opens a backend once and runs requests through its slots."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.config = backend.manifest.config
        self.diffusion = backend.manifest.diffusion

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        backend: str = "auto",
        precision: str | None = None,
        threads: int | None = None,
    ) -> Sampler:
        """Open a bundle; see engine.open_backend for the arguments and errors."""
        return cls(open_backend(bundle, backend, precision, threads))

    def close(self) -> None:
        """Release the backend."""
        self.backend.close()

    def sample(
        self,
        n: int,
        *,
        steps: Steps = 50,
        sampler: str = "ddim",
        eta: float = 0.0,
        variance: Variance | None = None,
        labels: Labels | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        guidance: ClassifierGuidance | None = None,
        cond: Tensor | None = None,
        noise: NoiseSource = normal,
        batch_size: int = 16,
    ) -> Tensor:
        """n images, float32 [n, C, H, W] in [-1, 1].

        steps: how many, or a respacing string such as "10,10,10" or "ddim50". sampler: "ddim" (with eta), "dpmpp" or
        "ddpm" (with variance, the checkpoint's own unless given). labels: one class for all, or [n]; None draws one
        from each seed. seed: image i has seed + i; seeds: [n] instead. cond: [n, Cc, h, w], resized bilinearly where
        it is smaller than the image. noise: a source to use instead of Philox, e.g. engine.noise.RecordedNoise.
        batch_size: images in progress at a time; it never changes an image. Raises RequestError.
        """
        table = self.table(steps, sampler, eta, variance)
        requests = self.requests(n, table, labels, seed, seeds, guidance, cond)
        images = torch.empty(n, self.config.in_channels, *self.config.image_size)
        for step in self.run(requests, guidance, noise, batch_size):
            if step.is_last:
                images[step.request.index] = step.x_prev.clamp(-1, 1)
        return images

    def table(self, steps: Steps, sampler: str, eta: float = 0.0, variance: Variance | None = None) -> StepTable:
        """The table of a named sampler on this checkpoint's schedule; raises RequestError for an unknown name."""
        if sampler == "ddpm":
            if eta:
                raise RequestError("eta belongs to ddim; ddpm has its own variance")
            return ddpm_table(self.diffusion, steps, variance)
        if sampler == "ddim":
            if variance is not None:
                raise RequestError("variance belongs to ddpm; the noise of ddim is set by eta")
            return ddim_table(self.diffusion, steps, eta)
        if sampler == "dpmpp":
            if eta or variance is not None:
                raise RequestError("dpmpp adds no noise; leave eta and variance out")
            return dpmpp_table(self.diffusion, steps)
        raise RequestError(f"unknown sampler {sampler!r}; known: ddim, ddpm, dpmpp")

    def requests(
        self,
        n: int,
        table: StepTable,
        labels: Labels | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        guidance: ClassifierGuidance | None = None,
        cond: Tensor | None = None,
    ) -> list[Request]:
        """The n requests of sample(), checked; see there."""
        if n < 1:
            raise RequestError(f"n is {n}; expected 1 or more images")
        chosen = [seed + i for i in range(n)] if seeds is None else [int(s) for s in seeds]
        if len(chosen) != n:
            raise RequestError(f"{len(chosen)} seeds given for {n} images")
        vectors = self._label_vectors(n, labels)
        if vectors and guidance is not None:
            raise RequestError("this network takes label vectors, which a classifier does not know; leave guidance out")
        classes = self._labels(n, None if vectors else labels, chosen, guidance)
        known = guidance.guide.config.num_classes if guidance is not None else None
        if known is not None and (wrong := [y for y in classes if y >= known]):
            raise RequestError(
                f"label {wrong[0]} is unknown to the classifier, which has classes 0 to {known - 1}; choose one of "
                "these or leave guidance out"
            )
        conds = self._conditions(n, cond)
        scale = guidance.scale if guidance is not None else 0.0
        if not math.isfinite(scale):
            raise RequestError(f"the guidance scale is {scale}; expected a finite number")
        is_labelled = self.config.num_classes is not None
        return [
            Request(
                i,
                table,
                chosen[i],
                vectors[i] if vectors else classes[i] if is_labelled else 0,
                classes[i],
                scale,
                cond=conds[i],
            )
            for i in range(n)
        ]

    def run(
        self,
        requests: Iterable[Request],
        guidance: ClassifierGuidance | None = None,
        noise: NoiseSource = normal,
        batch_size: int = 16,
    ) -> Iterator[Step]:
        """Every step of every request, as they happen; a finished image's slot goes to the next request."""
        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; expected 1 or more")
        if guidance is not None:
            self._check_guide(guidance)
        waiting = iter(requests)
        slots = Slots(self.backend, batch_size, guidance, noise)
        while True:
            for slot in slots.free:
                request = next(waiting, None)
                if request is None:
                    break
                slots.enter(slot, request)
            if slots.is_empty:
                return
            yield from slots.step()

    def _labels(
        self, n: int, labels: Labels | None, seeds: list[int], guidance: ClassifierGuidance | None
    ) -> list[int]:
        rows = self.config.num_classes
        if rows is None and guidance is not None:
            rows = guidance.guide.config.num_classes
        if rows is None:
            if labels is not None:
                raise RequestError("this network takes no labels and no classifier was given; leave labels out")
            return [0] * n
        if labels is None:
            return self._drawn_labels(rows, seeds)
        given = [labels] * n if isinstance(labels, int) else [int(y) for y in labels if not isinstance(y, Sequence)]
        if len(given) != n:
            raise RequestError(f"{len(given)} labels given for {n} images")
        if wrong := [y for y in given if not 0 <= y < rows]:
            raise RequestError(f"label {wrong[0]} does not exist; this checkpoint has labels 0 to {rows - 1}")
        return given

    def _label_vectors(self, n: int, labels: Labels | None) -> list[tuple[float, ...]]:
        """The label vectors of a network that takes them, else nothing."""
        if self.config.label is not LabelInput.VECTOR:
            return []
        width = self.config.time_channels
        given = [] if labels is None or isinstance(labels, int) else list(labels)
        if len(given) != n or any(not isinstance(y, Sequence) or len(y) != width for y in given):
            raise RequestError(
                f"this network takes a vector of {width} numbers as each image's label; pass labels as {n} lists of "
                f"{width} numbers"
            )
        return [tuple(float(number) for number in vector) for vector in given if isinstance(vector, Sequence)]

    def _drawn_labels(self, rows: int, seeds: list[int]) -> list[int]:
        """A class for each seed, uniform over all but the null class."""
        classes = [y for y in range(rows) if y != self.config.null_class]
        u = uniform(seeds, [0] * len(seeds), stream=LABELS)
        return [classes[int(value * len(classes))] for value in u]

    def _conditions(self, n: int, cond: Tensor | None) -> list[Tensor | None]:
        channels = 0 if self.config.self_condition else self.config.cond_channels
        if channels == 0:
            if cond is not None:
                raise RequestError("this network takes no condition image; leave cond out")
            return [None] * n
        if cond is None or cond.ndim != 4 or tuple(cond.shape[:2]) != (n, channels):
            got = "nothing" if cond is None else f"shape {tuple(cond.shape)}"
            raise RequestError(
                f"this network takes a condition image for each image: cond [{n}, {channels}, h, w], got {got}"
            )
        return list(resize_condition(cond, self.config.image_size))

    def _check_guide(self, guidance: ClassifierGuidance) -> None:
        config = guidance.guide.config
        if (config.in_channels, config.image_size) != (self.config.in_channels, self.config.image_size):
            raise RequestError(
                f"the classifier reads {config.in_channels} channels of {config.image_size}, the network makes "
                f"{self.config.in_channels} of {self.config.image_size}; use the classifier trained for it"
            )


def resize_condition(cond: Tensor, image_size: tuple[int, int]) -> Tensor:
    """A low-resolution image [n, Cc, h, w] at the network's size, bilinear as in guided-diffusion's SuperResModel."""
    if tuple(cond.shape[2:]) == image_size:
        return cond.float()
    return F.interpolate(cond.float(), image_size, mode="bilinear")
