"""The time of one denoising step by batch, for every backend and precision, in turn in one run.

A step advances a full batch of slots by one row: network, gradient if --guided, update, noise and the host's work.
network_ms is a bare call of the network, timed in the same rounds; rest_ms what a step takes beyond it. images_per_s is
what sampling in --steps steps then gives: batch / (steps * p50 of a step). first_ms is the first step of a batch size,
warm_up_ms those after it that do not count. Peak memory is that of a process which opens nothing but the variant, at
the largest batch. Ratios are to --baseline, unless given the backend that "auto" takes; a report is red where a variant
computes in another precision than it says or wrongly, and where another variant at its precision is faster than auto.

    python -m benchmarks.step_latency x.engine --variants ov:fp32,ort:fp32 --batches 1,16
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.core.checks import not_slower, precision_checks
from benchmarks.core.environment import environment
from benchmarks.core.harness import choose, make_parser, parse_numbers, run_benchmark
from benchmarks.core.measured_network import (
    Name,
    RealInputs,
    describe_bundle,
    open_variants,
    parse_names,
    real_inputs,
)
from benchmarks.core.pictures import draw_step_latency
from benchmarks.core.report import Check, Comparison, Missing, Report, Row, Value
from benchmarks.core.stats import LEAST_ROUNDS, paired_ratio, spread
from benchmarks.steps.batch_measure import (
    SETTLE_BELOW_MS,
    MakeClock,
    Measured,
    clock_of,
    measure_batch,
    reason_against,
    settle_calls,
)
from benchmarks.steps.peak_memory import PeakMemory, in_child
from benchmarks.steps.slot_loop import SAMPLERS, StepKind, StepNetwork
from engine.backends.native.native_backend import count_cores
from engine.backends.protocol import Backend
from engine.backends.registry import open_backend, variants
from engine.bundle.bundle_folder import Bundle
from engine.errors import BackendError, RequestError, UNetRTError
from engine.sampling.sampler import Sampler
from export.verify import Difference

BATCHES, SHORT_BATCHES = (1, 2, 4, 8, 16, 32, 64), (1, 4, 16)
ROUNDS, SHORT_ROUNDS = 100, 40
SECONDS, SHORT_SECONDS = 1200.0, 60.0

Opener = Callable[[Bundle, Sequence[Name], int | None], tuple[dict[str, Backend], tuple[Missing, ...]]]
"""benchmarks.core.measured_network.open_variants, or what a test puts in its place."""


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for. baseline: None for what auto takes. rounds: at most; seconds: of all timing, about."""

    kind: StepKind
    names: tuple[Name, ...]
    baseline: Name | None
    batches: tuple[int, ...]
    rounds: int
    seconds: float
    memory: bool
    threads: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """What there is to measure. auto: the variant that auto takes, None where it is not among them."""

    bundle: Bundle
    networks: Mapping[str, StepNetwork]
    inputs: RealInputs
    auto: str | None
    baseline: str


def make_options(args: argparse.Namespace) -> Options:
    """The options of a command line; raises RequestError for values out of range."""
    rounds = choose(args.rounds, ROUNDS, SHORT_ROUNDS, args.short)
    if rounds < LEAST_ROUNDS:
        raise RequestError(f"--rounds is {rounds}; expected {LEAST_ROUNDS} or more, or ratios have no interval")
    baselines = (None,) if args.baseline is None else parse_names(args.baseline)
    if len(baselines) != 1:
        raise RequestError(f"--baseline names {len(baselines)} variants; expected one")
    batches = SHORT_BATCHES if args.short else BATCHES
    return Options(
        kind=StepKind(args.sampler, args.steps, args.guided),
        names=variants() if args.variants is None else parse_names(args.variants),
        baseline=baselines[0],
        batches=batches if args.batches is None else tuple(sorted(parse_numbers(args.batches, "--batches"))),
        rounds=rounds,
        seconds=choose(args.seconds, SECONDS, SHORT_SECONDS, args.short),
        memory=not args.no_memory,
        threads=args.threads,
    )


