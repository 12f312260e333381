"""A network on the CPU engine beside its own parts, each alone: what is lost between them.

The bound is the sum of every convolution and attention in a program of its own, run again and again so that its
operands lie in the caches, and of one pass of factor, shift and activation for every norm. What the network takes
beyond that are the norms' statistics, weights and maps that come from further away, and threads that wait.

    python -m benchmarks.native_bound ddpm-cifar10.engine --batches 1,8
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.core.environment import environment
from benchmarks.core.harness import make_parser, parse_numbers, run_benchmark
from benchmarks.core.measured_network import describe_bundle, real_inputs, reference_network
from benchmarks.core.pictures import draw_native_bound
from benchmarks.core.report import Check, Comparison, Missing, Report, Row, Value
from benchmarks.core.stats import paired_ratio
from benchmarks.core.timing import Variant, interleave
from engine.backends.native.lowering import build_program
from engine.backends.native.native_backend import NativeBackend, count_cores
from engine.backends.native.program import NONE, Builder, Code, MapShape, Operator, Program
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, ranges_name
from engine.errors import BackendError
from engine.networks.inputs import Conditions
from kernels.native.library import Engine, NativeError, Network, best_isa

ROUNDS, SHORT_ROUNDS = 24, 10
_AFFINE = 3
_WEIGHT = 0.05
FP32_RMS = 1e-5
"""Of the output, relative to its own root mean square."""

INT8_RMS = 0.02
"""Of the output, relative to its standard deviation."""


@dataclass(frozen=True, slots=True)
class Part:
    """An operator of a network as all that a program does. sources, extras: shapes of its operands."""

    operator: Operator
    sources: tuple[MapShape, ...]
    extras: tuple[MapShape, ...]
    dst: MapShape

    @property
    def name(self) -> str:
        """For a reader."""
        op, channels = self.operator, sum(shape.channels for shape in self.sources)
        size = f"{self.dst.height}x{self.dst.width}"
        if op.code is not Code.CONV:
            return f"{op.code.name.lower().replace('_', ' ')} {channels}, {size}"
        extra = f"+{sum(shape.channels for shape in self.extras)}" if self.extras else ""
        mode = "" if not op.mode else f" {op.mode.name.lower()}"
        stride = f" stride {op.stride}" if op.stride > 1 else ""
        return f"conv {op.kernel}x{op.kernel}{mode}{stride} {channels}{extra} to {self.dst.channels}, {size}"


def find_part(program: Program, operator: Operator) -> Part | None:
    """What of an operator is in the bound; None: nothing. Residuals are left out, because they cost almost nothing."""
    if operator.code not in (Code.CONV, Code.ATTENTION, Code.LINEAR_ATTENTION, Code.NORM):
        return None
    bare = dataclasses.replace(operator, dst=NONE, src=(), extra=(), add=NONE, row=NONE, weight=NONE, bias=NONE)
    bare = dataclasses.replace(bare, extra_weight=NONE, extra_bias=NONE)
    shapes = tuple(tuple(program.maps[m] for m in maps) for maps in (operator.src, operator.extra))
    return Part(bare, shapes[0], shapes[1], program.maps[operator.dst])


def part_program(part: Part) -> Program:
    """Input, what its operands need, the operator, output; the operator is the last but one."""
    builder, op = Builder(), part.operator
    first = part.sources[0]
    total = MapShape(sum(shape.channels for shape in part.sources), first.height, first.width)
    given = total if op.code is not Code.CONV else first
    entry = builder.new_map(given.channels, given.height, given.width)
    builder.emit(Operator(Code.INPUT, entry))

    def other(shape: MapShape) -> int:
        """Another operand: the input by a 1x1 convolution."""
        made = builder.new_map(shape.channels, given.height, given.width)
        weight = builder.weight(f"of map {made}", shape.channels, given.channels, 1, 1)
        builder.emit(Operator(Code.CONV, made, (entry,), weight=weight, kernel=1, stride=1))
        return made

    dst = builder.new_map(part.dst.channels, part.dst.height, part.dst.width)
    if op.code is Code.CONV:
        sources = (entry, *(other(shape) for shape in part.sources[1:]))
        extras = tuple(other(shape) for shape in part.extras)
        ends = (total.channels, part.dst.channels)
        placed = dataclasses.replace(
            op,
            dst=dst,
            src=sources,
            extra=extras,
            weight=builder.weight("weight", *ends, op.kernel, op.kernel),
            bias=builder.weight("bias", part.dst.channels),
            extra_weight=builder.weight("extra", ends[1], sum(s.channels for s in part.extras)) if extras else NONE,
        )
    elif op.code is Code.NORM:
        places = [builder.weight(name, part.dst.channels) for name in ("weight", "bias")]
        placed = dataclasses.replace(op, dst=dst, src=(entry,), kind=_AFFINE, weight=places[0], bias=places[1])
    else:
        memory = builder.weight("memory", 2, op.heads, op.memory, op.dim) if op.memory else NONE
        placed = dataclasses.replace(op, dst=dst, src=(entry,), weight=memory)
    builder.emit(placed)
    return builder.build(given.channels, 0, dst)


class Alone:
    """A part with random weights and input, its engine kept open."""

    def __init__(self, part: Part, precision: str, batch: int, threads: int) -> None:
        program, rng = part_program(part), np.random.default_rng(0)
        network = Network(program.words(), best_isa(precision))
        weights = _WEIGHT * rng.standard_normal(program.weight_count, np.float32)
        self._x = rng.standard_normal((batch, *network.input_shape), np.float32)
        self._engine = Engine(network, network.pack(weights), threads)
        self._index = len(program.operators) - 2

    def seconds(self) -> float:
        """Of the second of two runs."""
        self._engine.run(self._x, None)
        return float(self._engine.profile(self._x, None)[1][self._index])


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One batch. alone_ms: [parts], each as often as the network has it."""

    rows: list[Row]
    comparison: Comparison


