"""Reports as a Markdown page, and the README's table: both say what the JSON files say.

What a reader must know beside the figures stands in the folder's notes.md, which ends the page.

python -m benchmarks.page docs/benchmarks --page docs/benchmarks.md --readme README.md
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.environment import describe
from benchmarks.report import Check, Comparison, Report, Row, Value, check_text, number, read_report
from engine.cli.command import run_command
from engine.errors import OutputError, RequestError
from engine.files import atomic_path

ORDER = ("peers", "step_latency", "native_bound", "quality", "kernels", "export_cost")
NOTES = "notes.md"
BEGIN, END = "<!-- benchmarks: begin (make bench writes this) -->", "<!-- benchmarks: end -->"

_ABOUT = {
    "peers": "End-to-end images/s of the same network in what one could use instead, step by step in turn in one run. "
    "Ratios are time / time of ours: above 1, ours is faster.",
    "step_latency": "One denoising step of a batch: network, update, noise and the host's work.",
    "native_bound": "The CPU engine's whole network beside its convolutions and attention, each alone, and a pass for "
    "each norm. Ratios are time / time of the parts.",
    "quality": "Samples of every backend and step count beside real ones and beside fp32.",
    "kernels": "Operators in the shapes that networks give them, beside what this machine was measured to do.",
    "export_cost": "From checkpoint to verified bundle, each in a process of its own; single runs, so no ratios.",
}


def read_reports(folder: Path) -> dict[str, Report]:
    """Every report of a folder by its file's name without suffix, in ORDER.

    Raises RequestError where there is none, BundleError for a JSON file that is no report.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder} is no folder; pass the one that benchmarks wrote to")
    found = {path.stem: read_report(path) for path in sorted(folder.glob("*.json"))}
    if not found:
        raise RequestError(f"{folder} holds no report (*.json); run a benchmark with --out {folder} first")
    return dict(sorted(found.items(), key=lambda item: ORDER.index(item[1].benchmark)))


def read_notes(folder: Path) -> str:
    """A folder's notes, "" where it has none."""
    path = folder / NOTES
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def page(reports: Mapping[str, Report], pictures: str, notes: str = "") -> str:
    """The page of reports by name. pictures: path from the page to their folder. notes: what ends it."""
    lines = ["# Benchmarks", "", "Written by `make bench`.", ""]
    for name, report in reports.items():
        lines += _section(report, name, pictures)
    lines += [notes]
    return "\n".join(lines).rstrip() + "\n"


def _section(report: Report, name: str, pictures: str) -> list[str]:
    lines = [f"## {name}: {report.subject['name']}", "", _ABOUT.get(report.benchmark, ""), ""]
    lines += [f"    {report.command}", "", f"{report.date[:10]}; {describe(dict(report.environment))}.", ""]
    lines += [f"![{name}]({pictures}/{name}.png)", ""]
    lines += [*_row_table(report.rows), ""]
    if report.comparisons:
        lines += [*_comparison_table(report.comparisons), ""]
    lines += [f"- not measured: {each.variant}: {_one_line(each.reason)}" for each in report.missing]
    lines += [""] if report.missing else []
    return [*lines, *_check_lines(report.checks)]


def _row_table(rows: Sequence[Row]) -> list[str]:
    cases = list(dict.fromkeys(name for row in rows for name in row.case))
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    cells = (
        [str(row.case.get(name, "-")) for name in cases] + [number(row.metrics.get(name)) for name in metrics]
        for row in rows
    )
    return markdown_table([*cases, *metrics], cells)


def _comparison_table(comparisons: Sequence[Comparison]) -> list[str]:
    cells = (
        (
            " ".join(f"{name} {value}" for name, value in c.case.items()) or "-",
            c.variant,
            c.baseline,
            f"{c.ratio.value:.3f}",
            f"{c.ratio.low:.3f} to {c.ratio.high:.3f}",
            str(c.ratio.verdict),
        )
        for c in comparisons
    )
    return markdown_table(("case", "variant", "beside", "time / time", "interval (99 %)", "variant is"), cells)


def _check_lines(checks: Sequence[Check]) -> list[str]:
    failed = [check for check in checks if not check.passed]
    lines = [f"Checks: {len(checks) - len(failed)} of {len(checks)} passed.", ""] if checks else []
    return lines + [f"- **{_one_line(check_text(check))}**" for check in failed] + ([""] if failed else [])


def headline(peers: Report) -> str:
    """The README's table: images/s of every contender for each way of sampling, and the ratio to ours."""
    settings = list(dict.fromkeys(_setting(row) for row in peers.rows))
    names = list(dict.fromkeys(str(row.case["contender"]) for row in peers.rows))
    found = {(str(row.case["contender"]), _setting(row)): row for row in peers.rows}
    ratios = {(c.variant, _named(c.case)): c for c in peers.comparisons}
    lines = markdown_table(
        ["images/s", *settings],
        ([name, *(_cell(found.get((name, s)), ratios.get((name, s))) for s in settings)] for name in names),
    )
    where = f"`{peers.command}`; {describe(dict(peers.environment))}; {peers.date[:10]}."
    return "\n".join([*lines, "", where])


def _cell(row: Row | None, comparison: Comparison | None) -> str:
    if row is None:
        return "-"
    text = number(row.metrics["images_per_s"])
    if comparison is None:
        return f"**{text}**"
    ratio = comparison.ratio
    return f"{text} ({ratio.value:.2f} times our time: {ratio.low:.2f} to {ratio.high:.2f})"


def _setting(row: Row) -> str:
    return _named({name: value for name, value in row.case.items() if name != "contender"})


def _named(case: Mapping[str, Value]) -> str:
    guided = ", guided" if case.get("guided") else ""
    return f"{case['setting']}{guided}, batch {case['batch']}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def replace_block(text: str, block: str, where: Path) -> str:
    """text with the lines between BEGIN and END replaced; raises OutputError where it has no such lines."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise OutputError(f"{where} has no lines {BEGIN!r} and {END!r}; add them where the table belongs")
    return f"{text[: start + len(BEGIN)]}\n{block}\n{text[end:]}"


def run(args: argparse.Namespace) -> None:
    """Write the page, and the README's block where a README is given."""
    reports = read_reports(args.folder)
    text = page(reports, os.path.relpath(args.folder, args.page.parent), read_notes(args.folder))
    with atomic_path(args.page) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"written: {args.page}")
    if args.readme is None:
        return
    peers = next((report for report in reports.values() if report.benchmark == "peers"), None)
    if peers is None:
        raise RequestError(f"{args.folder} holds no report of peers, from which the README's table comes")
    block = replace_block(args.readme.read_text(encoding="utf-8"), headline(peers), args.readme)
    with atomic_path(args.readme) as temporary:
        temporary.write_text(block, encoding="utf-8")
    print(f"written: {args.readme}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description="Reports as a Markdown page.")
    parser.add_argument("folder", type=Path, help="folder with reports and their pictures")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"), help="default docs/benchmarks.md")
    parser.add_argument("--readme", type=Path, help="file whose marked block gets the headline table")
    return run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
