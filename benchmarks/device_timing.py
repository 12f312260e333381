"""Variants of operators too short for one clock reading: many calls in a row, as a graph where the device has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from benchmarks.timing import Clock, Variant, clock_for
from engine.device import CpuDevice, Device, cuda_device

TURN_MS = 1.0
"""Least time of one clock reading, as far as MOST_CALLS allows it."""
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
