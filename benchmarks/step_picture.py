"""The picture of step_latency: time of a step by batch, beside what an image's share of it is spent on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plots import COLOURS, figure
from benchmarks.report import Report, Row

PART_COLOURS = {
    "network": COLOURS[5],
    "gradient": COLOURS[6],
    "update": COLOURS[7],
    "noise": COLOURS[9],
    "host": COLOURS[8],
}
_MOST_BATCHES = 3
_BAR_HEIGHT = 0.26


def draw(report: Report, path: Path) -> None:
    """Write step_latency's PNG; raises MissingPackageError without matplotlib."""
    variants = list(dict.fromkeys(str(row.case["variant"]) for row in report.rows))
    batches = list(dict.fromkeys(int(row.case["batch"] or 0) for row in report.rows))
    shown = _spread_out(batches)
    height = max(4.5, 1.5 + _BAR_HEIGHT * len(shown) * (len(variants) + 1))
    with figure(path, columns=2, width=13, height=height) as (left, right):
        _draw_times(left, report.rows, variants, batches)
        _draw_split(right, report.rows, variants, shown)
        left.figure.suptitle(f"{report.subject['name']}: one {report.rows[0].case['step']} step")


def _spread_out(batches: Sequence[int]) -> list[int]:
    """The smallest, the largest and one between them."""
    if len(batches) <= _MOST_BATCHES:
        return list(batches)
    return [batches[0], batches[len(batches) // 2], batches[-1]]


def _draw_times(axes: Any, rows: Sequence[Row], variants: Sequence[str], batches: Sequence[int]) -> None:
    for colour, variant in zip(COLOURS, variants, strict=False):
        own = [row for row in rows if row.case["variant"] == variant]
        low, middle, high = (np.array([row.metrics[name] for row in own]) for name in ("p10_ms", "p50_ms", "p90_ms"))
        sides = (middle - low, high - middle)
        x = [row.case["batch"] for row in own]
        axes.errorbar(x, middle, sides, fmt="o-", color=colour, label=variant, markersize=4, capsize=3, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", subs=[2, 3, 5])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_ylabel("ms per step: median, bars from 10 % to 90 %")
    axes.grid(axis="y", which="both", alpha=0.2)
    axes.legend(frameon=False)


def _draw_split(axes: Any, rows: Sequence[Row], variants: Sequence[str], batches: Sequence[int]) -> None:
    found = {(row.case["variant"], row.case["batch"]): row for row in rows}
    names = [(variant, batch) for batch in batches for variant in variants if (variant, batch) in found]
    # A gap between batches.
    y = [i + batches.index(batch) for i, (_, batch) in enumerate(names)]
    start = [0.0] * len(names)
    for part, colour in PART_COLOURS.items():
        values = [max(found[name].metrics[f"{part}_ms"] or 0.0, 0.0) / name[1] for name in names]
        if any(values):
            axes.barh(y, values, left=start, color=colour, label=part, height=0.75)
        start = [a + b for a, b in zip(start, values, strict=True)]
    for position, name, total in zip(y, names, start, strict=True):
        network = found[name].metrics["network_ms"] or 0.0
        axes.text(total, position, f" {total:.3g} ({network / name[1] / total:.0%} network)", va="center", fontsize=8)
    axes.set_yticks(y, [f"{variant}, batch {batch}" for variant, batch in names])
    axes.invert_yaxis()
    axes.set_xlabel("ms per step and image, by part")
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.25)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=len(PART_COLOURS))
