"""Each operator by each implementation, beside torch's own and beside what this machine can do.

    python -m benchmarks.kernels --short                        # ddpm-cifar10's largest shapes, batches 1 and 8
    python -m benchmarks.kernels --shapes adm-64,digits --batches 1,16

On a GPU the Triton kernels are measured in fp16 and bf16, captured in graphs as the engine runs them; on a CPU torch's
operators in fp32. Operands stay in the caches where they fit, as they do between the layers of a network. So
of_bandwidth, a fraction of what memory beyond the caches gives, may be above 1; of_roof, the least time on this
machine / the time, takes the bandwidth measured at the operator's own size.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tqdm import tqdm

from benchmarks.device_timing import device_for
from benchmarks.environment import environment
from benchmarks.harness import make_parser, run_benchmark
from benchmarks.kernel_cases import NETWORKS, heaviest
from benchmarks.kernel_measure import Budget, error_checks, measure_case
from benchmarks.kernel_picture import draw
from benchmarks.kernel_providers import find_providers
from benchmarks.kernel_shapes import Place, Shape
from benchmarks.machine_limits import measure_limits
from benchmarks.report import Report
from engine.errors import RequestError

FULL, SHORT = Budget(30, 10.0), Budget(12, 1.0)
BATCHES, SHORT_BATCHES = (1, 8, 16), (1, 8)
DTYPES = {"cpu": {"fp32": torch.float32}, "cuda": {"fp16": torch.float16, "bf16": torch.bfloat16}}


def parse_networks(text: str | None, short: bool) -> tuple[str, ...]:
    """Names out of "a,b"; without a text every network, or the first for the short form. Raises RequestError."""
    if text is None:
        return tuple(NETWORKS)[: 1 if short else None]
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in NETWORKS]:
        raise RequestError(f"unknown network {', '.join(unknown)!r}; --shapes takes some of {','.join(NETWORKS)}")
    return names


def parse_batches(text: str | None, short: bool) -> tuple[int, ...]:
    """Batches out of "1,8"; raises RequestError."""
    if text is None:
        return SHORT_BATCHES if short else BATCHES
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise RequestError(f"--batches is {text!r}; expected whole numbers from 1 up, for example 1,8,16")
    return tuple(dict.fromkeys(int(part) for part in parts))


def measure(args: Namespace, command: str) -> Report:
    """Limits of the machine, then every case; raises RequestError for an unknown network or batch."""
    networks, batches = parse_networks(args.shapes, args.short), parse_batches(args.batches, args.short)
    device = device_for(torch.cuda.is_available())
    is_cuda, dtypes = device.kind.type == "cuda", DTYPES[device.kind.type]
    providers, missing = find_providers(device.kind, args.compile)
    measured = []
    with _threads(args.threads), torch.no_grad():
        # The update is float32 on a GPU too.
        limits = measure_limits(device, dtypes | {"fp32": torch.float32})
        places = [Place(device, name, dtype, channels_last=is_cuda) for name, dtype in dtypes.items()]
        cases = list(_cases(networks, batches, places[:1] if args.short else places, args.short))
        for network, shape, batch, place in tqdm(cases, "kernels", disable=not sys.stderr.isatty()):
            budget = SHORT if args.short else FULL
            measured.append(measure_case(network, shape, batch, place, providers, limits, budget))
    return Report(
        benchmark="kernels",
        command=command,
        environment=environment(args.threads),
        subject={"name": ", ".join(networks)},
        settings={
            "networks": list(networks),
            "batches": list(batches),
            "short": args.short,
            "layout": "channels-last" if is_cuda else "NCHW",
            "memory_bytes_per_s": limits.memory_bandwidth,
            "flop_per_s": dict(limits.flops),
            "bytes_per_s_by_size": dict(zip(map(str, limits.sizes_bytes), limits.bandwidths, strict=True)),
        },
        rows=[*limits.rows, *(row for each in measured for row in each.rows)],
        comparisons=[comparison for each in measured for comparison in each.comparisons],
        checks=error_checks(error for each in measured for error in each.errors),
        missing=missing,
    )


def _cases(
    networks: Sequence[str], batches: Sequence[int], places: Sequence[Place], short: bool
) -> Iterator[tuple[str, Shape, int, Place]]:
    """Each once: an update is the same in every precision of the network."""
    for network in networks:
        for shape in heaviest(NETWORKS[network]) if short else NETWORKS[network]:
            by_precision = {shape.precision(place): place for place in reversed(places)}
            for batch in batches:
                for place in by_precision.values():
                    yield network, shape, batch, place


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """torch on so many CPU threads, as many as it had where None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = make_parser(
        "kernels", "Time each operator beside torch's own and beside this machine's limits.", takes_bundle=False
    )
    parser.add_argument("--shapes", metavar="NAME,...", help=f"networks, of {','.join(NETWORKS)} (default all)")
    parser.add_argument("--batches", metavar="N,...", help="batches (default 1,8,16)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the norms, which takes minutes")
    return run_benchmark("kernels", parser, measure, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
