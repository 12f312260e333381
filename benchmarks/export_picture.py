"""The picture of what exports cost: seconds and peak memory, the models in order of their size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.plots import COLOURS, figure
from benchmarks.report import Report, Row


def draw(report: Report, path: Path) -> None:
    """A line of points for each way to export; where every export failed, empty axes."""
    rows = sorted(report.rows, key=_parameters)
    models = list(dict.fromkeys(str(row.case["model"]) for row in rows))
    ways = list(dict.fromkeys(str(row.case["what"]) for row in rows))
    with figure(path, columns=2, width=12.0) as (seconds, memory):
        for index, what in enumerate(ways):
            chosen, colour = [row for row in rows if row.case["what"] == what], COLOURS[index % len(COLOURS)]
            places = [models.index(str(row.case["model"])) for row in chosen]
            seconds.plot(places, _values(chosen, "wall_s"), "o-", color=colour, label=f"{what}: wall")
            seconds.plot(places, _values(chosen, "cpu_s"), "x:", color=colour, label=f"{what}: CPU")
            memory.plot(places, _values(chosen, "peak_bytes", 1e9), "o-", color=colour, label=what)
        sizes = {str(row.case["model"]): _parameters(row) for row in rows}
        if rows:
            _draw_limit(memory, report, [sizes[model] for model in models])
        for axes, label in ((seconds, "seconds"), (memory, "GB, peak of the process")):
            axes.set_xticks(range(len(models)), [f"{name}\n{sizes[name] / 1e6:.3g} M parameters" for name in models])
            axes.tick_params(axis="x", labelsize=8)
            axes.set_ylabel(label)
            axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-3))
            axes.margins(x=0.15)
            if rows:
                axes.legend(fontsize=8, loc="best")
        seconds.set_title(describe(dict(report.environment)), fontsize=8)


def _draw_limit(axes: Any, report: Report, parameters: list[float]) -> None:
    factor, constant = report.settings["memory_limit_factor"], report.settings["memory_limit_bytes"]
    limits = [(4 * factor * count + constant) / 1e9 for count in parameters]
    label = f"limit: {factor} x fp32 weights + {constant / 1e9:.2g} GB"
    axes.plot(range(len(limits)), limits, "v--", color="#555555", linewidth=1, label=label)


def _parameters(row: Row) -> float:
    return float(row.metrics["parameters"] or 0)


def _values(rows: list[Row], metric: str, unit: float = 1.0) -> list[float]:
    return [float(row.metrics[metric] or 0) / unit for row in rows]