def open_run(bundle: Bundle, options: Options, opener: Opener) -> tuple[Run, tuple[Missing, ...]]:
    """Everything opened; raises BackendError where nothing opens, RequestError for a baseline that does not."""
    taken = open_backend(bundle, "auto", None, options.threads)
    auto: str | None = f"{taken.name} {taken.precision}"
    taken.close()
    names = options.names
    if options.baseline is not None and options.baseline not in names:
        names = (*names, options.baseline)
    backends, missing = opener(bundle, names, options.threads)
    if not backends:
        raise BackendError("no variant opens here: " + "; ".join(f"{m.variant}: {m.reason}" for m in missing))
    if auto not in backends:
        auto = None
    baseline = auto or next(iter(backends))
    if options.baseline is not None:
        baseline = " ".join(options.baseline)
        if baseline not in backends:
            reason = next((m.reason for m in missing if m.variant == baseline), "")
            raise RequestError(f"the baseline {baseline} does not open here ({reason}); choose another")
    samplers = {name: Sampler(backend, bundle, options.threads) for name, backend in backends.items()}
    networks = {
        name: StepNetwork(sampler, sampler.classifier_guidance() if options.kind.guided else None)
        for name, sampler in samplers.items()
    }
    return Run(bundle, networks, real_inputs(bundle), auto, baseline), missing


def measure_batches(run: Run, options: Options, make_clock: MakeClock) -> tuple[list[Measured], list[Missing]]:
    """From the smallest batch on, as long as the next fits the machine and the time."""
    measured: list[Measured] = []
    end = time.monotonic() + options.seconds
    for place, batch in enumerate(options.batches):
        last, left_s = measured[-1] if measured else None, end - time.monotonic()
        reason = reason_against(batch, last, left_s)
        if reason is None:
            # What a small batch leaves of its share goes to the larger ones.
            share_s, settle = left_s / (len(options.batches) - place), settle_calls(batch, last)
            try:
                found = measure_batch(
                    run.networks, options.kind, batch, run.inputs, options.rounds, share_s, settle, make_clock
                )
            except (MemoryError, torch.OutOfMemoryError) as error:
                reason = f"it does not fit the memory: {error}"
            else:
                measured.append(found)
                continue
        left_out = ", ".join(str(left) for left in options.batches[place:])
        return measured, [Missing(f"every variant at batch {left_out}", reason)]
    return measured, []


def peak_memories(run: Run, options: Options, batch: int) -> tuple[dict[str, PeakMemory], list[Missing]]:
    """By variant, each in a child; what the child of one could not do is missing."""
    if not options.memory:
        return {}, []

    def peak(name: str) -> PeakMemory | Missing:
        backend = run.networks[name].sampler.backend
        try:
            variant = (backend.name, backend.precision)
            return in_child(run.bundle.path, variant, batch, options.kind, options.threads)
        except UNetRTError as error:
            return Missing(f"{name} at batch {batch}, peak memory", str(error))

    # Nothing is timed any more, so the children may share the cores; on a GPU they would count each other's memory.
    names = list(run.networks)
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else count_cores()) as pool:
        found = dict(zip(names, pool.map(peak, names), strict=True))
    return (
        {name: value for name, value in found.items() if isinstance(value, PeakMemory)},
        [value for value in found.values() if isinstance(value, Missing)],
    )


def make_rows(measured: Sequence[Measured], kind: StepKind, peaks: Mapping[str, PeakMemory]) -> tuple[Row, ...]:
    """One for each batch and variant. peaks: at the last batch."""
    return tuple(
        _row(each, name, kind, peaks.get(name) if each is measured[-1] else None)
        for each in measured
        for name in each.steps
    )


def _case(measured: Measured, kind: StepKind) -> dict[str, Value]:
    return {"batch": measured.batch, "step": kind.name}


def _row(measured: Measured, name: str, kind: StepKind, peak: PeakMemory | None) -> Row:
    series, error = measured.steps[name], measured.errors[name]
    whole, network = spread(series.all_ms), spread(measured.networks[name].all_ms)
    return Row(
        {"variant": name, **_case(measured, kind)},
        whole.to_dict()
        | {
            "network_ms": network.p50_ms,
            "rest_ms": whole.p50_ms - network.p50_ms,
            "first_ms": series.first_ms,
            "warm_up_ms": sum(series.warm_up_ms),
            "images_per_s": measured.batch * 1e3 / (kind.steps * whole.p50_ms),
            "peak_memory_bytes": None if peak is None else peak.resident_bytes,
            "max_error": error.max_abs,
            "rms_error": error.relative,
        }
        | ({} if peak is None or peak.device_bytes is None else {"peak_gpu_bytes": peak.device_bytes}),
    )


