"""Slots for the runs of one backend, on the host or on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from engine.backends.protocol import Backend, is_capturable
from engine.device import Device, cuda_device
from engine.diffusion.guidance import Guide
from engine.diffusion.noise import NoiseSource, normal
from engine.sampling.fused_update import update_for
from engine.sampling.graph_slots import GraphSlots
from engine.sampling.slot_batch import SlotBatch
from engine.sampling.slots import Slots

_IDLE_KEPT = 4


class SlotPool:
    """Slots for the runs of one backend: on the device, with their graphs kept between runs, where that can be.

    That takes a backend and a guide that can be captured, and noise from engine.diffusion.noise.normal.
    """

    def __init__(self, backend: Backend, make_device: Callable[[], Device] = cuda_device) -> None:
        self._backend, self._make_device = backend, make_device
        self._device: Device | None = None
        self._idle: dict[tuple[int, bool, Any], GraphSlots] = {}

    @contextmanager
    def borrow(self, capacity: int, guide: Guide | None, noise: NoiseSource, batch_size: int) -> Iterator[SlotBatch]:
        """Empty slots for a run. batch_size: the largest batch of the network; there are no more slots than that."""
        capacity = min(capacity, batch_size)
        if not self._is_on_device(guide, noise):
            yield Slots(self._backend, capacity, guide, noise, batch_size=batch_size)
            return
        # Two runs at a time never share slots: they are taken out while they are used.
        key = (capacity, 2 * capacity > batch_size, guide)
        slots = self._idle.pop(key, None) or self._make(capacity, guide, batch_size)
        try:
            yield slots
        finally:
            slots.clear()
            self._idle[key] = slots
            while len(self._idle) > _IDLE_KEPT:
                del self._idle[next(iter(self._idle))]

    def close(self) -> None:
        """Release the graphs and their memory."""
        self._idle.clear()

    def _is_on_device(self, guide: Any, noise: NoiseSource) -> bool:
        return noise is normal and is_capturable(self._backend) and (guide is None or is_capturable(guide))

    def _make(self, capacity: int, guide: Any, batch_size: int) -> GraphSlots:
        if self._device is None:
            self._device = self._make_device()
        network: Any = self._backend
        update = update_for(network.device)
        return GraphSlots(self._device, self._backend.manifest, network, capacity, guide, update, batch_size)
