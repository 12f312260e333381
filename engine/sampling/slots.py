"""A batch is a set of slots, each at its own row of its own table.

Slots take the network's result, their row's coefficients and their own noise, and nothing of their batch mates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.backends.protocol import Backend
from engine.diffusion.guidance import (
    ClassifierFreeGuidance,
    ClassifierGuidance,
    guided_out,
    is_within,
    require_null_class,
)
from engine.diffusion.noise import INPAINTING, NOISE, NoiseSource, normal
from engine.diffusion.prediction import Prediction
from engine.diffusion.solvers import COLUMNS, StepTable
from engine.errors import RequestError
from engine.networks.config import LabelInput, UNetConfig
from engine.networks.inputs import Conditions, Inputs
from engine.threads import torch_threads
from kernels.reference import Coefficients, Known, limit_x0, solver_update

_TIMESTEP = COLUMNS.index("timestep")
_NOISE_SCALE = COLUMNS.index("S")
_KNOWN_NOISE = COLUMNS.index("N")
_PUSH = COLUMNS.index("push")
_PERCENTILE = COLUMNS.index("percentile")
_COEFFICIENTS = {name: place for place, name in enumerate(COLUMNS) if name not in ("timestep", "push")}
_OLDER = 3


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One image to make: its place in the result, table, seed, labels and condition.

    label: for the network, a vector where it takes vectors; classifier_label: for guidance of strength scale. x_start:
    [C, H, W] to begin with instead of draw 0 of the seed. cond: [Cc, H, W]. cfg: classifier-free guidance, None for
    none. known, mask: [C, H, W], an image of which the mask's zeros are kept.
    """

    index: int
    table: StepTable
    seed: int
    label: int | tuple[float, ...] = 0
    classifier_label: int = 0
    scale: float = 0.0
    x_start: Tensor | None = None
    cond: Tensor | None = None
    cfg: ClassifierFreeGuidance | None = None
    known: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one step did to one slot, and whether the image is finished.

    images: reads x_prev and x0, which may be a copy from a device, and which must be read before the next step unless
    the image is finished; later it raises RequestError where the slots have gone on.
    """

    request: Request
    is_last: bool
    images: Callable[[], tuple[Tensor, Tensor]]

    @property
    def x_prev(self) -> Tensor:
        """[C, H, W] after the step."""
        return self.images()[0]

    @property
    def x0(self) -> Tensor:
        """[C, H, W] that the step went by."""
        return self.images()[1]


def label_tensor(config: UNetConfig, requests: Sequence[Request]) -> Tensor | None:
    """What the network is given as labels: int64 [B], float32 [B, D] where it takes vectors, None where it has none."""
    if config.num_classes is None:
        return None
    is_class = config.label is LabelInput.TABLE
    return torch.tensor([r.label for r in requests], dtype=torch.int64 if is_class else torch.float32)


class Slots:
    """The state of up to `capacity` images in progress on one backend.

    noise: where normals come from, (seeds, draws, shape, stream) -> [B, C, H, W]; engine.diffusion.noise.normal unless
    injected. update: the end of a step, with the arguments and results of kernels.reference.solver_update.
    """

    def __init__(
        self,
        backend: Backend,
        capacity: int,
        guidance: ClassifierGuidance | None = None,
        noise: NoiseSource = normal,
        update: Callable[..., tuple[Tensor, Tensor]] = solver_update,
    ) -> None:
        config = backend.manifest.config
        self._backend, self._guidance, self._noise, self._update = backend, guidance, noise, update
        self._shape = (config.in_channels, *config.image_size)
        self._requests: list[Request | None] = [None] * capacity
        self._row = np.zeros(capacity, dtype=np.int64)
        self._tables: dict[int, StepTable] = {}
        self._arrays: dict[int, np.ndarray] = {}
        self._x_t = torch.zeros(capacity, *self._shape)
        self._x0 = torch.zeros(capacity, *self._shape)
        self._older: Tensor | None = None
        self._prediction = backend.manifest.diffusion.prediction
        self._is_self_conditioned = config.self_condition
        has_cond = config.cond_channels > 0 and not config.self_condition
        self._cond = torch.zeros(capacity, config.cond_channels, *config.image_size) if has_cond else None
        self._null_class = config.null_class
        self._timestep_scale = backend.manifest.diffusion.timestep_scale
        self._network_threads = torch.get_num_threads()

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
        if (request.known is None) != (request.mask is None):
            raise RequestError("a known image and its mask belong together; give both or neither")
        if request.cfg is not None:
            require_null_class(self._backend.manifest.config)
        if request.table.push.any() and self._older is None:
            self._older = torch.zeros(_OLDER, *self._x_t.shape)
        key = id(request.table)
        self._tables[key] = request.table
        self._arrays.setdefault(key, request.table.to_array().astype(np.float32))
        self._requests[slot], self._row[slot] = request, 0
        self._x_t[slot], self._x0[slot] = start, 0.0

    def step(self) -> list[Step]:
        """Advance every image by its next row; finished images leave their slots.

        All but the networks runs on one of torch's threads: these tensors are small, and threads that wait for each
        other at every operator cost milliseconds on a busy machine.
        """
        with torch_threads(1) as self._network_threads:
            return self._step()

    def _step(self) -> list[Step]:
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
            steps.append(Step(request, is_last, partial(_pair, x_prev[position], x0[position])))
            if is_last:
                self._requests[slot] = None
        return steps

    def _advance(self, live: list[int], requests: list[Request], rows: np.ndarray) -> tuple[Tensor, Tensor]:
        x_t = self._x_t[live]
        timestep = torch.from_numpy(rows[:, _TIMESTEP].copy())
        label = label_tensor(self._backend.manifest.config, requests)
        cond = self._cond[live] if self._cond is not None else None
        if self._is_self_conditioned:
            # Chen et al., Analog bits (2022), section 3.2: the x0 of the step before, zeros at first.
            cond = self._x0[live]
        out, unlabelled = self._call(x_t, timestep, label, cond, self._cfg_active(live, requests))
        columns = torch.from_numpy(rows)[:, :, None, None, None].unbind(1)
        values: dict[str, Tensor | None] = {name: columns[place] for name, place in _COEFFICIENTS.items()}
        if not rows[:, _PERCENTILE].any():
            values["percentile"] = None
        row = Coefficients(**values)  # type: ignore[arg-type]
        result = self._update(
            row,
            x_t,
            out,
            x0_before=self._x0[live],
            grad=self._gradient(x_t, timestep, live, requests),
            noise=self._draw(live, requests, rows[:, _NOISE_SCALE], NOISE),
            known=self._known(live, requests, rows),
            older=None if self._older is None else self._older[:, live],
            raw_out=self._raw_out(row, x_t, out, unlabelled),
        )
        self._push(live, rows, out)
        return result

    def _push(self, live: list[int], rows: np.ndarray, out: Tensor) -> None:
        """Keep the outs that later rows take as o1, o2 and o3."""
        pushes = np.flatnonzero(rows[:, _PUSH])
        if self._older is not None and len(pushes):
            slots = [live[i] for i in pushes]
            newest = out[None, pushes, : self._shape[0]]
            self._older[:, slots] = torch.cat([newest, self._older[:-1, slots]])

    def _raw_out(self, row: Coefficients, x_t: Tensor, out: Tensor, unlabelled: dict[int, Tensor]) -> Tensor | None:
        """What E multiplies where it is not the out itself: with CFG++ the unlabelled one.

        A network of x0 or v has its eps from a limited x0, so that limit is put back into its out.
        """
        if not unlabelled:
            return None
        raw = out[:, : self._shape[0]].clone()
        for position, without in unlabelled.items():
            raw[position] = without[: self._shape[0]]
        if self._prediction is not Prediction.EPS:
            where = list(unlabelled)
            a, b = row.A[where], row.B[where]
            percentile = None if row.percentile is None else row.percentile[where]
            x0 = limit_x0(a * x_t[where] + b * raw[where], row.clip[where], percentile)
            raw[where] = (x0 - a * x_t[where]) / b
        return raw

    def _call(
        self,
        x_t: Tensor,
        timestep: Tensor,
        label: Tensor | None,
        cond: Tensor | None,
        active: dict[int, ClassifierFreeGuidance],
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The network's result [B, C', H, W]; one batch of B + len(active), the active positions once more unlabelled.

        With it, by position, the unlabelled result [C', H, W] of those with CFG++. active: position in the batch -> its
        classifier-free guidance.
        """
        count = len(x_t)
        if active:
            assert label is not None
            assert self._null_class is not None
            unlabelled = torch.full((len(active),), self._null_class, dtype=label.dtype)
            label = torch.cat([label, unlabelled])
            rows = [*range(count), *active]
            x_t, timestep = x_t[rows], timestep[rows]
            cond = None if cond is None else cond[rows]
        sent = Inputs(x_t, timestep, Conditions(label, cond)).to(self._backend.device)
        with torch_threads(self._network_threads):
            out = self._backend(sent.x_t, sent.timestep, sent.conditions).to(x_t.device)
        if not active:
            return out, {}
        guided = out[:count].clone()
        for position, without, cfg in zip(active, out[count:], active.values(), strict=True):
            guided[position] = guided_out(out[position], without, cfg, x_t.shape[1])
        pairs = zip(active.items(), out[count:], strict=True)
        return guided, {position: without for (position, cfg), without in pairs if cfg.plus_plus}

    def _time(self, slot: int, request: Request) -> float:
        """The training timestep (in continuous time the log-SNR) of the row that a slot is at."""
        return float(request.table.timestep[self._row[slot]]) / self._timestep_scale

    def _cfg_active(self, live: list[int], requests: list[Request]) -> dict[int, ClassifierFreeGuidance]:
        """Position in the batch -> guidance, of the images that have one at their step."""
        return {
            position: request.cfg
            for position, (slot, request) in enumerate(zip(live, requests, strict=True))
            if request.cfg is not None
            and request.cfg.is_active
            and is_within(self._time(slot, request), request.cfg.interval)
        }

    def _gradient(self, x_t: Tensor, timestep: Tensor, live: list[int], requests: list[Request]) -> Tensor | None:
        if self._guidance is None:
            return None
        interval = self._guidance.interval
        scales = [
            r.scale if is_within(self._time(slot, r), interval) else 0.0 for slot, r in zip(live, requests, strict=True)
        ]
        if not any(scales):
            return None
        y = torch.tensor([r.classifier_label for r in requests])
        with torch_threads(self._network_threads):
            return self._guidance.guide(x_t, timestep, y, torch.tensor(scales, dtype=torch.float32))[0]

    def _known(self, live: list[int], requests: list[Request], rows: np.ndarray) -> Known | None:
        if all(r.known is None for r in requests):
            return None
        image, mask = torch.zeros(len(live), *self._shape), torch.ones(len(live), *self._shape)
        for position, request in enumerate(requests):
            if request.known is not None and request.mask is not None:
                image[position], mask[position] = request.known, request.mask
        scale = np.array([0.0 if r.known is None else row[_KNOWN_NOISE] for r, row in zip(requests, rows, strict=True)])
        noise = self._draw(live, requests, scale, INPAINTING)
        return Known(image, mask, torch.zeros_like(image) if noise is None else noise)

    def _draw(self, live: list[int], requests: list[Request], scale: np.ndarray, stream: int) -> Tensor | None:
        """Normals for the images whose scale is not 0; the k-th executed step uses draw k + 1."""
        needs = np.flatnonzero(scale != 0)
        if not len(needs):
            return None
        seeds = [requests[i].seed for i in needs]
        draws = [int(self._row[live[i]]) + 1 for i in needs]
        z = torch.zeros(len(live), *self._shape)
        z[needs] = torch.from_numpy(self._noise(seeds, draws, self._shape, stream))
        return z


def _pair(x_prev: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    return x_prev, x0
