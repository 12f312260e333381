"""Reports on the terminal: tables of rows and comparisons, and a line for each check."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.core.report import Comparison, Report, Value, case_text, check_text, number
from benchmarks.core.stats import Verdict
from engine.errors import MissingPackageError

_FILE_COLUMNS = 240
"""Width of what is not printed on a terminal: a log can be scrolled, a column cut to "4..." cannot be read."""


def print_report(report: Report) -> None:
    """Tables of rows, comparisons and checks on the terminal."""
    console, table = _rich()
    for shown in _row_tables(table, report, console.width):
        console.print(shown)
    if report.comparisons:
        _print_comparisons(report.comparisons)
    for each in report.missing:
        console.print(f"not measured: {each.variant}: {each.reason}", markup=False)
    for check in report.checks:
        style = "green" if check.passed else "bold red"
        console.print(check_text(check), style=style, markup=False)


def _row_tables(table: Any, report: Report, width: int) -> Iterator[Any]:
    """The rows, with as many metrics side by side as the terminal is wide."""
    cases = list(dict.fromkeys(name for row in report.rows for name in row.case))
    metrics = list(dict.fromkeys(name for row in report.rows for name in row.metrics))
    columns = {
        name: ["-" if (value := row.case.get(name)) is None else str(value) for row in report.rows] for name in cases
    }
    columns |= {name: [number(row.metrics.get(name)) for row in report.rows] for name in metrics}
    # A cell has a border and two spaces beside its text.
    widths = {name: max(map(len, [name, *texts])) + 3 for name, texts in columns.items()}
    left = list(metrics)
    while left:
        free, taken = width - 1 - sum(widths[name] for name in cases), 0
        while taken < len(left) and (free := free - widths[left[taken]]) >= 0:
            taken += 1
        names, left = left[: max(taken, 1)], left[max(taken, 1) :]
        shown = table(title=f"{report.benchmark}: {report.subject.get('name', '')}")
        for name in (*cases, *names):
            shown.add_column(name, justify="right" if name in names else "left")
        for index in range(len(report.rows)):
            shown.add_row(*(columns[name][index] for name in (*cases, *names)))
        yield shown


def _text(value: Value) -> str:
    return "-" if value is None else str(value)


def print_table(title: str, columns: Sequence[str], rows: Sequence[tuple[Sequence[str], str]]) -> None:
    """A table on the terminal; each row is its texts and rich's name of a style."""
    console, table = _rich()
    shown = table(title=title)
    for name in columns:
        shown.add_column(name)
    for texts, style in rows:
        shown.add_row(*texts, style=style)
    console.print(shown)


def _print_comparisons(comparisons: Sequence[Comparison]) -> None:
    styles = {Verdict.FASTER: "green", Verdict.SLOWER: "red", Verdict.NONE: "dim"}
    rows = []
    for c in comparisons:
        interval, verdict = f"{c.ratio.low:.3f} to {c.ratio.high:.3f}", c.ratio.verdict
        texts = (case_text(c.case), c.variant, c.baseline, f"{c.ratio.value:.3f}", interval, str(verdict))
        rows.append((texts, styles[verdict]))
    columns = ("case", "variant", "baseline", "ratio", "interval", "verdict")
    print_table("time / time of the baseline, paired", columns, rows)


def _rich() -> tuple[Any, Any]:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError as error:
        raise MissingPackageError("rich", "the table of a benchmark", "bench") from error
    return Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS), Table
