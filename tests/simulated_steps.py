"""A machine on which time passes only in networks, so that a benchmark's verdicts do not depend on the real one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from benchmarks.core.measured_network import reference_network
from engine.backends.eager.eager_backend import EagerBackend
from engine.bundle.bundle_folder import Bundle
from engine.networks.inputs import UNCONDITIONED, Conditions

STEP_MS = 10.0


class SimulatedMachine:
    """Its speed drifts, and each call's time is noisy by 2 %."""

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self._now_ms = 0.0
        self._calls = 0

    def spend(self, ms: float) -> None:
        self._calls += 1
        drift = 1 + 0.1 * np.sin(self._calls / 40)
        self._now_ms += ms * drift * np.exp(0.02 * self._rng.standard_normal())

    def clock(self, work: Callable[[], object]) -> float:
        before = self._now_ms
        work()
        return self._now_ms - before

    def make_clock(self, _device: object) -> Callable[[Callable[[], object]], float]:
        return self.clock


def unspoilt(out: Tensor) -> Tensor:
    return out


class SimulatedBackend(EagerBackend):
    """The bundle's network as any backend; `slow` times as slow as others, its results through `spoil`."""

    def __init__(
        self,
        bundle: Bundle,
        machine: SimulatedMachine,
        name: str = "eager",
        precision: str = "fp32",
        slow: float = 1.0,
        spoil: Callable[[Tensor], Tensor] = unspoilt,
    ) -> None:
        super().__init__(bundle.manifest, reference_network(bundle), "fp32", None)
        self.name, self.precision = name, precision
        self._machine, self._slow, self._spoil = machine, slow, spoil

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        self._machine.spend(STEP_MS * self._slow * len(x_t))
        return self._spoil(super().__call__(x_t, timestep, conditions))


def opener_of(machine: SimulatedMachine, faults: Mapping[tuple[str, str], Mapping]) -> Callable:
    """In place of benchmarks.core.measured_network.open_variants: every variant of `faults`, with its faults."""

    def opener(bundle, names, threads):
        return {
            f"{name} {precision}": SimulatedBackend(bundle, machine, name, precision, **faults[name, precision])
            for name, precision in names
        }, ()

    return opener
