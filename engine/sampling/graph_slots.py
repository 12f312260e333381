"""Slots whose state lives on the device: a step is one replay of a captured graph (see engine.sampling.step_program).

The host knows every slot's row without asking, because it advances its own copy as the graph does. It refills slots,
picks the graph that the images at their rows need, and fetches what is finished; nothing else passes between them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.backends.protocol import Capturable
from engine.bundle.manifest import Manifest
from engine.device import Device
from engine.diffusion.guidance import EVERYWHERE, Interval, require_null_class
from engine.diffusion.noise import NOISE, normal
from engine.errors import BackendError, RequestError
from engine.sampling.device_state import Arena, HostSlots, Placed, allocate_state
from engine.sampling.slots import Request, Step, label_tensor
from engine.sampling.step_program import StepProgram, Update, Variant, torch_update

logger = logging.getLogger(__name__)

_IDLE_KEPT = 4
_UNGUIDED = (1.0, 0.0, 1.0, 0.0)
"""cfg_scale, cfg_rescale, cfg_parallel and cfg_plus_plus of an image without classifier-free guidance."""


class GraphSlots:
    """Up to `capacity` images in progress on one device; the images are those of engine.sampling.slots.Slots, up to
    rounding.

    network, guide: what a step calls. guide_interval: of classifier guidance. The first step of each variant runs as
    it is, which loads kernels and lets libraries choose; the second is captured; all later ones replay it.
    """

    def __init__(
        self,
        device: Device,
        manifest: Manifest,
        network: Capturable,
        capacity: int,
        guide: Capturable | None = None,
        guide_interval: Interval = EVERYWHERE,
        update: Update = torch_update,
    ) -> None:
        config, diffusion = manifest.config, manifest.diffusion
        self._device, self._config = device, config
        self._state = allocate_state(device, config, capacity)
        self._arena = Arena(device, self._state, diffusion.timestep_scale, guide_interval)
        self._program = StepProgram(device, self._state, config, diffusion.prediction, network, guide, update)
        self._has_guide = guide is not None
        self._host = HostSlots(capacity)
        self._requests: list[Request | None] = [None] * capacity
        self._placed: list[Placed | None] = [None] * capacity
        self._labels = torch.zeros(self._state.label.shape, dtype=self._state.label.dtype)
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
        """Put an image into an empty slot; raises RequestError."""
        if self._requests[slot] is not None:
            raise RequestError(f"slot {slot} is taken")
        if self._state.cond is not None and request.cond is None:
            raise RequestError("this network takes a condition image; pass cond")
        if (request.known is None) != (request.mask is None):
            raise RequestError("a known image and its mask belong together; give both or neither")
        cfg = request.cfg
        if cfg is not None:
            require_null_class(self._config)
        used = {placed.first for placed in self._placed if placed is not None}
        placed = self._arena.place(request.table, EVERYWHERE if cfg is None else cfg.interval, used)
        numbers = _UNGUIDED
        if cfg is not None and cfg.is_active:
            numbers = (cfg.scale, cfg.rescale, cfg.parallel, float(cfg.plus_plus))
        scale = request.scale if self._has_guide else 0.0
        self._host.enter(slot, placed.first, placed.last, request.seed, (scale, *numbers))
        self._requests[slot], self._placed[slot] = request, placed
        label = label_tensor(self._config, [request])
        if label is not None:
            self._labels[slot] = label[0]
        self._classes[slot] = request.classifier_label
        self._is_stale = True
        self._copy_images(slot, request)

    def step(self) -> list[Step]:
        """Advance every image by its next row; finished images leave their slots."""
        live = [(slot, request) for slot, request in enumerate(self._requests) if request is not None]
        variant = self._variant(live)
        self._upload()
        self._run(variant)
        self._host.advance()
        self._steps_done += 1
        finished = {slot for slot, _ in live if self._host.row[slot] == self._host.last[slot]}
        read = self._fetcher(is_now=bool(finished))
        for slot in finished:
            self._leave(slot)
        return [Step(request, slot in finished, partial(_part, read, slot)) for slot, request in live]

    def clear(self) -> None:
        """Drop every image in progress."""
        for slot in range(self.capacity):
            self._leave(slot)

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
        if state.cond is not None and request.cond is not None:
            copy_in(state.cond[slot], request.cond)
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
        copy_in(state.label, self._labels)
        copy_in(state.class_label, self._classes)
        self._is_stale = False

    def _variant(self, live: list[tuple[int, Request]]) -> Variant:
        """What the images need at their rows."""
        gradient = doubled = noise = extras = False
        for slot, request in live:
            placed = self._placed[slot]
            assert placed is not None
            row, cfg = int(self._host.row[slot]) - placed.first, request.cfg
            gradient |= bool(self._host.floats[0, slot] != 0 and placed.guide_active[row])
            doubled |= bool(cfg is not None and cfg.is_active and placed.cfg_active[row])
            noise |= placed.is_noisy
            extras |= placed.has_extras or request.mask is not None
            extras |= cfg is not None and (cfg.rescale != 0 or cfg.parallel != 1 or cfg.plus_plus)
        return Variant(gradient, doubled, noise, extras)

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
