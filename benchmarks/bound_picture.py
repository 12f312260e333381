"""The picture of native_bound: each part in the network beside the same part alone."""

from __future__ import annotations

from pathlib import Path

from benchmarks.plots import COLOURS, figure
from benchmarks.report import Report

MOST_PARTS = 14
_BAR_HEIGHT = 0.22


def draw(report: Report, path: Path) -> None:
    """Write the PNG, a column for each precision and batch; raises MissingPackageError without matplotlib."""
    cases = list(dict.fromkeys((row.case["precision"], row.case["batch"]) for row in report.rows))
    height = 2.0 + 2 * _BAR_HEIGHT * MOST_PARTS
    with figure(path, columns=2, rows=-(-len(cases) // 2), width=14, height=height * -(-len(cases) // 2)) as axes:
        for each, case in zip(axes.flat, cases, strict=False):
            rows = [row for row in report.rows if (row.case["precision"], row.case["batch"]) == case]
            shown = rows[:MOST_PARTS]
            for shift, colour, name in ((-0.2, COLOURS[1], "in_network_ms"), (0.2, COLOURS[0], "alone_ms")):
                values = [row.metrics[name] for row in shown]
                places = [i + shift for i in range(len(shown))]
                each.barh(places, values, height=0.4, color=colour, label=name.removesuffix("_ms").replace("_", " "))
            each.set_yticks(
                range(len(shown)), [f"{row.metrics['count']} x {row.case['part']}" for row in shown], fontsize=7
            )
            each.invert_yaxis()
            each.set_xlabel("ms")
            each.set_title(f"{case[0]}, batch {case[1]}: {rows[-1].metrics['in_network_ms']:.3g} ms")
            each.grid(axis="y", visible=False)
            each.legend(frameon=False, loc="lower right")
        for each in axes.flat[len(cases) :]:
            each.axis("off")
        axes.flat[0].figure.suptitle(f"{report.subject['name']}: parts in the network and alone")
