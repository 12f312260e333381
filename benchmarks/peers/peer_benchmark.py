"""The same network and the same work in what users would pick instead, each at its best honest setting, in one run.

Every contender makes a whole batch of images by DDIM (eta 0) in one short call, unguided and guided by a classifier;
calls take turns A B B A. images_per_s is batch / the median call. Ratios are time / time of ours. All start from the
same x_T and must make the same images: psnr_db says how near each comes to our fp32 ones, and a report is red where
one does not. first_call_s: opening, compiling and the first call; exports are not in it.

    python -m benchmarks.peers digits.engine --classifier assets/classifier.pt --diffusers digits-diffusers --short
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.core.environment import environment
from benchmarks.core.harness import check_least, choose, make_parser, run_benchmark
from benchmarks.core.measured_network import describe_bundle, reference_network
from benchmarks.core.pictures import draw_peers
from benchmarks.core.report import Check, Comparison, Missing, Report, Row, Value
from benchmarks.core.stats import LEAST_ROUNDS, paired_ratio, spread
from benchmarks.core.timing import Series, Variant, interleave
from benchmarks.peers import ddim_loop
from benchmarks.peers.contender import Contender, Entrant
from benchmarks.peers.ddim_loop import SCALE, Task
from benchmarks.peers.entrants import OURS, Subject, check_checkpoint, entrants_of, ours, read_classifier
from engine.bundle.bundle_folder import Bundle
from engine.errors import BackendError, RequestError, UNetRTError
from engine.threads import torch_threads
from judging.metrics import psnr

STEPS, SHORT_STEPS = 50, 10
BATCH, SHORT_BATCH = 16, 1
ROUNDS, SHORT_ROUNDS = 16, 12
LEAST_PSNR_DB, LEAST_HALF_PSNR_DB = 40.0, 25.0
"""Of images beside those of fp32 from the same x_T, in fp32 and in fewer bits; two fp32 libraries agree to 60 dB and
better."""
BETWEEN_RUNS, BETWEEN_COMPILES = 0.045, 0.14
"""Added to both sides of an interval: what one run cannot see of itself. In four runs on two AVX-512 cores ratios had a
standard deviation of 1.7 % beyond what their intervals allow for, those of torch.compile 5.5 %, since it makes other
code each time; 2.58 times that is 99 %."""

MakeEntrants = Callable[[Subject], Sequence[Entrant]]
"""benchmarks.peers.entrants.entrants_of, or what a test puts in its place."""


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A contender that is open. first_call_s: opening it, compiling, and its first call."""

    contender: Contender
    first_call_s: float


def open_entrants(entrants: Sequence[Entrant], task: Task) -> tuple[list[Opened], list[Missing]]:
    """Those that open here and can do a task, in order; and those that cannot, and why."""
    opened, missing = list[Opened](), list[Missing]()
    for entrant in entrants:
        try:
            entrant.prepare()
            start = time.perf_counter()
            contender = entrant.open()
            if (reason := contender.reason_against(task)) is None:
                contender.sample(task)
                opened.append(Opened(contender, time.perf_counter() - start))
                continue
        except (UNetRTError, RuntimeError, OSError) as error:
            reason = _one_line(error)
        missing.append(Missing(entrant.name, reason))
    return opened, missing


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One task, everything by contender. images: [B, C, H, W] of the last call."""

    task: Task
    contenders: Mapping[str, Contender]
    series: Mapping[str, Series]
    images: Mapping[str, Tensor]

    @property
    def case(self) -> dict[str, Value]:
        """Of a report's rows."""
        return {"steps": self.task.steps, "guided": self.task.guided, "batch": len(self.task.classes)}


def measure_task(opened: Sequence[Opened], task: Task, rounds: int) -> tuple[Measured | None, list[Missing]]:
    """Whole calls of all that can do a task, in turn; None where ours, the first of them, cannot."""
    able, missing = dict[str, Contender](), list[Missing]()
    for contender in (each.contender for each in opened):
        if (reason := contender.reason_against(task)) is None:
            able[contender.name] = contender
        else:
            missing.append(Missing(f"{contender.name}, {task.name}", reason))
    if opened[0].contender.name not in able:
        return None, missing
    images: dict[str, Tensor] = {}

    def call(name: str) -> None:
        images[name] = able[name].sample(task)

    variants = [Variant(name, partial(call, name)) for name in able]
    series = interleave(variants, rounds, warm_up=1, settle=0, title=task.name)
    return Measured(task, able, series, images), missing


def same_images(name: str, precision: str, images: Tensor, wanted: Tensor) -> tuple[float | None, Check]:
    """The PSNR in dB of images beside those of fp32 from the same x_T, None for NaN, and that it is high enough."""
    value = psnr(images, wanted).whole if bool(torch.isfinite(images).all()) else None
    limit = LEAST_PSNR_DB if precision == "fp32" else LEAST_HALF_PSNR_DB
    return value, Check(
        f"{name}: the same images as ours in fp32, dB ({precision})",
        value is not None and value >= limit,
        value,
        limit,
        "it does not do the same work, so its time says nothing; compare its schedule, clipping and weights",
    )


