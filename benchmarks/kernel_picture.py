"""The picture of the kernels' report: a roofline, and how near each implementation comes to it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.plots import COLOURS, bars, figure
from benchmarks.report import Report, Row

MARKERS = "osD^vPX"


def draw(report: Report, path: Path) -> None:
    """A point for every row below the machine's limits; beside it each provider's median of of_roof."""
    rows = [row for row in report.rows if row.case["network"] is not None]
    found: dict[str, list[float]] = {}
    for row in rows:
        name = f"{row.case['operator']}: {row.case['provider']}"
        found.setdefault(name, []).append(100 * float(row.metrics["of_roof"] or 0))
    with figure(path, columns=2, width=13.0, height=2.5 + max(3.0, 0.3 * len(found))) as (roofline, fractions):
        _draw_limits(roofline, report, rows)
        _draw_points(roofline, rows)
        roofline.set(xscale="log", yscale="log", xlabel="FLOPs / byte moved", ylabel="GFLOP/s")
        roofline.legend(fontsize=8, loc="lower right")
        roofline.set_title(describe(dict(report.environment)), fontsize=8)
        values = [statistics.median(each) for each in found.values()]
        bars(fractions, list(found), values, "% of what this machine can do, median over shapes", lower_is_better=False)
        fractions.set_title("least time by the machine's measured limits / time", fontsize=8)


def _draw_limits(axes: Any, report: Report, rows: Sequence[Row]) -> None:
    """min(bandwidth * intensity, FLOP/s) of memory and of the fastest cache, for every precision met."""
    met = {row.case["precision"] for row in rows}
    ends = [_intensity(row) for row in rows]
    low, high = min(ends) / 2, max(ends) * 2
    grid = [low * (high / low) ** (i / 60) for i in range(61)]
    memory = report.settings["memory_bytes_per_s"] / 1e9
    cache = max(report.settings["bytes_per_s_by_size"].values()) / 1e9
    peaks = {name: flops / 1e9 for name, flops in report.settings["flop_per_s"].items() if name in met}
    for number, (precision, peak) in enumerate(peaks.items()):
        for what, bandwidth, style in (("memory", memory, "-"), ("cache", cache, ":")):
            label = None if number else f"{what}: {bandwidth:.3g} GB/s"
            axes.plot(grid, [min(bandwidth * x, peak) for x in grid], style, color="#555555", linewidth=1, label=label)
        axes.annotate(
            f"{precision} matrix product: {peak:.3g} GFLOP/s",
            (high, peak),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=8,
        )


def _draw_points(axes: Any, rows: Sequence[Row]) -> None:
    """Each operator a colour, each provider a marker."""
    operators = list(dict.fromkeys(row.case["operator"] for row in rows))
    providers = list(dict.fromkeys(row.case["provider"] for row in rows))
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(operators)}
    markers = {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(providers)}
    for row in rows:
        marker, colour = markers[row.case["provider"]], colours[row.case["operator"]]
        axes.plot(_intensity(row), row.metrics["gflop_per_s"], marker, color=colour, alpha=0.8)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for name, marker in markers.items():
        axes.plot([], [], marker, color="#555555", fillstyle="none", label=name)


def _intensity(row: Row) -> float:
    """FLOPs a byte."""
    return float(row.metrics["flops"] or 0) / float(row.metrics["moved_bytes"] or 1)
