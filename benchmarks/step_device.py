"""One step on a device outside the slots: to enqueue as it is, to capture, and to split between events.

Split, its parts are enqueued kernel by kernel on one stream, gradient and network one after the other. Noise is part
of the update there, and what is left for the host is small kernels and the GPU's waits, most of which a graph saves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.step_loop import Network, StepKind
from benchmarks.step_parts import PartRecorder
from engine.backends.protocol import Bound, Capturable
from engine.device import Device, Stream
from engine.diffusion.guidance import EVERYWHERE, ClassifierGuidance
from engine.diffusion.solvers import StepTable
from engine.sampling.device_state import Arena, HostSlots, allocate_state
from engine.sampling.fused_update import update_for
from engine.sampling.step import UNGUIDED
from engine.sampling.step_program import StepProgram, Update, Variant


@dataclass(frozen=True, slots=True, eq=False)
class DeviceStep:
    """One step of full slots as a program to enqueue; when the rows of their table end the work stays the same."""

    program: StepProgram
    variant: Variant

    def enqueue(self) -> None:
        self.program.enqueue(self.variant)


def device_step(
    device: Device,
    network: Any,
    table: StepTable,
    batch: int,
    guidance: ClassifierGuidance | None = None,
    update: Update | None = None,
) -> DeviceStep:
    """A step program that is ready to be enqueued. network: a Backend that is Capturable, as is the guide."""
    manifest = network.manifest
    state = allocate_state(device, manifest.config, batch)
    arena = Arena(device, state, manifest.diffusion.timestep_scale)
    placed = arena.place(table, EVERYWHERE, EVERYWHERE, set())
    host = HostSlots(batch)
    scale = 0.0 if guidance is None else guidance.scale
    for slot in range(batch):
        host.enter(slot, placed.first, placed.last, slot, (scale, *UNGUIDED))
    device.copy_in(state.ints, torch.from_numpy(host.ints))
    device.copy_in(state.floats, torch.from_numpy(host.floats))
    device.copy_in(state.x_t, torch.randn(state.x_t.shape, generator=torch.Generator().manual_seed(0)))
    guide: Any = None if guidance is None else guidance.guide
    chosen = update or update_for(network.device)
    program = StepProgram(device, state, manifest.config, manifest.diffusion.prediction, network, guide, chosen)
    variant = Variant(gradient=guide is not None, noise=placed.is_noisy)
    program.prepare(variant)
    return DeviceStep(program, variant)


@dataclass(frozen=True, slots=True, eq=False)
class _RecordedBound:
    bound: Bound
    recorder: PartRecorder
    part: str

    def enqueue(self, stream: Stream) -> None:
        with self.recorder.part(self.part):
            self.bound.enqueue(stream)

    def check_capturable(self, stream: Stream) -> None:
        self.bound.check_capturable(stream)


class _RecordedNetwork:
    """A Capturable whose bound calls are a part."""

    def __init__(self, network: Any, recorder: PartRecorder, part: str) -> None:
        self._network: Capturable = network
        self._recorder, self._part = recorder, part
        self.device, self.manifest = network.device, getattr(network, "manifest", None)
        self.config = getattr(network, "config", None)

    def fit(self, batch: int) -> int:
        return self._network.fit(batch)

    def bind(self, buffers: Mapping[str, Tensor]) -> Bound:
        return _RecordedBound(self._network.bind(buffers), self._recorder, self._part)


class _OneStream:
    """A device whose further streams are its main one, so that nothing runs beside anything else."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def stream(self) -> Stream:
        return self._device.main

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)


def recorded_device_step(
    device: Device, network: Network, kind: StepKind, batch: int, recorder: PartRecorder
) -> DeviceStep:
    """A step on a device with a recorder around network, gradient and update."""
    one: Any = _OneStream(device)
    guidance = network.guidance
    if guidance is not None:
        guide: Any = _RecordedNetwork(guidance.guide, recorder, "gradient")
        guidance = ClassifierGuidance(guide, guidance.scale, guidance.interval)
    table = kind.table(network.backend.manifest.diffusion)
    recorded = _RecordedNetwork(network.backend, recorder, "network")
    update = recorder.around("update", update_for(network.backend.device))
    return device_step(one, recorded, table, batch, guidance, update)
