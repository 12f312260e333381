"""What is measured at one batch: whole steps beside bare network calls, and the error beside fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.core.measured_network import RealInputs
from benchmarks.core.stats import LEAST_ROUNDS, spread
from benchmarks.core.timing import Clock, Series, Variant, interleave, on_stream, wall_ms
from benchmarks.steps.slot_loop import StepKind, StepNetwork, network_call, slot_loop
from engine.device import Device
from export.verify import Difference

STEP_LIMIT_MS = 10_000.0
"""A batch of which one step takes longer is left out, and so are all larger ones."""

SETTLE_BELOW_MS = 200.0
"""Turns of quicker steps begin with one that is not timed; in a longer one, what the turn before left is lost: caches
are filled and another library's threads stop waiting for work within a few ms."""

_WARM_UP = 2

MakeClock = Callable[[Device | None], Clock]


def clock_of(device: Device | None) -> Clock:
    """The clock of work on a device, None for work that is finished when it returns."""
    return wall_ms if device is None else on_stream(device.main)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One batch; everything by variant. steps, networks: times of whole steps, and of the network's bare calls.

    errors: of the network's output beside fp32. finite: whether the images are.
    """

    batch: int
    steps: Mapping[str, Series]
    networks: Mapping[str, Series]
    errors: Mapping[str, Difference]
    finite: Mapping[str, bool]

    @property
    def medians_ms(self) -> dict[str, float]:
        """Of each variant's step."""
        return {name: spread(series.all_ms).p50_ms for name, series in self.steps.items()}


def measure_batch(
    networks: Mapping[str, StepNetwork],
    kind: StepKind,
    batch: int,
    inputs: RealInputs,
    rounds: int,
    budget_s: float,
    settle: int = 1,
    make_clock: MakeClock = clock_of,
) -> Measured:
    """Every variant at this batch, for about budget_s seconds but LEAST_ROUNDS rounds or more.

    settle: calls at the start of a turn that are not timed.
    """
    with ExitStack() as stack:
        loops = {name: stack.enter_context(slot_loop(each, kind, batch)) for name, each in networks.items()}
        variants = []
        for name, each in networks.items():
            clock = make_clock(each.device)
            variants.append(Variant(name, loops[name].step, clock, loops[name].refill))
            variants.append(Variant(f"{name} network", network_call(each, inputs, batch), clock))
        series = interleave(
            variants,
            rounds,
            warm_up=_WARM_UP,
            settle=settle,
            budget_s=budget_s,
            least_rounds=LEAST_ROUNDS,
            title=f"batch {batch}",
        )
        return Measured(
            batch,
            {name: series[name] for name in networks},
            {name: series[f"{name} network"] for name in networks},
            {name: _error(each, inputs, batch) for name, each in networks.items()},
            {name: loop.is_finite() for name, loop in loops.items()},
        )


def _error(network: StepNetwork, inputs: RealInputs, batch: int) -> Difference:
    backend, difference = network.sampler.backend, Difference()
    case = inputs.first(batch).to(backend.device)
    difference.add(backend(case.x_t, case.timestep, case.conditions).cpu(), inputs.first_wanted(batch))
    return difference


def settle_calls(batch: int, last: Measured | None) -> int:
    """Calls at the start of a turn that are not to be timed, 0 or 1, from what the batch before took."""
    return 1 if last is None else int(min(last.medians_ms.values()) * batch / last.batch < SETTLE_BELOW_MS)


def reason_against(batch: int, last: Measured | None, seconds_left: float) -> str | None:
    """Why a batch, larger than the last, is left out; None for the first and for one that fits the time."""
    if last is None:
        return None
    factor, medians = batch / last.batch, last.medians_ms.values()
    slowest = factor * max(medians)
    if slowest > STEP_LIMIT_MS:
        return f"a step would take about {slowest / 1e3:.1f} s, and the limit is {STEP_LIMIT_MS / 1e3:.0f} s"
    # A step and a network call in each turn, there and back, and what warms them up.
    calls = 2 * (2 * (1 + settle_calls(batch, last)) * LEAST_ROUNDS + 1 + _WARM_UP)
    least_s, left_s = factor * sum(medians) * calls / 1e3, max(seconds_left, 0.0)
    if least_s > left_s:
        return f"{LEAST_ROUNDS} rounds would take about {least_s:.0f} s of {left_s:.0f} s left; give more --seconds"
    return None
