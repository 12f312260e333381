"""Reports as Markdown: a page that opens with one picture and one small table, and all tables on a page behind it.

Both, and the README's table, say what the JSON files say. What a reader must know beside the figures stands in the
folder's notes.md, which ends the first page.

python -m benchmarks.page docs/benchmarks --page docs/benchmarks.md --readme README.md
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from benchmarks.core.environment import describe
from benchmarks.core.report import Check, Comparison, Report, Row, case_text, check_text, number, read_report
from engine.cli.command import run_command
from engine.errors import OutputError, RequestError
from engine.files import atomic_path

ORDER = ("peers", "step_latency", "native_bound", "quality", "kernels", "export_cost")
NOTES, TABLES = "notes.md", "tables.md"
BEGIN, END = "<!-- benchmarks: begin (make bench writes this) -->", "<!-- benchmarks: end -->"
HEADLINE = ("torch.compile", "ONNX Runtime", "OpenVINO", "TensorRT", "diffusers")
"""Peers of the small table, where they were measured."""

_ABOUT = {
    "peers": "Whole sampling calls of the same network in what one could use instead, in turn in one run, from the "
    "same noise. psnr_db: how near the images come to this engine's in fp32. Ratios are time / time of ours: above 1, "
    "ours is faster.",
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


def overview(reports: Mapping[str, Report], folder: str, notes: str = "") -> str:
    """The first page. folder: path from it to the folder of the reports. notes: what ends it."""
    lines = ["# Benchmarks", ""]
    if "peers" in reports:
        lines += [f"![Images/s of this engine and of what one would use instead]({folder}/peers.png)", ""]
        lines += [headline(reports["peers"]), ""]
    lines += ["## Everything that was measured", ""]
    lines += [
        f"- [{_title(name, report)}]({folder}/{TABLES}#{_anchor(name, report)}): {_ABOUT[report.benchmark]}"
        for name, report in reports.items()
    ]
    return "\n".join([*lines, "", notes]).rstrip() + "\n"


def tables(reports: Mapping[str, Report]) -> str:
    """The page behind it, in the folder of the reports."""
    lines = ["# Benchmarks: every table", "", "Written by `make bench`.", ""]
    for name, report in reports.items():
        lines += _section(report, name)
    return "\n".join(lines).rstrip() + "\n"


def _title(name: str, report: Report) -> str:
    return f"{name}: {report.subject['name']}"


def _anchor(name: str, report: Report) -> str:
    """Of a heading, as GitHub and mkdocs make it."""
    kept = (char if char.isalnum() or char in "-_ " else "" for char in _title(name, report).lower())
    return "".join(kept).replace(" ", "-")


def _section(report: Report, name: str) -> list[str]:
    lines = [f"## {_title(name, report)}", "", _ABOUT[report.benchmark], ""]
    lines += [f"    {report.command}", "", f"{report.date[:10]}; {describe(dict(report.environment))}.", ""]
    lines += [f"![{name}]({name}.png)", ""]
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
            case_text(c.case) or "-",
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
    """The small table: images/s of this engine and of the peers of HEADLINE, unguided and guided, and the ratios."""
    ratios = {(c.variant, c.case["guided"]): c for c in peers.comparisons}
    ours = peers.comparisons[0].baseline if peers.comparisons else str(peers.rows[0].case["contender"])
    ways = list(dict.fromkeys(row.case["guided"] for row in peers.rows))
    found = {(str(row.case["contender"]), row.case["guided"]): row for row in peers.rows}
    header = ["", "precision"]
    for way in ways:
        header += ["guided: images/s" if way else "images/s", "time / ours"]
    names = [name for name in HEADLINE if any((name, way) in found for way in ways)]
    lines = []
    for name in (ours, *sorted(names, key=lambda name: _speed(found.get((name, ways[0]))), reverse=True)):
        rows = [found.get((name, way)) for way in ways]
        cells = [f"**{name}**" if name == ours else name, next(str(row.case["precision"]) for row in rows if row)]
        for way, row in zip(ways, rows, strict=True):
            cells += _cells(row, ratios.get((name, way)))
        lines.append(cells)
    steps, batch = peers.settings["steps"], peers.settings["batch"]
    where = (
        f"The {peers.subject['name']} model ({peers.subject['parameters'] / 1e6:.1f} M parameters), {steps} DDIM "
        f"steps, batch {batch}; guided: by a classifier's gradient. Time / time of ours with an interval of 99 %. "
        f"{describe(dict(peers.environment))}; {peers.date[:10]}."
    )
    return "\n".join([*markdown_table(header, lines), "", where])


def _speed(row: Row | None) -> float:
    return 0.0 if row is None else row.metrics["images_per_s"] or 0.0


def _cells(row: Row | None, comparison: Comparison | None) -> tuple[str, str]:
    if row is None:
        return "-", "-"
    speed = f"{_speed(row):.3g}"
    if comparison is None:
        return f"**{speed}**", "1"
    ratio = comparison.ratio
    return speed, f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def replace_block(text: str, block: str, where: Path) -> str:
    """text with the lines between BEGIN and END replaced; raises OutputError where it has no such lines."""
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise OutputError(f"{where} has no lines {BEGIN!r} and {END!r}; add them where the table belongs")
    return f"{text[: start + len(BEGIN)]}\n{block}\n{text[end:]}"


def run(args: argparse.Namespace) -> None:
    """Write both pages, and the README's block where a README is given."""
    reports = read_reports(args.folder)
    written = {
        args.page: overview(reports, os.path.relpath(args.folder, args.page.parent), read_notes(args.folder)),
        args.folder / TABLES: tables(reports),
    }
    if args.readme is not None:
        if "peers" not in reports:
            raise RequestError(f"{args.folder} holds no report of peers, from which the README's table comes")
        block = headline(reports["peers"])
        written[args.readme] = replace_block(args.readme.read_text(encoding="utf-8"), block, args.readme)
    for path, text in written.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description="Reports as Markdown pages.")
    parser.add_argument("folder", type=Path, help="folder with reports and their pictures; the tables go there too")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"), help="default docs/benchmarks.md")
    parser.add_argument("--readme", type=Path, help="file whose marked block gets the small table")
    return run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
