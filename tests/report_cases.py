"""Reports that the tests of benchmarks share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.core import harness
from benchmarks.core.environment import environment
from benchmarks.core.report import Check, Comparison, Missing, Report, Row
from benchmarks.core.stats import Ratio
from benchmarks.core.timing import Series

SCHEMA = json.loads((Path(harness.__file__).parent / "schema.json").read_text())


def check_schema(data: dict) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(SCHEMA).validate(data)


def simulated(rounds: int, seed: int, slow: float = 1.0) -> tuple[Series, Series]:
    """Two series on a machine whose speed drifts by half, with neighbours that double one time in ten."""
    rng = np.random.default_rng(seed)
    drift = 1 + 0.5 * np.sin(np.arange(4 * rounds) / 15 + rng.uniform(0, 6))
    busy = np.where(rng.random(4 * rounds) < 0.1, 2.0, 1.0)
    times = 10 * drift * busy * np.exp(0.03 * rng.standard_normal(4 * rounds))
    a, b = times.reshape(-1, 4)[:, [0, 3]], times.reshape(-1, 4)[:, [1, 2]]
    return Series(1.0, (), a * slow), Series(1.0, (), b)


def make_report(checks: tuple[Check, ...] = ()) -> Report:
    ratio = Ratio(1.5, 1.4, 1.6, 0.99, 20)
    return Report(
        benchmark="step_latency",
        command="python -m benchmarks.step_latency x.engine",
        environment=environment(2),
        subject={"name": "x"},
        settings={"rounds": 20},
        rows=[Row({"variant": "ov fp32", "batch": 1}, {"p50_ms": 1.5, "p99_ms": None})],
        comparisons=[Comparison({"batch": 1}, "ov fp32", "ort fp32", ratio)],
        checks=checks,
        missing=[Missing("trt fp16", "no plan")],
    )
