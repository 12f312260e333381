"""The picture of quality against speed: a line for each variant, a point for each number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.plots import COLOURS, figure
from benchmarks.report import Report, Row

LABELS = {
    "frechet": "Fréchet distance to the training digits",
    "fid": "FID",
    "psnr_db": "PSNR beside fp32, dB",
    "accuracy": "read as their label",
    "inception_score": "Inception Score",
}
LEFT, RIGHT = ("frechet", "fid", "psnr_db"), ("accuracy", "inception_score", "psnr_db")
MARKERS = "osD^vPX*<>"
REAL = "real images"
"""The variant of rows about real images."""


def draw(report: Report, path: Path) -> None:
    """Write the picture: one panel for each figure that the rows hold of LEFT's first and RIGHT's first."""
    rows = [row for row in report.rows if row.case["measured"] == "samples"]
    made = [row for row in rows if row.metrics.get("images_per_s") is not None]
    chosen = [next((name for name in names if _has(made, name)), None) for names in (LEFT, RIGHT)]
    panels = list(dict.fromkeys(name for name in chosen if name is not None)) or ["psnr_db"]
    real = next((row for row in rows if row.case["variant"] == REAL), None)
    with figure(path, columns=len(panels), width=6.0 * len(panels), height=5.0) as axes:
        for axis, name in zip(axes.flat if len(panels) > 1 else [axes], panels, strict=True):
            _panel(axis, name, made, real)
        first = axes.flat[0] if len(panels) > 1 else axes
        first.figure.suptitle(f"{report.subject['name']}, {report.settings['sampler']}: number of steps at each point")
        handles, labels = first.get_legend_handles_labels()
        if handles:
            first.figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def _ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers from low to high and their texts: 1, 2 and 5 of each decade, or all digits where those are few."""
    for digits in ((1, 2, 5), range(1, 10)):
        ticks = [
            digit * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
            for digit in digits
            if low <= digit * 10.0**power <= high
        ]
        if len(ticks) > 2:
            break
    return ticks, [f"{tick:g}" for tick in ticks]


def _has(rows: Sequence[Row], name: str) -> bool:
    return any(row.metrics.get(name) is not None for row in rows)


def _panel(axis: Any, name: str, rows: Sequence[Row], real: Row | None) -> None:
    variants = list(dict.fromkeys(row.case["variant"] for row in rows))
    for number, variant in enumerate(variants):
        points = [
            (row.metrics["images_per_s"], value, row.case["steps"])
            for row in rows
            if row.case["variant"] == variant and (value := row.metrics.get(name)) is not None
        ]
        style = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], label=variant, markersize=6, **style)
        for x, y, steps in points:
            axis.annotate(
                str(steps), (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8, color=style["color"]
            )
    floor = real.metrics.get(name) if real is not None else None
    if floor is not None:
        axis.axhline(floor, linestyle="--", color="black", linewidth=1, label=REAL)
    axis.margins(x=0.12, y=0.12)
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(*_ticks(*axis.get_xlim()))
    axis.set_xlabel("images/s (log)")
    axis.set_ylabel(LABELS[name])
    if name == "accuracy":
        axis.yaxis.set_major_formatter("{x:.1%}")