def make_rows(measured: Measured, first_call_s: Mapping[str, float], wanted: Tensor) -> tuple[list[Row], list[Check]]:
    """A row for each contender, and the checks of its images. wanted: our fp32 images of the task."""
    rows, checks = [], []
    for name, contender in measured.contenders.items():
        times = spread(measured.series[name].all_ms)
        value, check = same_images(f"{name}, {measured.task.name}", contender.precision, measured.images[name], wanted)
        checks.append(check)
        metrics = {
            "images_per_s": len(measured.task.classes) * 1e3 / times.p50_ms,
            "call_p50_ms": times.p50_ms,
            "call_p10_ms": times.p10_ms,
            "call_p90_ms": times.p90_ms,
            "calls": times.count,
            "first_call_s": first_call_s[name],
            "psnr_db": value,
        }
        rows.append(Row({"contender": name, "precision": contender.precision, **measured.case}, metrics))
    return rows, checks


def make_comparisons(measured: Measured) -> list[Comparison]:
    """Every contender beside ours."""
    baseline, *others = measured.contenders.values()
    return [
        Comparison(
            measured.case,
            each.name,
            baseline.name,
            paired_ratio(
                measured.series[each.name],
                measured.series[baseline.name],
                between_runs=BETWEEN_COMPILES if each.is_compiled else BETWEEN_RUNS,
            ),
        )
        for each in others
    ]


def measure(args: argparse.Namespace, command: str, make_entrants: MakeEntrants) -> Report:
    """The report of a command line; raises UNetRTError for bad input."""
    bundle = Bundle.open(args.bundle)
    steps = choose(args.steps, STEPS, SHORT_STEPS, args.short)
    batch = choose(args.batch, BATCH, SHORT_BATCH, args.short)
    rounds = choose(args.rounds, ROUNDS, SHORT_ROUNDS, args.short)
    least = {"--steps": (steps, 1), "--batch": (batch, 1), "--rounds": (rounds, LEAST_ROUNDS)}
    for option, (value, limit) in (least | {"--threads": (args.threads, 1)}).items():
        check_least(option, value, limit)
    reason = ddim_loop.reason_against(bundle.manifest.unet.config, bundle.manifest.diffusion)
    if reason is not None:
        raise RequestError(f"{bundle.path} cannot be compared: {reason}")
    ddim_loop.timesteps(bundle.manifest.diffusion, steps)
    check_checkpoint(bundle, args.checkpoint)
    classifier = read_classifier(bundle, args.classifier)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch_threads(args.threads), tempfile.TemporaryDirectory() as folder:
        subject = Subject(
            bundle, reference_network(bundle), classifier, args.checkpoint, args.diffusers, device, batch,
            args.threads, Path(folder),
        )  # fmt: skip
        return _report(subject, steps, rounds, command, make_entrants)


def _report(subject: Subject, steps: int, rounds: int, command: str, make_entrants: MakeEntrants) -> Report:
    opened, missing = open_entrants(make_entrants(subject), subject.task(steps, guided=False))
    if not opened or not opened[0].contender.name.startswith(OURS):
        raise BackendError(f"{OURS} does not open: {missing[0].reason}")
    first_call_s = {each.contender.name: each.first_call_s for each in opened}
    reference = ours(subject, "eager", "fp32")
    rows, checks, comparisons = list[Row](), list[Check](), list[Comparison]()
    for guided in (False, True):
        task = subject.task(steps, guided)
        measured, unable = measure_task(opened, task, rounds)
        missing += unable
        if measured is None:
            continue
        more_rows, more_checks = make_rows(measured, first_call_s, reference.sample(task))
        rows, checks, comparisons = rows + more_rows, checks + more_checks, comparisons + make_comparisons(measured)
    return Report(
        benchmark="peers",
        command=command,
        environment=environment(subject.threads),
        subject=describe_bundle(subject.bundle),
        settings={
            "sampler": "ddim, eta 0",
            "steps": steps,
            "batch": subject.batch,
            "rounds": rounds,
            "warm_up_calls": 2,
            "guidance_scale": SCALE,
        },
        rows=rows,
        comparisons=comparisons,
        checks=checks,
        missing=missing,
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def main(argv: Sequence[str] | None = None, make_entrants: MakeEntrants = entrants_of) -> int:
    """The command; returns its exit status: 0, 1 where a check failed, 2 for bad input."""
    parser = make_parser("peers", "End-to-end images/s beside what users would pick instead.")
    parser.add_argument("--checkpoint", type=Path, help="what the bundle was exported from, for its own package")
    parser.add_argument("--classifier", type=Path, help="file of the bundle's classifier, for the peers' gradient")
    parser.add_argument("--diffusers", type=Path, help="folder of the same network that diffusers wrote")
    parser.add_argument("--steps", type=int, help=f"of a call (default {STEPS}, short {SHORT_STEPS})")
    parser.add_argument("--batch", type=int, help=f"images of a call (default {BATCH}, short {SHORT_BATCH})")
    parser.add_argument("--rounds", type=int, help=f"of two calls each (default {ROUNDS}, short {SHORT_ROUNDS})")

    def work(args: argparse.Namespace, command: str) -> Report:
        return measure(args, command, make_entrants)

    return run_benchmark("peers", parser, work, draw_peers, argv)
