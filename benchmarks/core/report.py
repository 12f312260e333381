"""What every benchmark writes: one JSON form (schema.json), with checks that turn it red.

A red report is written like any other; the command then exits with EXIT_RED.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.core.stats import Ratio
from engine.errors import BundleError
from engine.files import atomic_path

SCHEMA_VERSION = 1
EXIT_RED = 1
Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Row:
    """case: what was measured, e.g. variant and batch. metrics: name with its unit -> number, None where unknown."""

    case: Mapping[str, Value]
    metrics: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """variant's time / baseline's, in the same rounds. case: what both have in common, e.g. the batch."""

    case: Mapping[str, Value]
    variant: str
    baseline: str
    ratio: Ratio

    @property
    def key(self) -> tuple[object, ...]:
        """What is the same in another run of the same benchmark."""
        return (tuple(sorted(self.case.items())), self.variant, self.baseline)

    def to_dict(self) -> dict[str, Any]:
        named = {"case": dict(self.case), "variant": self.variant, "baseline": self.baseline}
        return named | {"ratio": dataclasses.asdict(self.ratio), "verdict": str(self.ratio.verdict)}


@dataclass(frozen=True, slots=True)
class Check:
    """Something that must hold. value and limit: numbers behind it, where it has them. remedy: what to do if not."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """A variant that was not measured, and why."""

    variant: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """One run of one benchmark. subject: what network it measured. settings: what its options were."""

    benchmark: str
    command: str
    environment: Mapping[str, Any]
    subject: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    comparisons: Sequence[Comparison] = ()
    checks: Sequence[Check] = ()
    missing: Sequence[Missing] = ()
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def is_red(self) -> bool:
        return not all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form that schema.json describes."""
        return {
            "schema_version": SCHEMA_VERSION,
            "benchmark": self.benchmark,
            "command": self.command,
            "date": self.date,
            "environment": dict(self.environment),
            "subject": dict(self.subject),
            "settings": dict(self.settings),
            "rows": [
                {"case": dict(row.case), "metrics": {name: _finite(value) for name, value in row.metrics.items()}}
                for row in self.rows
            ],
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "checks": [dataclasses.asdict(check) | {"value": _finite(check.value)} for check in self.checks],
            "missing": [dataclasses.asdict(each) for each in self.missing],
            "passed": not self.is_red,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Raises KeyError or TypeError for what to_dict did not write."""
        names = ("benchmark", "command", "environment", "subject", "settings", "date")
        return cls(
            **{name: data[name] for name in names},
            rows=[Row(**row) for row in data["rows"]],
            comparisons=[
                Comparison(c["case"], c["variant"], c["baseline"], Ratio(**c["ratio"])) for c in data["comparisons"]
            ],
            checks=[Check(**check) for check in data["checks"]],
            missing=[Missing(**each) for each in data["missing"]],
        )

    def save(self, path: Path) -> None:
        """Write the JSON file, whole or not at all."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity; a check that met one failed, and says so."""
    return value if value is None or math.isfinite(value) else None


def read_report(path: Path) -> Report:
    """The report in a JSON file; raises BundleError for a file that holds none, or one of another version."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema_version"] != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {data['schema_version']}, this version reads {SCHEMA_VERSION}; "
                "run the benchmark again"
            )
        return Report.from_dict(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{path} is no benchmark report ({error!r}); pass a JSON file that a benchmark wrote"
        ) from error


def check_text(check: Check) -> str:
    """One line; a check that failed ends with its remedy."""
    numbers = f" ({number(check.value)}, limit {number(check.limit)})" if check.limit is not None else ""
    ending = "" if check.passed or not check.remedy else f"; {check.remedy}"
    return f"{'passed' if check.passed else 'FAILED'}: {check.name}{numbers}{ending}"


def case_text(case: Mapping[str, Value]) -> str:
    """A case on one line; what a comparison's case holds, both of its variants have in common."""
    return " ".join(f"{name}={value}" for name, value in case.items() if value is not None)


def number(value: float | None) -> str:
    """A number in a table, four digits; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e6):
        return f"{value:.0f}"
    return f"{value:.4g}"
