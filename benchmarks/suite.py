"""make bench: the short form of every benchmark, each a process of its own, and their page.

Together they take less than ten minutes on two cores with nothing else to do; the limits are for busy ones.

The bundles that are measured are the ones that export_cost makes: the shipped digits, and the DDPM CIFAR-10 network
with random weights. Of the digits a recipe writes the folder that diffusers runs, so this takes a checkout. A part that
fails or runs out of time leaves the others alone; its report, if an older one is there, is removed, so that the page
shows nothing that this run did not measure.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.core.report import EXIT_RED
from engine.cli.command import run_command, table
from engine.errors import BackendError
from engine.files import make_folder

BUDGET_S = 1800.0
DIFFUSERS = "digits-diffusers"
CLASSIFIER = Path("assets/classifier.pt")


@dataclass(frozen=True, slots=True)
class Part:
    """name: of its files. module: of benchmarks. arguments: besides where to write. limit_s: when it is ended."""

    name: str
    module: str
    arguments: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """status: passed, red (a check failed), failed, or out of time."""

    name: str
    status: str
    seconds: float


def parts(work: Path) -> tuple[Part, ...]:
    """In this order; the later ones need the bundles that export_cost leaves in `work`."""
    digits, ddpm = str(work / "digits.engine"), str(work / "ddpm-cifar10.engine")
    diffusers = str(work / DIFFUSERS)
    return (
        Part("export_cost", "export_cost", ("--short", "--keep", str(work)), 400),
        Part("peers", "peers", (digits, "--short", "--classifier", str(CLASSIFIER), "--diffusers", diffusers), 500),
        Part("step_latency", "step_latency", (digits, "--short"), 300),
        Part(
            "step_latency-ddpm",
            "step_latency",
            (ddpm, "--short", "--batches", "1,8", "--rounds", "24", "--seconds", "190"),
            400,
        ),
        Part("native_bound", "native_bound", (ddpm, "--short"), 200),
        Part("quality", "quality", (digits, "--short"), 400),
        Part("kernels", "kernels", ("--short",), 200),
    )


def run_part(part: Part, out: Path, limit_s: float) -> Outcome:
    """Run one part with its output on the terminal, for limit_s seconds at most."""
    start = time.monotonic()
    report = out / f"{part.name}.json"
    report.unlink(missing_ok=True)
    command = [*_command(part), "--out", str(out), "--name", part.name]
    try:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, timeout=max(limit_s, 0.0), check=False).returncode
        status = {0: "passed", EXIT_RED: "red"}.get(code, "failed") if report.is_file() else "failed"
    except subprocess.TimeoutExpired:
        status = "out of time"
    return Outcome(part.name, status, time.monotonic() - start)


def _command(part: Part) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{part.module}", *part.arguments]


def run_all(chosen: Sequence[Part], out: Path, budget_s: float) -> list[Outcome]:
    """Run the parts one after the other."""
    end = time.monotonic() + budget_s
    outcomes = []
    for part in chosen:
        print(f"{part.name} ...", flush=True)
        outcomes.append(run_part(part, out, min(part.limit_s, end - time.monotonic())))
    return outcomes


def run(args: argparse.Namespace) -> None:
    """Run everything and write the page; raises BackendError where a part did not pass."""
    make_folder(args.out)
    make_folder(args.work)
    recipe = [sys.executable, "-m", "recipes.diffusers_format", str(args.work / DIFFUSERS)]
    if subprocess.run(recipe, check=False).returncode:
        raise BackendError("the digits could not be written for diffusers; the error is above")
    outcomes = run_all(parts(args.work), args.out, BUDGET_S)
    page = [sys.executable, "-m", "benchmarks.page", str(args.out), "--page", f"{args.out}.md"]
    page += ["--readme", str(args.readme)] if args.readme is not None else []
    if subprocess.run(page, check=False).returncode:
        raise BackendError("the page could not be written; the error is above")
    print(table(("part", "status", "seconds"), [(o.name, o.status, f"{o.seconds:.0f}") for o in outcomes]))
    bad = [f"{outcome.name} ({outcome.status})" for outcome in outcomes if outcome.status != "passed"]
    if bad:
        raise BackendError(f"these parts did not pass: {', '.join(bad)}; their output is above")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 where every part passed, else 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description="Every benchmark's short form.")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"), help="reports (default docs/benchmarks)")
    parser.add_argument("--work", type=Path, default=Path("build/bench"), help="bundles (default build/bench)")
    parser.add_argument("--readme", type=Path, help="file whose marked block gets the headline table")
    return run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
