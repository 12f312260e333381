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
from collections.abc import Sequence

import torch
from tqdm import tqdm

from benchmarks.core.environment import environment
from benchmarks.core.harness import make_parser, parse_numbers, run_benchmark
from benchmarks.core.pictures import draw_kernels
from benchmarks.core.report import Report
from benchmarks.core.timing import device_for
from benchmarks.kernels.machine_limits import measure_limits
from benchmarks.kernels.network_shapes import NETWORKS, heaviest
from benchmarks.kernels.operator_measure import Budget, error_checks, measure_case
from benchmarks.kernels.providers import find_providers
from benchmarks.kernels.shapes import Place
from engine.errors import RequestError
from engine.threads import torch_threads

FULL, SHORT = Budget(30, 10.0), Budget(12, 1.0)
BATCHES: tuple[int, ...] = (1, 8, 16)
SHORT_BATCHES: tuple[int, ...] = (1, 8)
DTYPES = {"cpu": {"fp32": torch.float32}, "cuda": {"fp16": torch.float16, "bf16": torch.bfloat16}}


def parse_networks(text: str | None, short: bool) -> tuple[str, ...]:
    """Names out of "a,b"; without a text every network, or the first for the short form. Raises RequestError."""
    if text is None:
        return tuple(NETWORKS)[: 1 if short else None]
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in NETWORKS]:
        raise RequestError(f"unknown network {', '.join(unknown)!r}; --shapes takes some of {','.join(NETWORKS)}")
    return names


def measure(args: Namespace, command: str) -> Report:
    """Limits of the machine, then every case; raises RequestError for an unknown network or batch."""
    networks, batches = parse_networks(args.shapes, args.short), SHORT_BATCHES if args.short else BATCHES
    if args.batches is not None:
        batches = parse_numbers(args.batches, "--batches")
    device = device_for(torch.cuda.is_available())
    is_cuda, dtypes = device.kind.type == "cuda", DTYPES[device.kind.type]
    providers, missing = find_providers(device.kind)
    measured = []
    with torch_threads(args.threads), torch.no_grad():
        limits = measure_limits(device, dtypes)
        places = [Place(device, name, dtype, channels_last=is_cuda) for name, dtype in dtypes.items()]
        cases = [
            (network, shape, batch, place)
            for network in networks
            for shape in (heaviest(NETWORKS[network]) if args.short else NETWORKS[network])
            for batch in batches
            for place in (places[:1] if args.short else places)
        ]
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = make_parser(
        "kernels", "Time each operator beside torch's own and beside this machine's limits.", takes_bundle=False
    )
    parser.add_argument("--shapes", metavar="NAME,...", help=f"networks, of {','.join(NETWORKS)} (default all)")
    parser.add_argument("--batches", metavar="N,...", help="batches (default 1,8,16)")
    return run_benchmark("kernels", parser, measure, draw_kernels, argv)
