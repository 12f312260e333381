"""Slots whose state lives on the device: a step is one replay of a captured graph (see engine.sampling.step_program).

The host knows every slot's row without asking, because it advances its own copy as the graph does. It refills slots,
picks the graph that the images at their rows need, and fetches what is finished; nothing else passes between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.backends.protocol import Capturable
from engine.bundle.manifest import Manifest
from engine.device import Device
from engine.diffusion.guidance import EVERYWHERE
from engine.diffusion.noise import NOISE, normal
from engine.errors import BackendError, RequestError
from engine.sampling.device_state import Arena, HostSlots, Placed, allocate_state
from engine.sampling.requests import Request, check_entry
from engine.sampling.slot_batch import Snapshot, Step, require_taken
from engine.sampling.step import UNGUIDED, guidance_numbers
from engine.sampling.step_program import StepProgram, Update, Variant, torch_update

logger = logging.getLogger(__name__)


class GraphSlots:
    """Up to `capacity` images in progress on one device; the images are those of engine.sampling.slots.Slots, up to
    rounding.

    network, guide: what a step calls; guide is that of requests with guidance. batch_size: the network's largest batch,
    `capacity` or more; None for twice the capacity. The first step of each variant runs as
    it is, which loads kernels and lets libraries choose; the second is captured; all later ones replay it.
    """

    def __init__(
        self,
        device: Device,
        manifest: Manifest,
        network: Capturable,
        capacity: int,
        guide: Capturable | None = None,
        update: Update = torch_update,
        batch_size: int | None = None,
    ) -> None:
        config, diffusion = manifest.unet.config, manifest.diffusion
        self._device, self._config = device, config
        self._state = allocate_state(device, config, capacity)
        self._arena = Arena(device, self._state, diffusion.timestep_scale)
        self._program = StepProgram(
            device, self._state, config, diffusion.prediction, network, guide, update, batch_size
        )
        self._has_guide = guide is not None
        self._host = HostSlots(capacity)
        self._requests: list[Request | None] = [None] * capacity
        self._placed: list[Placed | None] = [None] * capacity
        self._classes = torch.zeros(capacity, dtype=torch.int64)
        self._masked: set[int] = set()
        self._is_stale = True
        self._steps_done = 0
        self._graphs: dict[Variant, Any] = {}
        self._tried: set[Variant] = set()

    @property
    def capacity(self) -> int:
        return len(self._requests)

    @property
    def free(self) -> list[int]:
        """Numbers of the empty slots."""
        return [i for i, request in enumerate(self._requests) if request is None]

    @property
    def is_empty(self) -> bool:
        return all(request is None for request in self._requests)

    @property
    def captured(self) -> tuple[Variant, ...]:
        """The variants of which there is a graph."""
        return tuple(variant for variant, graph in self._graphs.items() if graph is not None)

    def enter(self, slot: int, request: Request) -> None:
        """See SlotBatch."""
        if self._requests[slot] is not None:
            raise RequestError(f"slot {slot} is taken")
        check_entry(request, self._config, self._has_guide)
        free, guidance = request.free_guidance, request.guidance
        used = {placed.first for placed in self._placed if placed is not None}
        placed = self._arena.place(
            request.table,
            EVERYWHERE if free is None else free.interval,
            EVERYWHERE if guidance is None else guidance.interval,
            used,
        )
        numbers = UNGUIDED if free is None or not free.is_active else guidance_numbers(free)
        scale = 0.0 if guidance is None else guidance.scale
        self._host.enter(slot, placed.first, placed.last, request.seed, (scale, *numbers))
        self._requests[slot], self._placed[slot] = request, placed
        self._classes[slot] = 0 if guidance is None else guidance.label
        self._is_stale = True
        self._copy_images(slot, request)

    def leave(self, slot: int) -> None:
        """See SlotBatch."""
        require_taken(self._requests, [slot])
        self._leave(slot)

    def step(self, only: Collection[int] | None = None) -> list[Step]:
        """See SlotBatch. A slot that rests is put on the identity row for this step, and gets back what it held."""
        if only is not None:
            require_taken(self._requests, only)
        taken = [(slot, request) for slot, request in enumerate(self._requests) if request is not None]
        live = [(slot, request) for slot, request in taken if only is None or slot in only]
        if not live:
            return []
        resting = [slot for slot, _ in taken if only is not None and slot not in only]
        with self._rest(resting):
            self._upload()
            self._run(self._variant(live))
            self._host.advance()
        self._steps_done += 1
        finished = {slot for slot, _ in live if self._host.row[slot] == self._host.last[slot]}
        read = self._fetcher(is_now=bool(finished))
        for slot in finished:
            self._leave(slot)
        return [Step(request, slot in finished, partial(_part, read, slot)) for slot, request in live]

    def snapshot(self, slots: Sequence[int]) -> Snapshot:
        """See SlotBatch; a copy that the device makes after the steps enqueued so far, and before later ones."""
        require_taken(self._requests, slots)
        return Snapshot(tuple(slots), self._device.copy_out_later([self._state.x0[slot] for slot in slots]))

    def clear(self) -> None:
        """Drop every image in progress."""
        for slot in range(self.capacity):
            self._leave(slot)

    @contextmanager
    def _rest(self, slots: list[int]) -> Iterator[None]:
        """Keep these slots as they are through a step: their numbers on the host, their images on the device."""
        if not slots:
            yield
            return
        host, state, device = self._host, self._state, self._device
        ints, floats = host.ints[:, slots].copy(), host.floats[:, slots].copy()
        # What a step makes of a resting slot is undone, so that it is right for x0 and for a known part too.
        held = [tensor[slot] for slot in slots for tensor in (state.x_t, state.x0)]
        with device.use(device.main):
            kept = torch.stack(held)
        for slot in slots:
            host.rest(slot)
        self._is_stale = True
        try:
            yield
        finally:
            with device.use(device.main):
                for tensor, value in zip(held, kept, strict=True):
                    tensor.copy_(value)
            host.ints[:, slots], host.floats[:, slots] = ints, floats
            self._is_stale = True

    def _leave(self, slot: int) -> None:
        self._requests[slot] = self._placed[slot] = None
        self._host.rest(slot)
        self._is_stale = True

    def _copy_images(self, slot: int, request: Request) -> None:
        state, copy_in = self._state, self._device.copy_in
        start = request.x_start
        if start is None:
            start = torch.from_numpy(normal([request.seed], [0], tuple(state.x_t.shape[1:]), NOISE)[0])
        copy_in(state.x_t[slot], start)
        copy_in(state.x0[slot], torch.zeros(()))
        # A slot without the other half never takes it, but its network call may: then it is given the first half.
        for half, conditions in enumerate((request.conditions, request.without or request.conditions)):
            for name, value in conditions.tensors().items():
                copy_in(state.conditions[name][half, slot], value[0])
        if request.known is not None and request.mask is not None:
            copy_in(state.known[slot], request.known)
            copy_in(state.mask[slot], request.mask)
            self._masked.add(slot)
        elif slot in self._masked:
            copy_in(state.mask[slot], torch.ones(()))
            self._masked.remove(slot)

    def _upload(self) -> None:
        """The per-slot numbers, where a slot was filled or emptied since the last step."""
        if not self._is_stale:
            return
        state, copy_in = self._state, self._device.copy_in
        copy_in(state.ints, torch.from_numpy(self._host.ints))
        copy_in(state.floats, torch.from_numpy(self._host.floats))
        copy_in(state.class_label, self._classes)
        self._is_stale = False

    def _variant(self, live: list[tuple[int, Request]]) -> Variant:
        """What the images need at their rows."""
        gradient = doubled = beyond_scale = noise = thresholds = multistep = known = False
        for slot, request in live:
            placed = self._placed[slot]
            assert placed is not None
            row, free = int(self._host.row[slot]) - placed.first, request.free_guidance
            gradient |= bool(self._host.floats[0, slot] != 0 and placed.guide_active[row])
            if free is not None and free.is_active and placed.free_active[row]:
                doubled = True
                beyond_scale |= free.goes_beyond_scale
            noise |= placed.is_noisy
            thresholds |= placed.thresholds
            multistep |= placed.multistep
            known |= request.mask is not None
        return Variant(gradient, doubled, beyond_scale, noise, thresholds, multistep, known)

    def _run(self, variant: Variant) -> None:
        if variant not in self._graphs and variant in self._tried:
            self._graphs[variant] = self._capture(variant)
        graph = self._graphs.get(variant)
        if graph is not None:
            self._device.replay(graph)
            return
        if variant not in self._tried:
            self._program.prepare(variant)
            self._tried.add(variant)
        self._program.enqueue(variant)

    def _capture(self, variant: Variant) -> Any:
        """The graph, or None where the step cannot be captured; it then runs kernel by kernel."""
        self._device.synchronize()
        try:
            self._program.check_capturable(variant)
            return self._device.capture(partial(self._program.enqueue, variant))
        except (BackendError, RuntimeError) as error:
            logger.warning("a step cannot be captured as a CUDA graph and runs slower without one: %s", error)
            return None

    def _fetcher(self, is_now: bool) -> Callable[[], tuple[Tensor, Tensor]]:
        """Reads x_t and x0 of all slots after this step, once, when first asked; at once where images are finished."""
        done = self._steps_done
        kept: list[tuple[Tensor, Tensor]] = []

        def read() -> tuple[Tensor, Tensor]:
            if not kept:
                if done != self._steps_done:
                    raise RequestError("the images of a step were asked for after a later step; read them before it")
                kept.append((self._device.copy_out(self._state.x_t), self._device.copy_out(self._state.x0)))
            return kept[0]

        if is_now:
            read()
        return read


def _part(read: Callable[[], tuple[Tensor, Tensor]], slot: int) -> tuple[Tensor, Tensor]:
    x_prev, x0 = read()
    return x_prev[slot], x0[slot]