def make_comparisons(run: Run, kind: StepKind, measured: Sequence[Measured]) -> tuple[Comparison, ...]:
    """Every variant beside the baseline."""
    return tuple(
        _compare(each, kind, name, run.baseline) for each in measured for name in each.steps if name != run.baseline
    )


def _compare(measured: Measured, kind: StepKind, name: str, baseline: str) -> Comparison:
    ratio = paired_ratio(measured.steps[name], measured.steps[baseline])
    return Comparison(_case(measured, kind), name, baseline, ratio)


def make_checks(run: Run, kind: StepKind, measured: Sequence[Measured]) -> tuple[Check, ...]:
    """That variants are what they say, that images are finite, that auto is the fastest at its precision."""
    checks: list[Check] = []
    for name, network in run.networks.items():
        errors = [each.errors[name] for each in measured]
        checks += precision_checks(name, network.sampler.backend.precision, _together(errors))
        checks.append(Check(f"{name}: its images are finite", all(each.finite[name] for each in measured)))
    for each in measured:
        if run.auto is None:
            continue
        precision = run.networks[run.auto].sampler.backend.precision
        checks += [
            not_slower(_compare(each, kind, run.auto, name))
            for name, network in run.networks.items()
            if network.sampler.backend.precision == precision and name != run.auto
        ]
    return tuple(checks)


def _together(errors: Sequence[Difference]) -> Difference:
    return Difference(
        # As in Difference.add: a NaN must stay.
        float(np.max([error.max_abs for error in errors])),
        sum(error.squares for error in errors),
        sum(error.wanted_squares for error in errors),
        sum(error.count for error in errors),
    )


def measure(args: argparse.Namespace, command: str, make_clock: MakeClock, opener: Opener) -> Report:
    """The report of a command line; raises UNetRTError for bad input."""
    options, bundle = make_options(args), Bundle.open(args.bundle)
    run, unopened = open_run(bundle, options, opener)
    measured, too_large = measure_batches(run, options, make_clock)
    if not measured:
        raise BackendError(f"nothing could be measured: {too_large[0].reason}")
    peaks, unmeasured = peak_memories(run, options, measured[-1].batch)
    for network in run.networks.values():
        network.sampler.close()
    settings = dataclasses.asdict(options) | {
        "names": [" ".join(name) for name in options.names],
        "baseline": run.baseline,
        "auto": run.auto,
        "settle_below_ms": SETTLE_BELOW_MS,
        "batches": list(options.batches),
    }
    return Report(
        benchmark="step_latency",
        command=command,
        environment=environment(options.threads),
        subject=describe_bundle(bundle),
        settings=settings,
        rows=make_rows(measured, options.kind, peaks),
        comparisons=make_comparisons(run, options.kind, measured),
        checks=make_checks(run, options.kind, measured),
        missing=(*unopened, *too_large, *unmeasured),
    )


def main(argv: Sequence[str] | None = None, make_clock: MakeClock = clock_of, opener: Opener = open_variants) -> int:
    """The command; returns its exit status: 0, 1 where a check failed, 2 for bad input."""
    parser = make_parser("step_latency", "Time of one denoising step, by batch and backend.")
    parser.add_argument("--variants", help="such as ov:fp32,ort:fp32 (default: every one that opens here)")
    parser.add_argument("--baseline", help="variant that ratios are to (default: what auto takes, else the first)")
    parser.add_argument("--batches", help="such as 1,4,16 (default 1 to 64 by doubling; 1,4,16 with --short)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm", help="default ddpm, which adds noise")
    parser.add_argument("--steps", type=int, default=50, help="of the sampler's table (default 50)")
    parser.add_argument("--guided", action="store_true", help="by the bundle's classifier")
    parser.add_argument("--rounds", type=int, help=f"at most, of each batch (default {ROUNDS}, short {SHORT_ROUNDS})")
    parser.add_argument(
        "--seconds", type=float, help=f"of all timing, about (default {SECONDS:.0f}, short {SHORT_SECONDS:.0f})"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out, which takes processes")

    def work(args: argparse.Namespace, command: str) -> Report:
        return measure(args, command, make_clock, opener)

    return run_benchmark("step_latency", parser, work, draw_step_latency, argv)


if __name__ == "__main__":
    sys.exit(main())
