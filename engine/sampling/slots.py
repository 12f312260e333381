"""Slots on the host: a step is one call of the network, and torch operators on the CPU for all else."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from engine.backends.protocol import Backend
from engine.diffusion.guidance import Guide
from engine.diffusion.noise import INPAINTING, NOISE, NoiseSource, normal
from engine.diffusion.solvers import StepTable
from engine.errors import RequestError
from engine.networks.inputs import UNCONDITIONED, Conditions, Inputs, join_conditions, join_inputs
from engine.sampling import step as maths
from engine.sampling.requests import Request, check_entry
from engine.sampling.slot_batch import Snapshot, Step, require_taken
from engine.threads import torch_threads
from kernels.reference import Known, solver_update


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class _Rows:
    """A table as [N, len(COLUMNS)] float32, kept as long as an image uses it."""

    array: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """An image in progress. free_active, guide_active: [N] bool, the rows at which either guidance acts."""

    request: Request
    rows: _Rows
    free_active: np.ndarray
    guide_active: np.ndarray


class Slots:
    """The state of up to `capacity` images in progress on one backend; a SlotBatch.

    guide: the classifier of requests with guidance. noise: where normals come from, (seeds, draws, shape, stream) ->
    [B, C, H, W]; engine.diffusion.noise.normal unless injected. update: the end of a step, with the arguments and
    results of kernels.reference.solver_update. batch_size: the network's largest batch; None for twice the capacity.
    """

    def __init__(
        self,
        backend: Backend,
        capacity: int,
        guide: Guide | None = None,
        noise: NoiseSource = normal,
        update: Callable[..., tuple[Tensor, Tensor]] = solver_update,
        batch_size: int | None = None,
    ) -> None:
        self._config, self._diffusion = backend.manifest.unet.config, backend.manifest.diffusion
        self._backend, self._guide, self._noise, self._update = backend, guide, noise, update
        self._batch_size = 2 * capacity if batch_size is None else batch_size
        self._shape = (self._config.in_channels, *self._config.image_size)
        self._entries: list[_Entry | None] = [None] * capacity
        self._row = np.zeros(capacity, dtype=np.int64)
        self._rows: weakref.WeakValueDictionary[bytes, _Rows] = weakref.WeakValueDictionary()
        self._x_t = torch.zeros(capacity, *self._shape)
        self._x0 = torch.zeros(capacity, *self._shape)
        self._older: Tensor | None = None
        self._network_threads = torch.get_num_threads()

    @property
    def capacity(self) -> int:
        return len(self._entries)

    @property
    def free(self) -> list[int]:
        return [slot for slot, entry in enumerate(self._entries) if entry is None]

    @property
    def is_empty(self) -> bool:
        return all(entry is None for entry in self._entries)

    def enter(self, slot: int, request: Request) -> None:
        """See SlotBatch."""
        if self._entries[slot] is not None:
            raise RequestError(f"slot {slot} is taken")
        check_entry(request, self._config, self._guide is not None)
        start = request.x_start
        if start is None:
            start = torch.from_numpy(self._noise([request.seed], [0], self._shape, NOISE)[0])
        if self._older is None and maths.is_multistep(request.table):
            self._older = torch.zeros(maths.OLDER, *self._x_t.shape)
        self._entries[slot] = self._entry(request)
        self._row[slot] = 0
        self._x_t[slot], self._x0[slot] = start, 0.0

    def leave(self, slot: int) -> None:
        """See SlotBatch."""
        require_taken(self._entries, [slot])
        self._entries[slot] = None

    def step(self, only: Collection[int] | None = None) -> list[Step]:
        """See SlotBatch.

        All but the networks runs on one of torch's threads: these tensors are small, and threads that wait for each
        other at every operator cost milliseconds on a busy machine.
        """
        if only is not None:
            require_taken(self._entries, only)
        live = [
            (slot, entry)
            for slot, entry in enumerate(self._entries)
            if entry is not None and (only is None or slot in only)
        ]
        if not live:
            return []
        with torch_threads(1) as self._network_threads:
            return self._step([slot for slot, _ in live], [entry for _, entry in live])

    def snapshot(self, slots: Sequence[int]) -> Snapshot:
        """See SlotBatch."""
        require_taken(self._entries, slots)
        taken = self._x0[list(slots)]
        return Snapshot(tuple(slots), lambda: taken)

    def _entry(self, request: Request) -> _Entry:
        table, scale, free, guidance = (
            request.table,
            self._diffusion.timestep_scale,
            request.free_guidance,
            request.guidance,
        )
        return _Entry(
            request,
            self._rows_of(table),
            _active(table, scale, None if free is None or not free.is_active else free.interval),
            _active(table, scale, None if guidance is None or not guidance.scale else guidance.interval),
        )

    def _rows_of(self, table: StepTable) -> _Rows:
        key = maths.table_key(table)
        rows = self._rows.get(key)
        if rows is None:
            rows = self._rows[key] = _Rows(table.to_array().astype(np.float32))
        return rows

    def _step(self, live: list[int], entries: list[_Entry]) -> list[Step]:
        at = self._row[live]
        rows = np.stack([entry.rows.array[row] for row, entry in zip(at, entries, strict=True)])
        x_prev, x0 = self._advance(live, entries, rows)
        self._x_t[live], self._x0[live] = x_prev, x0
        self._row[live] += 1
        steps = []
        for position, (slot, entry) in enumerate(zip(live, entries, strict=True)):
            is_last = bool(self._row[slot] == len(entry.rows.array))
            steps.append(Step(entry.request, is_last, partial(_pair, x_prev[position], x0[position])))
            if is_last:
                self._entries[slot] = None
        return steps

    def _advance(self, live: list[int], entries: list[_Entry], rows: np.ndarray) -> tuple[Tensor, Tensor]:
        requests, at = [entry.request for entry in entries], self._row[live]
        x_t, of = self._x_t[live], torch.from_numpy(rows)
        timestep = of[:, maths.TIMESTEP].clone()
        row = maths.coefficients(of, bool(rows[:, maths.PERCENTILE].any()))
        guided = [i for i, entry in enumerate(entries) if entry.free_active[at[i]]]
        out, raw_out = self._call(of, x_t, timestep, live, requests, guided)
        result = self._update(
            row,
            x_t,
            out,
            x0_before=self._x0[live],
            grad=self._gradient(x_t, timestep, entries, at),
            noise=self._draw(live, requests, rows[:, maths.NOISE_SCALE], NOISE),
            known=self._known(live, requests, rows),
            older=None if self._older is None else self._older[:, live],
            raw_out=raw_out,
        )
        if self._older is not None and rows[:, maths.PUSH].any():
            self._older[:, live] = maths.pushed(self._older[:, live], out, of)
        return result

    def _call(
        self,
        rows: Tensor,
        x_t: Tensor,
        timestep: Tensor,
        live: list[int],
        requests: list[Request],
        guided: list[int],
    ) -> tuple[Tensor, Tensor | None]:
        """The network's result [B, C', H, W] after classifier-free guidance, and what E multiplies instead of it.

        guided: the positions in the batch that have guidance at their row. They run once more without their condition,
        in the same call where the network's largest batch allows it, else in one of their own.
        """
        inputs = Inputs(x_t, timestep, self._conditions(live, [r.conditions for r in requests]))
        if not guided:
            return self._network(inputs), None
        halves = [requests[i].without or UNCONDITIONED for i in guided]
        others = Inputs(x_t[guided], timestep[guided], self._conditions([live[i] for i in guided], halves))
        if len(live) + len(guided) <= self._batch_size:
            out, unlabelled = self._network(join_inputs([inputs, others])).tensor_split([len(live)])
        else:
            out, unlabelled = self._network(inputs), self._network(others)
        return self._guided(rows, x_t, out, unlabelled, requests, guided)

    def _guided(
        self,
        rows: Tensor,
        x_t: Tensor,
        out: Tensor,
        unlabelled: Tensor,
        requests: list[Request],
        guided: list[int],
    ) -> tuple[Tensor, Tensor | None]:
        free = [guidance for i in guided if (guidance := requests[i].free_guidance) is not None]
        numbers = torch.tensor([maths.guidance_numbers(guidance) for guidance in free], dtype=torch.float32)
        strength, rescale, removed, _ = numbers.unbind(1)
        goes_beyond = any(guidance.goes_beyond_scale for guidance in free)
        result, channels = out.clone(), self._shape[0]
        result[guided] = maths.guided_out(
            out[guided], unlabelled, strength, (rescale, removed) if goes_beyond else None, channels
        )
        along = [position for position, guidance in enumerate(free) if guidance.plus_plus]
        if not along:
            return result, None
        raw_out, places = result[:, :channels].clone(), [guided[position] for position in along]
        row = maths.coefficients(rows[places], bool(rows[places, maths.PERCENTILE].any()))
        raw_out[places] = maths.implied_out(row, x_t[places], unlabelled[along, :channels], self._diffusion.prediction)
        return result, raw_out

    def _network(self, inputs: Inputs) -> Tensor:
        sent = inputs.to(self._backend.device)
        with torch_threads(self._network_threads):
            return self._backend(sent.x_t, sent.timestep, sent.conditions).to(inputs.x_t.device)

    def _conditions(self, live: list[int], parts: list[Conditions]) -> Conditions:
        joined = join_conditions(parts)
        if self._config.self_condition:
            # Chen et al., Analog bits (2022), section 3.2: the x0 of the step before, zeros at first.
            return replace(joined, image=self._x0[live])
        return joined

    def _gradient(self, x_t: Tensor, timestep: Tensor, entries: list[_Entry], at: np.ndarray) -> Tensor | None:
        active = [entry.guide_active[row] for row, entry in zip(at, entries, strict=True)]
        if self._guide is None or not any(active):
            return None
        labels = [0 if entry.request.guidance is None else entry.request.guidance.label for entry in entries]
        scales = [
            entry.request.guidance.scale if entry.request.guidance is not None and acts else 0.0
            for entry, acts in zip(entries, active, strict=True)
        ]
        with torch_threads(self._network_threads):
            return self._guide(x_t, timestep, torch.tensor(labels), torch.tensor(scales, dtype=torch.float32))[0]

    def _known(self, live: list[int], requests: list[Request], rows: np.ndarray) -> Known | None:
        if all(r.known is None for r in requests):
            return None
        image, mask = torch.zeros(len(live), *self._shape), torch.ones(len(live), *self._shape)
        for position, request in enumerate(requests):
            if request.known is not None and request.mask is not None:
                image[position], mask[position] = request.known, request.mask
        levels = rows[:, maths.KNOWN_NOISE]
        scale = np.array([0.0 if r.known is None else level for r, level in zip(requests, levels, strict=True)])
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


def _active(table: StepTable, timestep_scale: float, interval: tuple[float, float] | None) -> np.ndarray:
    if interval is None:
        return np.zeros(len(table), dtype=bool)
    return maths.active_rows(table, interval, timestep_scale)


def _pair(x_prev: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
    return x_prev, x0
