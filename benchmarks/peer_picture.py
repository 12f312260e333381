"""The picture of peers: images/s of every contender, a panel for each way of sampling."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer_contenders import OURS
from benchmarks.plots import COLOURS, figure
from benchmarks.report import Report, Row

_OURS_COLOUR, _PEER_COLOUR = COLOURS[1], COLOURS[0]
_COLUMNS = 2


def draw(report: Report, path: Path) -> None:
    """Write peers' PNG; raises MissingPackageError without matplotlib."""
    panels = list(dict.fromkeys(_panel(row) for row in report.rows))
    most = max(sum(_panel(row) == panel for row in report.rows) for panel in panels)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with figure(path, columns, rows, width=6.5 * columns, height=0.8 + rows * (0.9 + 0.32 * most)) as axes:
        flat = [axes] if len(panels) == 1 else list(axes.flat)
        flat[0].figure.suptitle(f"{report.subject['name']}: end-to-end images/s, more is better")
        for each, panel in zip(flat, panels, strict=False):
            _draw_panel(each, panel, [row for row in report.rows if _panel(row) == panel], most)
        for each in flat[len(panels) :]:
            each.set_visible(False)


def _panel(row: Row) -> str:
    case = row.case
    return f"{case['setting']}{', guided' if case['guided'] else ''}, batch {case['batch']}"


def _draw_panel(axes: Any, title: str, rows: Sequence[Row], most: int) -> None:
    """most: rows of the fullest panel, so that bars are as thick in every one."""
    order = sorted(rows, key=lambda row: row.metrics["images_per_s"] or 0.0)
    names = [str(row.case["contender"]) for row in order]
    values = [row.metrics["images_per_s"] or 0.0 for row in order]
    colours = [_OURS_COLOUR if name.startswith(OURS) else _PEER_COLOUR for name in names]
    drawn = axes.barh(names, values, color=colours, height=0.65)
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.set_ylim(len(rows) - most - 0.6, len(rows) - 0.4)
    axes.set_axisbelow(True)
    axes.set_title(title, fontsize=10)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.14)
