"""Spreads of times, and ratios of paired times with an interval that says how far they can be believed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from benchmarks.core.timing import Float64, Series

CONFIDENCE = 0.99
RESAMPLES = 4000
PLACEMENT = 0.03
"""Added to both sides of every interval: what one process cannot see of itself, such as where its memory lies. With it
52 of 53 ratios of steps were the same in two runs, twice, on two AVX-512 cores; with 0.01 it was 49."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles in ms. cv: coefficient of variation, standard deviation / mean. count: of times."""

    p10_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cv: float
    count: int

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def spread(times_ms: Float64) -> Spread:
    """The spread of times [N], N 1 or more."""
    p10, p50, p90, p99 = np.percentile(times_ms, [10, 50, 90, 99]).tolist()
    return Spread(p10, p50, p90, p99, float(times_ms.std() / times_ms.mean()), len(times_ms))


class Verdict(StrEnum):
    """What an interval of a ratio of times allows to say of its first variant."""

    FASTER = "faster"
    SLOWER = "slower"
    NONE = "no difference"


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time of one variant / time of another, with the interval in which it lies at this confidence."""

    value: float
    low: float
    high: float
    confidence: float
    rounds: int

    @property
    def verdict(self) -> Verdict:
        """No difference where the interval holds 1."""
        if self.low <= 1 <= self.high:
            return Verdict.NONE
        return Verdict.FASTER if self.high < 1 else Verdict.SLOWER


def paired_ratio(
    a: Series, b: Series, *, confidence: float = CONFIDENCE, seed: int = 0, between_runs: float = PLACEMENT
) -> Ratio:
    """Time of a / time of b: the median over rounds of their ratio in the round, two turns of each (A B B A).

    The interval is a moving-block bootstrap of that median (Künsch, 1989), blocks of the cube root of the number of
    rounds, since neighbouring rounds share the machine's mood; it is widened by between_runs on both sides. With n
    rounds no percentile of resampled medians lies outside the least and greatest ratio, which for n below 8 hold the
    median with less than this confidence, so fewer rounds than that raise ValueError.
    """
    logs = np.log(a.rounds_ms).mean(axis=1) - np.log(b.rounds_ms).mean(axis=1)
    low, high = bootstrap_median(logs, confidence, seed)
    margin = np.log1p(between_runs)
    return Ratio(
        value=float(np.exp(np.median(logs))),
        low=float(np.exp(low - margin)),
        high=float(np.exp(high + margin)),
        confidence=confidence,
        rounds=len(logs),
    )


LEAST_ROUNDS = 8
"""The least and greatest of n values hold the median with probability 1 - 2^(1 - n): 99.2 % for 8."""


def bootstrap_median(values: Float64, confidence: float, seed: int) -> tuple[float, float]:
    """The interval of the median of values [N] in time order; raises ValueError for fewer than LEAST_ROUNDS."""
    count = len(values)
    if count < LEAST_ROUNDS:
        raise ValueError(f"an interval needs {LEAST_ROUNDS} rounds or more, got {count}")
    length = max(1, round(count ** (1 / 3)))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, count - length + 1, size=(RESAMPLES, -(-count // length)))
    rows = (starts[:, :, None] + np.arange(length)).reshape(RESAMPLES, -1)[:, :count]
    medians = np.median(values[rows], axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(medians, [tail, 1 - tail]).tolist()
    return low, high
