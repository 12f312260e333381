"""The same network and the same work in what users would pick instead, each at its best honest setting, in one run.

Every contender makes whole images by DDIM and DDPM, unguided and guided by a classifier. They take turns of a few
steps, and images_per_s is batch / (setup + steps * median step + finish); sum_s is the plain sum. Before each turn a
contender repeats its network call untimed, unless the turn before was its own. On a GPU whole calls take turns instead.
Ratios are time / time of ours. DDIM starts from the same x_T everywhere and must give the same images; on the shipped
digits the evaluator must read everybody's images as well as ours. first_call_s: opening, compiling and a first short
chain; exports are not in it. Where time is short the slowest are left out, and the report says so.

    python -m benchmarks.peers digits.engine --classifier assets/classifier.pt --short
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.harness import make_parser, run_benchmark
from benchmarks.peer_contenders import OURS, Entrant, Subject, entrants_of
from benchmarks.peer_files import checkpoint_of, classifier_of
from benchmarks.peer_loops import Setting, parse_settings, reason_against_loop
from benchmarks.peer_measure import SETTLE, WARM_UP_STEPS, TimePlan, open_entrants
from benchmarks.peer_picture import draw
from benchmarks.peer_quality import is_digits
from benchmarks.peer_tasks import SCALE, make_comparisons, make_rows, make_task, measure_task
from benchmarks.report import Check, Comparison, Missing, Report, Row
from benchmarks.subject import describe_bundle, reference_network
from engine.bundle.folder import Bundle
from engine.errors import BackendError, RequestError
from engine.threads import torch_threads

SETTINGS = "ddim50,ddpm250"
BATCH, SHORT_BATCH = 16, 1
ROUNDS, SHORT_ROUNDS = 2, 1
SHORT_SECONDS = 215.0
OPENING_SHARE = 0.4
"""Of all seconds, for opening and compiling."""

MakeEntrants = Callable[[Subject], Sequence[Entrant]]
"""benchmarks.peer_contenders.entrants_of, or what a test puts in its place."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. rounds: chains of a setting. seconds: of everything, about; infinite unless given."""

    settings: tuple[Setting, ...]
    batch: int
    rounds: int
    seconds: float
    threads: int | None


def make_options(args: argparse.Namespace) -> Options:
    """The options of a command line; raises RequestError for values out of range."""
    batch = args.batch if args.batch is not None else SHORT_BATCH if args.short else BATCH
    rounds = args.rounds if args.rounds is not None else SHORT_ROUNDS if args.short else ROUNDS
    for name, value in (("batch", batch), ("rounds", rounds), ("threads", args.threads)):
        if value is not None and value < 1:
            raise RequestError(f"--{name} is {value}; expected 1 or more")
    seconds = args.seconds if args.seconds is not None else SHORT_SECONDS if args.short else float("inf")
    return Options(parse_settings(args.settings), batch, rounds, seconds, args.threads)


def measure(args: argparse.Namespace, command: str, make_entrants: MakeEntrants) -> Report:
    """The report of a command line; raises UNetRTError for bad input."""
    options, bundle = make_options(args), Bundle.open(args.bundle)
    checkpoint, classifier = checkpoint_of(bundle, args.checkpoint), classifier_of(bundle, args.classifier)
    reason = reason_against_loop(bundle.manifest.config, bundle.manifest.diffusion)
    if reason is not None:
        raise RequestError(f"{bundle.path} cannot be compared: {reason}")
    for setting in options.settings:
        setting.timesteps(bundle.manifest.diffusion)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch_threads(options.threads), tempfile.TemporaryDirectory() as folder:
        subject = Subject(
            bundle, reference_network(bundle), classifier, checkpoint, device, options.batch, options.threads,
            Path(folder),
        )  # fmt: skip
        return _report(subject, options, command, make_entrants)


def _report(subject: Subject, options: Options, command: str, make_entrants: MakeEntrants) -> Report:
    has_classifier = subject.bundle.manifest.classifier is not None
    guided_too = (False, True) if has_classifier else (False,)
    pairs = [(setting, guided) for setting in options.settings for guided in guided_too]
    end = time.monotonic() + options.seconds
    first = make_task(subject, Setting("ddim", WARM_UP_STEPS), False, 0)
    opened, missing = open_entrants(make_entrants(subject), first, OPENING_SHARE * options.seconds)
    if not opened or not opened[0].contender.name.startswith(OURS):
        raise BackendError(f"{OURS} does not open: {missing[0].reason}")
    if not has_classifier:
        missing.append(Missing("every contender, guided", "the bundle holds no classifier"))
    reads_digits = is_digits(subject.bundle)
    rows, checks, comparisons = list[Row](), list[Check](), list[Comparison]()
    for number, (setting, guided) in enumerate(pairs, start=1):
        tasks = [make_task(subject, setting, guided, seed) for seed in range(options.rounds)]
        later_steps = options.rounds * sum(later.steps for later, _ in pairs[number:])
        plan = TimePlan(end, later_steps, is_first=number == 1)
        outcome, unable = measure_task(subject, options.rounds, opened, tasks, plan)
        missing += unable
        if outcome is None:
            continue
        more_rows, more_checks = make_rows(outcome, reads_digits)
        rows, checks, comparisons = rows + more_rows, checks + more_checks, comparisons + make_comparisons(outcome)
    if not rows:
        raise BackendError(f"{OURS} cannot do any setting: " + "; ".join(each.reason for each in missing))
    return Report(
        benchmark="peers",
        command=command,
        environment=environment(options.threads),
        subject=describe_bundle(subject.bundle),
        settings={
            "settings": [setting.name for setting in options.settings],
            "batch": options.batch,
            "rounds": options.rounds,
            "settle": SETTLE,
            "guidance_scale": SCALE,
            "seconds": None if options.seconds == float("inf") else options.seconds,
            "precisions": {each.contender.name: each.contender.precision for each in opened},
            "first_call_s": {each.contender.name: each.first_call_s for each in opened},
            "unit": "whole call" if subject.device.type == "cuda" else "step",
        },
        rows=rows,
        comparisons=comparisons,
        checks=checks,
        missing=missing,
    )


def main(argv: Sequence[str] | None = None, make_entrants: MakeEntrants = entrants_of) -> int:
    """The command; returns its exit status: 0, 1 where a check failed, 2 for bad input."""
    parser = make_parser("peers", "End-to-end images/s beside what users would pick instead.")
    parser.add_argument("--checkpoint", type=Path, help="what the bundle was exported from: a diffusers folder, a file")
    parser.add_argument("--classifier", type=Path, help="file of the bundle's classifier, for the peers' gradient")
    parser.add_argument("--settings", default=SETTINGS, help=f"samplers and their steps (default {SETTINGS})")
    parser.add_argument("--batch", type=int, help=f"images of a call (default {BATCH}, short {SHORT_BATCH})")
    parser.add_argument(
        "--rounds", type=int, help=f"chains of each setting, other seeds (default {ROUNDS}, short {SHORT_ROUNDS})"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help=f"of everything, about (default any; short {SHORT_SECONDS:.0f}): the slow are left out",
    )

    def work(args: argparse.Namespace, command: str) -> Report:
        return measure(args, command, make_entrants)

    return run_benchmark("peers", parser, work, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
