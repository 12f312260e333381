"""The only timer: variants take turns A B B A, so that whatever drifts on the machine meets all of them alike."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from engine.device import CpuDevice, Device, cuda_device

Float64 = npt.NDArray[np.float64]


class Clock(Protocol):
    """Runs work once and says how many milliseconds it took."""

    def __call__(self, work: Callable[[], object]) -> float: ...


def wall_ms(work: Callable[[], object]) -> float:
    """Wall time of work that is finished when it returns."""
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1e6


def cuda_ms(work: Callable[[], object]) -> float:
    """Between two events on torch's current stream, on which work is enqueued; host time in between included."""
    stream: Any = torch.cuda.current_stream()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record(stream)
    work()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end)


def on_stream(stream: Any) -> Clock:
    """The clock of work that is enqueued on this stream of torch.cuda, whichever is current."""

    def clock(work: Callable[[], object]) -> float:
        with torch.cuda.stream(stream):
            return cuda_ms(work)

    return clock


def clock_for(device: torch.device) -> Clock:
    """The clock of what runs on a device."""
    return cuda_ms if device.type == "cuda" else wall_ms


def _nothing() -> None:
    """Done before work that needs nothing."""


def wait_until_quiet(limit_s: float = 0.15) -> None:
    """Wait until no thread of this process computes, at most limit_s seconds.

    Threads of some libraries spin for tens of milliseconds after their last work, at the cost of whoever comes next.
    """
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        before_s = time.process_time()
        time.sleep(_SLICE_S)
        if time.process_time() - before_s < _SLICE_S / 4:
            return


_SLICE_S = 0.004


@dataclass(frozen=True, slots=True)
class Variant:
    """One thing to time. work does the same each time it is called; prepare runs before each call and is not timed."""

    name: str
    work: Callable[[], object]
    clock: Clock = wall_ms
    prepare: Callable[[], object] = _nothing


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """What one variant took. first_ms: its first call; warm_up_ms: those after it that do not count.

    rounds_ms: [R, 2], in every round the turn on the way there and the one on the way back.
    """

    first_ms: float
    warm_up_ms: tuple[float, ...]
    rounds_ms: Float64

    @property
    def all_ms(self) -> Float64:
        """Every counted time, [2 R]."""
        return self.rounds_ms.reshape(-1)


def interleave(
    variants: Sequence[Variant],
    rounds: int,
    *,
    warm_up: int = 2,
    settle: int = 1,
    settle_s: float = 0.0,
    budget_s: float = math.inf,
    least_rounds: int = 4,
    title: str = "",
) -> dict[str, Series]:
    """Time variants in turn: A B C, then C B A, which is one round; results by name.

    A turn begins when the threads of the turn before sleep. settle: untimed calls at its start, which bring back what
    that drove from the caches; settle_s: they go on for so long, until threads have cores of their own. budget_s: after
    that many seconds no round begins, once there are least_rounds. Raises ValueError for names that are not unique.
    """
    names = [variant.name for variant in variants]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"variants need names of their own, got {names}")
    first = {v.name: _turn(v, 0) for v in variants}
    warm = {v.name: tuple(_turn(v, 0) for _ in range(warm_up)) for v in variants}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    end = time.monotonic() + budget_s
    for number in tqdm(range(rounds), title, disable=not sys.stderr.isatty(), leave=False):
        if number >= least_rounds and time.monotonic() > end:
            break
        there = [_turn(variant, settle, settle_s) for variant in variants]
        back = [_turn(variant, settle, settle_s) for variant in reversed(variants)][::-1]
        for name, pair in zip(names, zip(there, back, strict=True), strict=True):
            taken[name].append(pair)
    return {name: Series(first[name], warm[name], np.array(taken[name])) for name in names}


def _turn(variant: Variant, settle: int, settle_s: float = 0.0) -> float:
    wait_until_quiet()
    end, done = time.monotonic() + settle_s, 0
    while done < settle or (settle_s and time.monotonic() < end):
        variant.prepare()
        variant.work()
        done += 1
    variant.prepare()
    return variant.clock(variant.work)


TURN_MS = 1.0
"""Least time of one clock reading of a variant that per_call() makes, as far as MOST_CALLS allows it."""
MOST_CALLS = 200
_TRIALS = 3


def device_for(is_cuda: bool) -> Device:
    """The CUDA device, or the CPU. Raises BackendError where there is no GPU."""
    return cuda_device() if is_cuda else CpuDevice()


def per_call(name: str, work: Callable[[], object], device: Device) -> Variant:
    """A variant whose times are those of one call of work; on CUDA without the host's part, as in a captured step.

    work runs a few times at once: what is compiled or allocated on first use must not be captured.
    """
    # Operands may have been made on another stream.
    device.synchronize()
    clock = partial(_on_main, device, clock_for(device.kind))
    clock(work)
    quickest = min(clock(work) for _ in range(_TRIALS))
    calls = max(1, min(MOST_CALLS, math.ceil(TURN_MS / max(quickest, 1e-6))))

    def repeated() -> None:
        # Each result is dropped before the next is made, so that all lie in the same memory.
        for _ in range(calls):
            work()

    device.synchronize()
    graph = device.capture(repeated)
    return Variant(name, partial(device.replay, graph), _shared(clock, calls))


def _on_main(device: Device, clock: Clock, work: Callable[[], object]) -> float:
    with device.use(device.main):
        return clock(work)


def _shared(clock: Clock, calls: int) -> Clock:
    return lambda work: clock(work) / calls
