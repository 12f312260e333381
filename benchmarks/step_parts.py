"""The split of a step into network, gradient, update, noise and the host's work, by recorders around the parts.

The parts follow one another; what they leave of a step is the host's: gathering slots, making tensors, bookkeeping.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from benchmarks.step_loop import Network, SlotLoop, StepKind, slot_loop
from engine.backends.protocol import Backend
from engine.diffusion.guidance import ClassifierGuidance, Guide
from engine.diffusion.noise import normal
from engine.networks.config import ClassifierConfig
from engine.networks.inputs import UNCONDITIONED, Conditions
from kernels.reference import solver_update

P = ParamSpec("P")
T = TypeVar("T")


class Marks(Protocol):
    """Points in time and what lies between two of them."""

    def now(self) -> Any: ...

    def between_ms(self, start: Any, end: Any) -> float: ...


class WallMarks:
    """Of work that is finished when it returns."""

    def now(self) -> int:
        return time.perf_counter_ns()

    def between_ms(self, start: int, end: int) -> float:
        return (end - start) / 1e6


@dataclass(frozen=True, slots=True)
class CudaMarks:
    """Events on a stream of torch.cuda."""

    stream: Any

    def now(self) -> Any:
        event: Any = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def between_ms(self, start: Any, end: Any) -> float:
        end.synchronize()
        return start.elapsed_time(end)


@dataclass(frozen=True, slots=True)
class Split:
    """Medians over steps in ms, None for a part that these steps do not have; host_ms: whole less parts, step by step.

    A part that some steps lack, such as the noise of the last one, counts as 0 in those.
    """

    network_ms: float | None
    gradient_ms: float | None
    update_ms: float | None
    noise_ms: float | None
    host_ms: float

    def to_dict(self) -> dict[str, float | None]:
        return dataclasses.asdict(self)


class PartRecorder:
    """A benchmarks.timing.Clock that also keeps what the recorded parts of the work took."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks
        self._spans: list[tuple[str, Any, Any]] = []
        self._steps: list[tuple[float, dict[str, float]]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to this part; parts do not overlap."""
        start = self._marks.now()
        yield
        self._spans.append((name, start, self._marks.now()))

    def around(self, name: str, function: Callable[P, T]) -> Callable[P, T]:
        """The function, recorded."""

        def recorded(*args: P.args, **kwargs: P.kwargs) -> T:
            with self.part(name):
                return function(*args, **kwargs)

        return recorded

    def __call__(self, work: Callable[[], object]) -> float:
        """Run a step and return its whole time in ms."""
        self._spans.clear()
        start = self._marks.now()
        work()
        whole = self._marks.between_ms(start, self._marks.now())
        taken: dict[str, float] = {}
        for name, begin, end in self._spans:
            taken[name] = taken.get(name, 0.0) + self._marks.between_ms(begin, end)
        self._steps.append((whole, taken))
        return whole

    def split(self, steps: int) -> Split:
        """Of the last `steps` steps, 1 or more."""
        counted = self._steps[-steps:]

        def median(name: str) -> float | None:
            if not any(name in taken for _, taken in counted):
                return None
            return float(np.median([taken.get(name, 0.0) for _, taken in counted]))

        host = [whole - sum(taken.values()) for whole, taken in counted]
        return Split(
            network_ms=median("network"),
            gradient_ms=median("gradient"),
            update_ms=median("update"),
            noise_ms=median("noise"),
            host_ms=float(np.median(host)),
        )


class RecordedBackend:
    """A backend whose calls are the part "network"; see engine.backends.protocol.Backend."""

    def __init__(self, backend: Backend, recorder: PartRecorder) -> None:
        self.name, self.precision = backend.name, backend.precision
        self.device, self.manifest = backend.device, backend.manifest
        self.close = backend.close
        self._call = recorder.around("network", backend.__call__)

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        return self._call(x_t, timestep, conditions)


class RecordedGuide:
    """A guide whose calls are the part "gradient"; see engine.diffusion.guidance.Guide."""

    def __init__(self, guide: Guide, recorder: PartRecorder) -> None:
        self._config = guide.config
        self._call = recorder.around("gradient", guide.__call__)

    @property
    def config(self) -> ClassifierConfig:
        return self._config

    def __call__(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return self._call(x_t, timestep, label, scale)


def recorded_loop(network: Network, kind: StepKind, batch: int, recorder: PartRecorder) -> SlotLoop:
    """The slots of a CPU with a recorder around every part."""
    guidance = network.guidance
    if guidance is not None:
        guidance = ClassifierGuidance(RecordedGuide(guidance.guide, recorder), guidance.scale, guidance.interval)
    recorded = Network(RecordedBackend(network.backend, recorder), guidance)
    noise, update = recorder.around("noise", normal), recorder.around("update", solver_update)
    return slot_loop(recorded, kind, batch, None, noise, update)
