"""Pictures of reports: one style, one function for each benchmark, written whole or not at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.core.environment import describe
from benchmarks.core.report import Report, Row
from engine.errors import MissingPackageError
from engine.files import atomic_path

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#555555", "#000000", "#f0e442")
"""Okabe and Ito's, which colour-blind readers can tell apart, and two more."""
MARKERS = "osD^vPX*<>"
OTHER, OURS, GREY = COLOURS[0], COLOURS[1], COLOURS[7]
REAL = "real images"
"""The variant of rows of quality that are about real images."""
_MOST_BATCHES, _MOST_PARTS = 3, 14


@contextmanager
def figure(path: Path, columns: int = 1, rows: int = 1, width: float = 8.0, height: float = 4.5) -> Iterator[list[Any]]:
    """A list of axes to draw on; saved as a PNG at the end. Raises MissingPackageError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "the picture of a benchmark", "bench") from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = list(made.subplots(rows, columns, squeeze=False).flat)
    for each in axes:
        each.grid(axis="y", alpha=0.3)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    yield axes
    for each in axes:
        each.set_visible(each.has_data())
    with atomic_path(path) as temporary:
        made.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def _lie(axes: Any) -> None:
    """For horizontal bars: the grid is of x, and labels beside the bars have room."""
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.15)


def _in_order(rows: Sequence[Row], name: str) -> list[Any]:
    """The values of a case in the order in which they come."""
    return list(dict.fromkeys(row.case[name] for row in rows))


def _numbers(rows: Sequence[Row], metric: str) -> list[float]:
    return [float(row.metrics[metric] or 0) for row in rows]


def draw_peers(report: Report, path: Path) -> None:
    """Images/s of every contender, the fastest on top, a panel for each way of sampling."""
    panels = _in_order(report.rows, "guided")
    most = max(sum(row.case["guided"] == panel for row in report.rows) for panel in panels)
    with figure(path, len(panels), width=6.5 * len(panels), height=1.6 + 0.32 * most) as axes:
        for each, panel in zip(axes, panels, strict=True):
            rows = [row for row in report.rows if row.case["guided"] == panel]
            rows.sort(key=lambda row: row.metrics["images_per_s"] or 0.0)
            names = [str(row.case["contender"]) for row in rows]
            colours = [OURS if name.startswith("UNet-RT") else OTHER for name in names]
            drawn = each.barh(names, _numbers(rows, "images_per_s"), color=colours, height=0.65)
            each.bar_label(drawn, fmt="%.3g", padding=3)
            # Bars are as thick in every panel.
            each.set_ylim(len(rows) - most - 0.6, len(rows) - 0.4)
            case = rows[0].case
            each.set_title(
                f"{'guided by a classifier' if panel else 'unguided'}: {case['steps']} steps, batch {case['batch']}",
                fontsize=10,
            )
            each.set_xlabel("images/s, more is better")
            _lie(each)


def draw_step_latency(report: Report, path: Path) -> None:
    """Time of a step by batch, and what an image's share of it is spent on."""
    variants, batches = _in_order(report.rows, "variant"), _in_order(report.rows, "batch")
    shown = batches if len(batches) <= _MOST_BATCHES else [batches[0], batches[len(batches) // 2], batches[-1]]
    height = max(4.5, 1.5 + 0.26 * len(shown) * (len(variants) + 1))
    with figure(path, columns=2, width=13, height=height) as (left, right):
        _draw_step_times(left, report.rows, variants, batches)
        _draw_step_parts(right, [row for row in report.rows if row.case["batch"] in shown])
        left.figure.suptitle(f"{report.subject['name']}: one {report.rows[0].case['step']} step")


def _draw_step_times(axes: Any, rows: Sequence[Row], variants: Sequence[str], batches: Sequence[int]) -> None:
    for colour, variant in zip(COLOURS, variants, strict=False):
        own = [row for row in rows if row.case["variant"] == variant]
        low, middle, high = (np.array(_numbers(own, name)) for name in ("p10_ms", "p50_ms", "p90_ms"))
        x, sides = [row.case["batch"] for row in own], (middle - low, high - middle)
        axes.errorbar(x, middle, sides, fmt="o-", color=colour, label=variant, markersize=4, capsize=3, linewidth=1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", subs=[2, 3, 5])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set(xlabel="batch", ylabel="ms per step: median, bars from 10 % to 90 %")
    axes.grid(axis="y", which="both", alpha=0.2)
    axes.legend(frameon=False)


def _draw_step_parts(axes: Any, rows: Sequence[Row]) -> None:
    batches = _in_order(rows, "batch")
    # A gap between batches.
    y = [place + batches.index(row.case["batch"]) for place, row in enumerate(rows)]
    start = [0.0] * len(rows)
    for part, colour in (("network", COLOURS[5]), ("rest", GREY)):
        values = [
            max(value, 0.0) / float(row.case["batch"] or 1)
            for row, value in zip(rows, _numbers(rows, f"{part}_ms"), strict=True)
        ]
        if any(values):
            axes.barh(y, values, left=start, color=colour, label=part, height=0.75)
        start = [a + b for a, b in zip(start, values, strict=True)]
    for place, total in zip(y, start, strict=True):
        axes.text(total, place, f" {total:.3g}", va="center", fontsize=8)
    axes.set_yticks(y, [f"{row.case['variant']}, batch {row.case['batch']}" for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms per step and image, by part")
    _lie(axes)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)


def draw_native_bound(report: Report, path: Path) -> None:
    """Each part in the network beside the same part alone, a panel for each precision and batch."""
    cases = list(dict.fromkeys((row.case["precision"], row.case["batch"]) for row in report.rows))
    columns, lines = min(2, len(cases)), -(-len(cases) // 2)
    with figure(path, columns, lines, width=7.0 * columns, height=(2.0 + 0.44 * _MOST_PARTS) * lines) as axes:
        for each, case in zip(axes, cases, strict=False):
            rows = [row for row in report.rows if (row.case["precision"], row.case["batch"]) == case]
            shown = rows[:_MOST_PARTS]
            for shift, colour, name in ((-0.2, OURS, "in_network_ms"), (0.2, OTHER, "alone_ms")):
                places = [place + shift for place in range(len(shown))]
                label = name.removesuffix("_ms").replace("_", " ")
                each.barh(places, _numbers(shown, name), height=0.4, color=colour, label=label)
            names = [f"{row.metrics['count']} x {row.case['part']}" for row in shown]
            each.set_yticks(range(len(shown)), names, fontsize=7)
            each.invert_yaxis()
            each.set_xlabel("ms")
            each.set_title(f"{case[0]}, batch {case[1]}: {rows[-1].metrics['in_network_ms']:.3g} ms")
            _lie(each)
            each.legend(frameon=False, loc="lower right")
        axes[0].figure.suptitle(f"{report.subject['name']}: parts in the network and alone")


def draw_export_cost(report: Report, path: Path) -> None:
    """Seconds and peak memory, the models in order of their size; a line of points for each way to export."""
    rows = sorted(report.rows, key=lambda row: row.metrics["parameters"] or 0)
    models = _in_order(rows, "model")
    sizes = {row.case["model"]: float(row.metrics["parameters"] or 0) for row in rows}
    with figure(path, columns=2, width=12.0) as (seconds, memory):
        for colour, what in zip(COLOURS, _in_order(rows, "what"), strict=False):
            chosen = [row for row in rows if row.case["what"] == what]
            places = [models.index(row.case["model"]) for row in chosen]
            seconds.plot(places, _numbers(chosen, "wall_s"), "o-", color=colour, label=f"{what}: wall")
            seconds.plot(places, _numbers(chosen, "cpu_s"), "x:", color=colour, label=f"{what}: CPU")
            peaks = [value / 1e9 for value in _numbers(chosen, "peak_bytes")]
            memory.plot(places, peaks, "o-", color=colour, label=what)
        factor, constant = report.settings["memory_limit_factor"], report.settings["memory_limit_bytes"]
        limits = [(4 * factor * sizes[model] + constant) / 1e9 for model in models]
        label = f"limit: {factor} x fp32 weights + {constant / 1e9:.2g} GB"
        memory.plot(range(len(limits)), limits, "v--", color=GREY, linewidth=1, label=label)
        for axes, label in ((seconds, "seconds"), (memory, "GB, peak of the process")):
            axes.set_xticks(range(len(models)), [f"{name}\n{sizes[name] / 1e6:.3g} M parameters" for name in models])
            axes.tick_params(axis="x", labelsize=8)
            axes.set_ylabel(label)
            axes.set_ylim(0, 1.1 * max(axes.get_ylim()[1], 1e-3))
            axes.margins(x=0.15)
            if rows:
                axes.legend(fontsize=8, loc="best")


def draw_kernels(report: Report, path: Path) -> None:
    """A roofline, a point for every row below the machine's limits; beside it each provider's median of of_roof."""
    rows = [row for row in report.rows if row.case["network"] is not None]
    found: dict[str, list[float]] = {}
    for row, value in zip(rows, _numbers(rows, "of_roof"), strict=True):
        found.setdefault(f"{row.case['operator']}: {row.case['provider']}", []).append(100 * value)
    order = sorted(found, key=lambda name: statistics.median(found[name]))
    with figure(path, columns=2, width=13.0, height=2.5 + max(3.0, 0.3 * len(found))) as (roofline, fractions):
        _draw_limits(roofline, report, rows)
        _draw_operators(roofline, rows)
        roofline.set(xscale="log", yscale="log", xlabel="FLOPs / byte moved", ylabel="GFLOP/s")
        roofline.legend(fontsize=8, loc="lower right")
        roofline.set_title(describe(dict(report.environment)), fontsize=8)
        drawn = fractions.barh(order, [statistics.median(found[name]) for name in order], color=OTHER, height=0.6)
        fractions.bar_label(drawn, fmt="%.3g", padding=3)
        fractions.set_xlabel("% of what this machine can do, median over shapes")
        _lie(fractions)


def _draw_limits(axes: Any, report: Report, rows: Sequence[Row]) -> None:
    """min(bandwidth * intensity, FLOP/s) of memory and of the fastest cache, for every precision met."""
    met, ends = {row.case["precision"] for row in rows}, [_intensity(row) for row in rows]
    grid = np.geomspace(min(ends) / 2, max(ends) * 2, 61)
    memory = report.settings["memory_bytes_per_s"] / 1e9
    cache = max(report.settings["bytes_per_s_by_size"].values()) / 1e9
    peaks = {name: flops / 1e9 for name, flops in report.settings["flop_per_s"].items() if name in met}
    for number, (precision, peak) in enumerate(peaks.items()):
        for what, bandwidth, style in (("memory", memory, "-"), ("cache", cache, ":")):
            label = None if number else f"{what}: {bandwidth:.3g} GB/s"
            axes.plot(grid, np.minimum(bandwidth * grid, peak), style, color=GREY, linewidth=1, label=label)
        text = f"{precision} matrix product: {peak:.3g} GFLOP/s"
        axes.annotate(text, (grid[-1], peak), (0, 3), textcoords="offset points", ha="right", va="bottom", fontsize=8)


def _draw_operators(axes: Any, rows: Sequence[Row]) -> None:
    """Each operator a colour, each provider a marker."""
    colours = dict(zip(_in_order(rows, "operator"), COLOURS, strict=False))
    markers = dict(zip(_in_order(rows, "provider"), MARKERS, strict=False))
    for row in rows:
        marker, colour = markers[row.case["provider"]], colours[row.case["operator"]]
        axes.plot(_intensity(row), row.metrics["gflop_per_s"], marker, color=colour, alpha=0.8)
    for name, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=name)
    for name, marker in markers.items():
        axes.plot([], [], marker, color=GREY, fillstyle="none", label=name)


def _intensity(row: Row) -> float:
    """FLOPs a byte."""
    return float(row.metrics["flops"] or 0) / float(row.metrics["moved_bytes"] or 1)


_QUALITY = {
    "frechet": "Fréchet distance to the training digits",
    "fid": "FID",
    "psnr_median_db": "PSNR of the median image beside fp32, dB",
    "accuracy": "read as their label",
    "inception_score": "Inception Score",
}


def draw_quality(report: Report, path: Path) -> None:
    """Quality against speed: a line for each variant, a point for each number of steps; two figures at most."""
    rows = [row for row in report.rows if row.case["measured"] == "samples"]
    made = [row for row in rows if row.metrics.get("images_per_s") is not None]
    has = [name for name in _QUALITY if any(row.metrics.get(name) is not None for row in made)]
    left = next((name for name in ("frechet", "fid") if name in has), "psnr_median_db")
    right = next((name for name in ("accuracy", "inception_score") if name in has), "psnr_median_db")
    panels = list(dict.fromkeys((left, right)))
    real = next((row for row in rows if row.case["variant"] == REAL), None)
    with figure(path, columns=len(panels), width=6.0 * len(panels), height=5.0) as axes:
        for each, name in zip(axes, panels, strict=True):
            _draw_quality(each, name, made, None if real is None else real.metrics.get(name))
        whole = axes[0].figure
        whole.suptitle(f"{report.subject['name']}, {report.settings['sampler']}: number of steps at each point")
        handles, labels = axes[0].get_legend_handles_labels()
        whole.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)


def _draw_quality(axes: Any, name: str, rows: Sequence[Row], floor: float | None) -> None:
    for number, variant in enumerate(_in_order(rows, "variant")):
        own = [row for row in rows if row.case["variant"] == variant and row.metrics.get(name) is not None]
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        x, y = _numbers(own, "images_per_s"), _numbers(own, name)
        axes.plot(x, y, label=variant, markersize=6, color=colour, marker=marker)
        for row, *point in zip(own, x, y, strict=True):
            text, offset = str(row.case["steps"]), (0, 7)
            axes.annotate(text, point, offset, textcoords="offset points", ha="center", fontsize=8, color=colour)
    if floor is not None:
        axes.axhline(floor, linestyle="--", color="black", linewidth=1, label=REAL)
    axes.margins(x=0.12, y=0.12)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(*round_ticks(*axes.get_xlim()))
    axes.set(xlabel="images/s (log)", ylabel=_QUALITY[name])
    if name == "accuracy":
        axes.yaxis.set_major_formatter("{x:.1%}")


def round_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Round numbers from low to high and their texts: 1, 2 and 5 of each decade, or all digits where those are few."""
    ticks: list[float] = []
    for digits in ((1, 2, 5), range(1, 10)):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [x for power in powers for digit in digits if low <= (x := digit * 10.0**power) <= high]
        if len(ticks) > 2:
            break
    return ticks, [f"{tick:g}" for tick in ticks]
