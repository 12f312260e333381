"""Full slots that can be stepped for ever: what step_latency times, and what peak_memory runs in a child."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.core.measured_network import RealInputs
from engine.backends.protocol import is_capturable
from engine.device import Device, cuda_device
from engine.diffusion.guidance import ClassifierGuidance
from engine.diffusion.noise import normal
from engine.errors import RequestError
from engine.networks.config import LabelInput, UNetConfig
from engine.sampling.requests import Request
from engine.sampling.sampler import Sampler
from engine.sampling.slot_batch import SlotBatch, Step

SAMPLERS = ("ddpm", "ddim")


@dataclass(frozen=True, slots=True)
class StepKind:
    """What a step is: a row of a named sampler's table of this many steps, with or without classifier guidance."""

    sampler: str = "ddpm"
    steps: int = 50
    guided: bool = False

    @property
    def name(self) -> str:
        """As the cases of a report say it."""
        return f"{self.sampler} guided" if self.guided else self.sampler


@dataclass(frozen=True, slots=True, eq=False)
class StepNetwork:
    """A variant that is open: its sampler, and the guidance of its steps if they are guided."""

    sampler: Sampler
    guidance: ClassifierGuidance | None = None

    @property
    def device(self) -> Device | None:
        """Where its steps are replays of a graph, None for steps on the host; as Sampler.slots decides."""
        guide = None if self.guidance is None else self.guidance.guide
        is_on_device = is_capturable(self.sampler.backend) and (guide is None or is_capturable(guide))
        return cuda_device() if is_on_device else None


class SlotLoop:
    """Slots that are full whenever they step: refill() begins images anew where others were finished."""

    def __init__(self, slots: SlotBatch, requests: list[Request]) -> None:
        self._slots, self._requests = slots, requests
        self._latest: list[Step] = []

    def refill(self) -> None:
        """Each empty slot gets its image again, from the start."""
        for slot in self._slots.free:
            self._slots.enter(slot, self._requests[slot])

    def step(self) -> None:
        """One step of all slots; raises RequestError where refill() was not called before."""
        if self._slots.free:
            raise RequestError("a slot is empty; refill the slots before a step")
        self._latest = self._slots.step()

    def is_finite(self) -> bool:
        """Whether the images of the last step hold no NaN or infinity."""
        return all(bool(torch.isfinite(step.x_prev).all()) for step in self._latest)


@contextmanager
def slot_loop(network: StepNetwork, kind: StepKind, batch: int) -> Iterator[SlotLoop]:
    """Slots for a batch of images with seeds of their own, labels in turn and condition images of noise."""
    sampler = network.sampler
    requests = sampler.requests(
        batch,
        sampler=kind.sampler,
        steps=kind.steps,
        labels=_labels(sampler.config, network.guidance, batch),
        guidance=network.guidance,
        image=_condition(sampler.config, batch),
    )
    guide = None if network.guidance is None else network.guidance.guide
    with sampler.slots(batch, guide) as slots:
        yield SlotLoop(slots, requests)


def _labels(
    config: UNetConfig, guidance: ClassifierGuidance | None, batch: int
) -> list[int] | list[list[float]] | None:
    if config.label is LabelInput.VECTOR:
        vectors: list[list[float]] = normal(range(batch), [0] * batch, (config.label_channels,)).tolist()
        return vectors
    count = config.num_classes if guidance is None else guidance.guide.config.num_classes
    return None if count is None else [image % count for image in range(batch)]


def _condition(config: UNetConfig, batch: int) -> Tensor | None:
    if not config.cond_channels or config.self_condition:
        return None
    return torch.from_numpy(normal(range(batch), [0] * batch, (config.cond_channels, *config.image_size))).clamp(-1, 1)


def network_call(network: StepNetwork, inputs: RealInputs, batch: int) -> Callable[[], object]:
    """A bare call of the network on real inputs, as a step makes it: a graph's replay where steps are replays."""
    backend, device = network.sampler.backend, network.device
    if device is None:
        case = inputs.first(batch)
        return lambda: backend(case.x_t, case.timestep, case.conditions)
    size = backend.fit(batch)  # type: ignore[attr-defined]
    buffers = {}
    for name, value in (inputs.first(size).tensors() | {"out": inputs.first_wanted(size)}).items():
        buffers[name] = device.allocate(tuple(value.shape), value.dtype)
        device.copy_in(buffers[name], value)
    bound = backend.bind(buffers)  # type: ignore[attr-defined]

    def enqueue() -> None:
        bound.enqueue(device.main)

    enqueue()
    device.synchronize()
    graph = device.capture(enqueue)
    return lambda: device.replay(graph)
