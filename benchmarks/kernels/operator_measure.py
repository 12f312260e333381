"""Times and errors of one operator by every implementation of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.core.checks import error_of
from benchmarks.core.report import Check, Comparison, Row, Value
from benchmarks.core.stats import LEAST_ROUNDS, paired_ratio, spread
from benchmarks.core.timing import Series, interleave
from benchmarks.kernels.machine_limits import Limits
from benchmarks.kernels.providers import BASELINE, Provider
from benchmarks.kernels.shapes import Place, Shape
from export.verify import Difference

TOLERANCES = {
    # Sums of up to 5000 products in another order, and normals rounded to their neighbour: up to 1e-5 measured. TF32
    # in a product gives 2e-3.
    "fp32": 1e-4,
    # Results up to ten times the rms, rounded to 2^-11 of themselves, and operands in between: up to 1.4e-2 measured.
    "fp16": 5e-2,
    # As fp16, with 2^-8: up to 1.2e-1 measured.
    "bf16": 3e-1,
}
"""Largest error of any element, relative to the rms of the result. A wrong index or operand gives 1 and more."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Rounds of turns, and the seconds after which none begins."""

    rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Error:
    """The largest error of a provider at one shape, relative to the rms of the result; infinite for NaN."""

    provider: str
    operator: str
    precision: str
    where: str
    value: float


SETTLE_S = 0.03
"""Of an operator that takes microseconds: two threads that wake on one core take 16 ms until one of them is moved."""


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One operator at one shape, by every provider that has it."""

    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    errors: tuple[Error, ...]


def measure_case(
    network: str, shape: Shape, batch: int, place: Place, providers: Sequence[Provider], limits: Limits, budget: Budget
) -> Measured:
    """Errors first, then times in turns A B B A; ratios to the baseline."""
    precision = place.precision
    case: dict[str, Value] = {"network": network, "operator": shape.operator, "shape": shape.text}
    case |= {"batch": batch, "precision": precision}
    task = shape.task(batch, place)
    place.device.synchronize()
    works = {provider: work for provider in providers if (work := task.work(provider)) is not None}
    errors = {}
    for provider, work in works.items():
        with place.device.use(place.device.main):
            errors[provider.name] = _largest(error_of(work().float().cpu(), task.wanted))
    timed = interleave(
        [provider.variant(provider.name, work, place.device) for provider, work in works.items()],
        budget.rounds,
        warm_up=1,
        settle_s=SETTLE_S,
        budget_s=budget.seconds,
        least_rounds=LEAST_ROUNDS,
    )
    moved, flops = shape.moved_bytes(batch, place), shape.flops(batch)
    return Measured(
        tuple(
            Row(case | {"provider": name}, _metrics(series, moved, flops, precision, limits, errors[name]))
            for name, series in timed.items()
        ),
        tuple(
            Comparison(case, name, BASELINE, paired_ratio(series, timed[BASELINE]))
            for name, series in timed.items()
            if name != BASELINE and BASELINE in timed
        ),
        tuple(
            Error(name, shape.operator, precision, f"{network}, {shape.text}, batch {batch}", value)
            for name, value in errors.items()
        ),
    )


def _metrics(
    series: Series, moved_bytes: int, flops: int, precision: str, limits: Limits, error: float
) -> dict[str, float | None]:
    times = spread(series.all_ms)
    per_s = 1e3 / times.p50_ms
    return {
        "p50_ms": times.p50_ms,
        "p10_ms": times.p10_ms,
        "p90_ms": times.p90_ms,
        "moved_bytes": moved_bytes,
        "flops": flops,
        "gb_per_s": moved_bytes * per_s / 1e9,
        "gflop_per_s": flops * per_s / 1e9,
        "of_bandwidth": moved_bytes * per_s / limits.memory_bandwidth,
        "of_flops": flops * per_s / limits.flops[precision],
        "of_roof": limits.least_ms(moved_bytes, flops, precision) / times.p50_ms,
        "max_error": error,
    }


def _largest(error: Difference) -> float:
    value = error.max_abs / max(error.wanted_rms, 1e-30)
    return value if math.isfinite(value) else math.inf


def error_checks(errors: Iterable[Error]) -> list[Check]:
    """For each provider, operator and precision, that its worst shape is within the tolerance."""
    grouped: dict[tuple[str, str, str], list[Error]] = {}
    for error in errors:
        grouped.setdefault((error.provider, error.operator, error.precision), []).append(error)
    checks = []
    for (provider, operator, precision), found in grouped.items():
        worst, limit = max(found, key=lambda error: error.value), TOLERANCES[precision]
        checks.append(
            Check(
                f"{provider}: {operator} agrees with the fp32 reference within {precision}, {len(found)} shapes",
                worst.value <= limit,
                worst.value,
                limit,
                f"at {worst.where} an element is further off than rounding to {precision} explains; run this kernel's "
                "tests, and do not quote its time",
            )
        )
    return checks
