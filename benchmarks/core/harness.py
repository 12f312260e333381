"""What every benchmark's command line shares: its options, its exit status, and where its files go."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.core.report import EXIT_RED, Report
from benchmarks.core.terminal import print_report
from engine.cli.command import run_command
from engine.errors import RequestError
from engine.files import make_folder

Number = TypeVar("Number", int, float)


def make_parser(name: str, description: str, *, takes_bundle: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have. name: of the module, e.g. "step_latency"."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    if takes_bundle:
        parser.add_argument("bundle", type=Path, help="folder that export.to_onnx or export.to_trt made")
    parser.add_argument(
        "--out", type=Path, default=Path("bench"), help="folder for the report and its picture (default bench)"
    )
    parser.add_argument("--name", default=name, help=f"of the two files (default {name})")
    parser.add_argument("--threads", type=int, help="CPU threads of every variant (default: one a core)")
    parser.add_argument("--short", action="store_true", help="fewer rounds and sizes: minutes instead of an hour")
    return parser


def command_line(name: str, argv: Sequence[str] | None) -> str:
    """The command as a reader would type it."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *(sys.argv[1:] if argv is None else argv)])


def run_benchmark(
    name: str,
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace, str], Report],
    draw: Callable[[Report, Path], None],
    argv: Sequence[str] | None,
) -> int:
    """Run a benchmark; returns its exit status: 0, EXIT_RED where a check failed, 2 for bad input.

    work: (arguments, command line) -> report. draw: writes the report's picture to a path.
    """
    is_red = False

    def action(args: argparse.Namespace) -> None:
        nonlocal is_red
        make_folder(args.out)
        report = work(args, command_line(name, argv))
        is_red = report.is_red
        data, picture = (args.out / f"{args.name}.{suffix}" for suffix in ("json", "png"))
        report.save(data)
        draw(report, picture)
        print_report(report)
        print(f"written: {data}, {picture}")

    status = run_command(action, parser.parse_args(argv))
    return status or (EXIT_RED if is_red else 0)


def parse_numbers(text: str, option: str, least: int = 1) -> tuple[int, ...]:
    """Whole numbers out of "1,8", each once, in order; raises RequestError, which names the option."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise RequestError(f"{option} is {text!r}; expected whole numbers from {least} up, for example 1,8,16")
    return tuple(dict.fromkeys(int(part) for part in parts))


def choose(given: Number | None, usual: Number, short: Number, is_short: bool) -> Number:
    """What was given, else what the form of the benchmark takes."""
    return given if given is not None else short if is_short else usual


def check_least(option: str, value: float | None, least: float) -> None:
    """Raises RequestError for a value below the least; None is a value that was not given."""
    if value is not None and value < least:
        raise RequestError(f"{option} is {value}; expected {least} or more")