def measure_batch(backend: NativeBackend, program: Program, batch: int, rounds: int, threads: int) -> Measured:
    """The whole network and its parts, in turn."""
    counts = Counter(part for op in program.operators if (part := find_part(program, op)) is not None)
    alone = {part: Alone(part, backend.precision, batch, threads) for part in counts}
    inputs = _inputs(backend, batch)
    taken: dict[Part, list[float]] = {part: [] for part in counts}

    def run_parts() -> None:
        for part, each in alone.items():
            taken[part].append(each.seconds())

    def sum_of_parts(work: Callable[[], object]) -> float:
        work()
        return 1e3 * sum(counts[part] * times[-1] for part, times in taken.items())

    variants = [
        Variant("network", lambda: backend(*inputs)),
        Variant("parts alone", run_parts, sum_of_parts),
    ]
    series = interleave(variants, rounds, title=f"batch {batch}")
    spent = np.median([backend.profile(*inputs)[1] for _ in range(rounds)], axis=0)
    in_network = dict.fromkeys(counts, 0.0)
    for op, seconds in zip(program.operators, spent.tolist(), strict=True):
        if (part := find_part(program, op)) is not None:
            in_network[part] += 1e3 * seconds
    case: dict[str, Value] = {"batch": batch, "precision": backend.precision}
    rows = [
        Row(
            {"part": part.name, **case},
            {
                "count": count,
                "alone_ms": 1e3 * count * float(np.median(taken[part])),
                "in_network_ms": in_network[part],
            },
        )
        for part, count in counts.items()
    ]
    rows.sort(key=lambda row: -float(row.metrics["in_network_ms"] or 0))
    ratio = paired_ratio(series["network"], series["parts alone"])
    total = {name: float(np.median(each.all_ms)) for name, each in series.items()}
    last = Row(
        {"part": "network", **case},
        {"count": 1, "alone_ms": total["parts alone"], "in_network_ms": total["network"]},
    )
    return Measured([*rows, last], Comparison(case, "network", "parts alone", ratio))


