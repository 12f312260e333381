"""What is measured at one batch: whole steps, their split, the error beside fp32; and which batch is too large."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peak_memory import resident_bytes
from benchmarks.stats import LEAST_ROUNDS, spread
from benchmarks.step_device import recorded_device_step
from benchmarks.step_loop import Network, StepKind, slot_loop
from benchmarks.step_parts import CudaMarks, Marks, PartRecorder, Split, WallMarks, recorded_loop
from benchmarks.subject import RealInputs
from benchmarks.timing import Clock, Series, Variant, interleave, on_stream, wall_ms
from engine.device import Device, cuda_device
from export.verify import Difference

STEP_LIMIT_MS = 10_000.0
"""A batch of which one step takes longer is left out, and so are all larger ones."""

SETTLE_BELOW_MS = 200.0
"""Turns of quicker steps begin with one that is not timed; in a longer one, what the turn before left is lost: caches
are filled and another library's threads stop waiting for work within a few ms."""

_WARM_UP = 2
_SPLIT_SHARE = 0.25
_LEAST_SPLIT_ROUNDS = 3
_MEMORY_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Timers:
    """How a step is timed, whole and split: device None for one that is finished when it returns."""

    clock: Callable[[Device | None], Clock]
    marks: Callable[[Device | None], Marks]


def _clock(device: Device | None) -> Clock:
    return wall_ms if device is None else on_stream(device.main)


def _marks(device: Device | None) -> Marks:
    return WallMarks() if device is None else CudaMarks(device.main)


REAL_TIMERS = Timers(_clock, _marks)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One batch; everything by variant. errors: of the network's output beside fp32. finite: its images are."""

    batch: int
    series: Mapping[str, Series]
    splits: Mapping[str, Split]
    errors: Mapping[str, Difference]
    finite: Mapping[str, bool]

    @property
    def medians_ms(self) -> tuple[float, ...]:
        """Of each variant's step."""
        return tuple(spread(series.all_ms).p50_ms for series in self.series.values())


def measure_batch(
    networks: Mapping[str, Network],
    kind: StepKind,
    batch: int,
    inputs: RealInputs,
    rounds: int,
    budget_s: float,
    settle: int = 1,
    timers: Timers = REAL_TIMERS,
) -> Measured:
    """Every variant at this batch, for about budget_s seconds but LEAST_ROUNDS rounds or more.

    settle: steps at the start of a turn that are not timed.
    """
    devices = {name: cuda_device() if network.is_on_device else None for name, network in networks.items()}
    loops = {name: slot_loop(network, kind, batch, devices[name]) for name, network in networks.items()}
    end = time.monotonic() + budget_s
    series = interleave(
        [Variant(name, loop.step, timers.clock(devices[name]), loop.refill) for name, loop in loops.items()],
        rounds,
        warm_up=_WARM_UP,
        settle=settle,
        budget_s=budget_s * (1 - _SPLIT_SHARE),
        least_rounds=LEAST_ROUNDS,
        title=f"batch {batch}",
    )
    recorders = {name: PartRecorder(timers.marks(devices[name])) for name in networks}
    recorded = [_recorded(name, networks[name], kind, batch, devices[name], recorders[name]) for name in networks]
    taken = interleave(
        recorded,
        rounds,
        warm_up=_WARM_UP,
        settle=settle,
        budget_s=end - time.monotonic(),
        least_rounds=_LEAST_SPLIT_ROUNDS,
        title=f"batch {batch}, split",
    )
    splits = {name: recorders[name].split(taken[name].rounds_ms.size) for name in networks}
    finite = {name: loop.is_finite() for name, loop in loops.items()}
    return Measured(batch, series, splits, {n: _error(networks[n], inputs, batch) for n in networks}, finite)


def _recorded(
    name: str, network: Network, kind: StepKind, batch: int, device: Device | None, recorder: PartRecorder
) -> Variant:
    """A variant whose clock is the recorder."""
    if device is None:
        loop = recorded_loop(network, kind, batch, recorder)
        return Variant(name, loop.step, recorder, loop.refill)
    return Variant(name, recorded_device_step(device, network, kind, batch, recorder).enqueue, recorder)


def _error(network: Network, inputs: RealInputs, batch: int) -> Difference:
    case = inputs.first(batch).to(network.backend.device)
    out = network.backend(case.x_t, case.timestep, case.conditions)
    difference = Difference()
    difference.add(out.cpu(), inputs.first_wanted(batch))
    return difference


@dataclass(slots=True)
class Growth:
    """Watches what batches cost, and says when the next would cost too much."""

    before_bytes: int
    last: Measured | None = None
    grown_bytes: int = 0

    def add(self, measured: Measured, peak_bytes: int) -> None:
        """peak_bytes: of this process, after the batch."""
        self.grown_bytes = peak_bytes - self.before_bytes
        self.before_bytes, self.last = peak_bytes, measured

    def settle(self, batch: int) -> int:
        """Steps at the start of a turn that are not to be timed: 0 or 1."""
        if self.last is None:
            return 1
        return int(min(self.last.medians_ms) * batch / self.last.batch < SETTLE_BELOW_MS)

    def reason_against(self, batch: int, seconds_left: float, available_bytes: int | None) -> str | None:
        """Why a batch, larger than those before, is left out; None for the first and for one that fits."""
        if self.last is None:
            return None
        factor = batch / self.last.batch
        slowest = factor * max(self.last.medians_ms)
        if slowest > STEP_LIMIT_MS:
            return f"a step would take about {slowest / 1e3:.1f} s, and the limit is {STEP_LIMIT_MS / 1e3:.0f} s"
        calls = 2 * (1 + self.settle(batch)) * LEAST_ROUNDS + 1 + _WARM_UP
        least_s, left_s = factor * sum(self.last.medians_ms) * calls / 1e3, max(seconds_left, 0.0)
        if least_s > left_s:
            return f"{LEAST_ROUNDS} rounds would take about {least_s:.0f} s of {left_s:.0f} s left; give more --seconds"
        needed = factor * self.grown_bytes
        if available_bytes is not None and needed > _MEMORY_SHARE * available_bytes:
            return f"it would need about {needed / 2**30:.1f} GiB more, and {available_bytes / 2**30:.1f} GiB are free"
        return None


def start_growth() -> Growth:
    """Before the first batch."""
    return Growth(resident_bytes())


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory that a process can still have, None where the system does not say."""
    if not meminfo.exists():
        return None
    lines = (line.split() for line in meminfo.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), None)
