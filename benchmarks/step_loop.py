"""Full slots that can be stepped for ever: what step_latency times, and what peak_memory runs in a child."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.backends.protocol import Backend, is_capturable
from engine.backends.registry import open_guide
from engine.bundle.folder import Bundle
from engine.device import Device
from engine.diffusion.guidance import ClassifierGuidance
from engine.diffusion.noise import NoiseSource, normal
from engine.diffusion.prediction import Diffusion
from engine.diffusion.solvers import StepTable, ddim_table, ddpm_table
from engine.errors import RequestError
from engine.networks.config import LabelInput, UNetConfig
from engine.networks.inputs import Conditions
from engine.sampling.fused_update import update_for
from engine.sampling.graph_slots import GraphSlots
from engine.sampling.requests import ImageGuidance, Request
from engine.sampling.slot_batch import SlotBatch, Step
from engine.sampling.slots import Slots
from kernels.reference import solver_update

SAMPLERS: dict[str, Callable[[Diffusion, int], StepTable]] = {"ddpm": ddpm_table, "ddim": ddim_table}

SolverUpdate = Callable[..., tuple[Tensor, Tensor]]
"""kernels.reference.solver_update, or what measures it."""


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

    def table(self, diffusion: Diffusion) -> StepTable:
        """Raises RequestError for a number of steps that the schedule does not have."""
        return SAMPLERS[self.sampler](diffusion, self.steps)


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A variant that is open: its network, and the guidance of its steps if they are guided."""

    backend: Backend
    guidance: ClassifierGuidance | None = None

    @property
    def is_on_device(self) -> bool:
        """Whether its steps are replays of a CUDA graph; engine.sampling.pool.SlotPool decides in the same way."""
        guide = None if self.guidance is None else self.guidance.guide
        return is_capturable(self.backend) and (guide is None or is_capturable(guide))


def with_guidance(bundle: Bundle, backend: Backend, kind: StepKind, threads: int | None) -> Network:
    """The network for steps of this kind; raises BundleError where they are guided and there is no classifier."""
    if not kind.guided:
        return Network(backend)
    return Network(backend, ClassifierGuidance(open_guide(bundle, backend.name, backend.precision, threads, backend)))


class SlotLoop:
    """Slots that are full whenever they step: refill() puts new images where others were finished.

    table: of every image. guidance: of every image, None for none.
    """

    def __init__(
        self, slots: SlotBatch, config: UNetConfig, table: StepTable, guidance: ClassifierGuidance | None
    ) -> None:
        self._slots, self._config, self._table, self._guidance = slots, config, table, guidance
        self._entered = 0
        self._latest: list[Step] = []

    def refill(self) -> None:
        """Every image has a seed of its own, and labels in turn."""
        for slot in self._slots.free:
            self._slots.enter(slot, self._request(self._entered))
            self._entered += 1

    def step(self) -> None:
        """One step of all slots; raises RequestError where refill() was not called before."""
        if self._slots.free:
            raise RequestError("a slot is empty; refill the slots before a step")
        self._latest = self._slots.step()

    def is_finite(self) -> bool:
        """Whether the images of the last step hold no NaN or infinity."""
        return all(bool(torch.isfinite(step.x_prev).all()) for step in self._latest)

    def _request(self, index: int) -> Request:
        config, guidance = self._config, self._guidance
        label: Tensor | None = None
        if config.label is LabelInput.VECTOR:
            label = torch.from_numpy(normal([index], [0], (config.time_channels,)))
        elif config.num_classes is not None:
            is_class = config.label is LabelInput.TABLE
            label = torch.tensor([index % config.num_classes], dtype=torch.int64 if is_class else torch.float32)
        image = None
        if config.cond_channels and not config.self_condition:
            image = torch.from_numpy(normal([index], [0], (config.cond_channels, *config.image_size))).clamp(-1, 1)
        pull = None
        if guidance is not None:
            pull = ImageGuidance(index % guidance.guide.config.num_classes, guidance.scale, guidance.interval)
        return Request(index, self._table, seed=index, conditions=Conditions(label, image), guidance=pull)


def slot_loop(
    network: Network,
    kind: StepKind,
    batch: int,
    device: Device | None,
    noise: NoiseSource = normal,
    update: SolverUpdate = solver_update,
) -> SlotLoop:
    """Slots as engine.sampling.sampler would take them. device: for a network that is on one; noise and update do not
    apply.
    """
    backend, guidance = network.backend, network.guidance
    guide = None if guidance is None else guidance.guide
    slots: SlotBatch
    if device is None:
        slots = Slots(backend, batch, guide, noise, update)
    else:
        # Only for networks that are on a device, which can be captured: see Network.
        slots = GraphSlots(device, backend.manifest, backend, batch, guide, update=update_for(backend.device))  # type: ignore[arg-type]
    return SlotLoop(slots, backend.manifest.config, kind.table(backend.manifest.diffusion), guidance)