def _inputs(backend: NativeBackend, batch: int) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    config = backend.manifest.unet.config
    x = torch.randn(batch, config.in_channels, *config.image_size, generator=torch.Generator().manual_seed(0))
    y = None if config.num_classes is None else torch.zeros(batch, dtype=torch.int64)
    return x, torch.full((batch,), 500.0), Conditions(y)


def check_error(bundle: Bundle, backend: NativeBackend) -> Check:
    """rms error beside torch in fp32 on real trajectories: in bf16 at most that of torch's autocast."""
    inputs, network = real_inputs(bundle), reference_network(bundle)
    case = inputs.case
    got = backend(case.x_t, case.timestep, case.conditions)
    limit, what = FP32_RMS * _rms(inputs.wanted), "that of other orders of sums"
    if backend.precision == "bf16":
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rounded = network(**case.tensors()).float()
        limit, what = _rms(rounded - inputs.wanted), "that of torch's autocast"
    elif backend.precision == "int8":
        limit, what = INT8_RMS * float(inputs.wanted.std()), f"{INT8_RMS:.0%} of the output's standard deviation"
    error = _rms(got - inputs.wanted)
    return Check(
        f"native {backend.precision}: rms error beside fp32 torch, at most {what}",
        error <= limit,
        error,
        limit,
        "a kernel of the CPU engine rounds more than it should; run the tests of kernels/native",
    )


def _check_int8(bundle: Bundle, threads: int, missing: list[Missing]) -> list[Check]:
    """Its error alone: what its convolutions take is beside the others' in step_latency."""
    try:
        backend = NativeBackend.open(bundle, "int8", threads)
    except BackendError as error:
        missing.append(Missing("native int8", str(error)))
        return []
    check = check_error(bundle, backend)
    backend.close()
    return [check]


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def measure(args: argparse.Namespace, command: str) -> Report:
    """The report of a command line; raises UNetRTError for bad input."""
    bundle = Bundle.open(args.bundle)
    batches = parse_numbers(args.batches, "--batches")
    threads = args.threads or count_cores()
    rounds = SHORT_ROUNDS if args.short else ROUNDS
    opened, missing = list[NativeBackend](), list[Missing]()
    for precision in ("bf16", "fp32"):
        try:
            best_isa(precision)
            opened.append(NativeBackend.open(bundle, precision, threads))
        except (NativeError, BackendError) as error:
            missing.append(Missing(f"native {precision}", str(error)))
    if not opened:
        raise BackendError("; ".join(each.reason for each in missing))
    checks = [check_error(bundle, each) for each in opened]
    if bundle.has(ranges_name(UNET)):
        checks += _check_int8(bundle, threads, missing)
    program = build_program(bundle.manifest.unet.config)
    # What auto takes: the other precision is beside it in step_latency.
    measured = [measure_batch(opened[0], program, batch, rounds, threads) for batch in batches]
    return Report(
        benchmark="native_bound",
        command=command,
        environment=environment(args.threads),
        subject=describe_bundle(bundle),
        settings={"batches": list(batches), "rounds": rounds, "isa": opened[0].isa.name.lower()},
        rows=[row for each in measured for row in each.rows],
        comparisons=[each.comparison for each in measured],
        checks=checks,
        missing=missing,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 where a check failed, 2 for bad input."""
    parser = make_parser("native_bound", "The CPU engine's whole network beside the sum of its parts.")
    parser.add_argument("--batches", default="1,8", metavar="N,...", help="batches (default 1,8)")
    return run_benchmark("native_bound", parser, measure, draw_native_bound, argv)


if __name__ == "__main__":
    sys.exit(main())
