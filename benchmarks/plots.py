"""Pictures of reports: one style, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from engine.errors import MissingPackageError
from engine.files import atomic_path

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#555555", "#000000", "#f0e442")
"""Okabe and Ito's, which colour-blind readers can tell apart, and two more."""


@contextmanager
def figure(path: Path, columns: int = 1, rows: int = 1, width: float = 8.0, height: float = 4.5) -> Iterator[Any]:
    """Axes to draw on, an array where there are several; saved as a PNG at the end. Raises MissingPackageError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError("matplotlib", "the picture of a benchmark", "bench") from error
    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(rows, columns)
    for each in axes.flat if columns * rows > 1 else [axes]:
        each.grid(axis="y", alpha=0.3)
        each.spines[["top", "right"]].set_visible(False)
    yield axes
    with atomic_path(path) as temporary:
        made.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def bars(axes: Any, names: Sequence[str], values: Sequence[float], label: str, lower_is_better: bool = True) -> None:
    """Horizontal bars, the best on top, each with its number."""
    order = sorted(range(len(names)), key=lambda i: values[i], reverse=lower_is_better)
    drawn = axes.barh([names[i] for i in order], [values[i] for i in order], color=COLOURS[0], height=0.6)
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", alpha=0.3)
    axes.margins(x=0.15)
