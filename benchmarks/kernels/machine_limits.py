"""What this machine can do at its best, measured: bytes moved and multiply-adds done in a second, by torch.

Bandwidth is the better of a copy (2 N bytes) and a triad, a = b + 3 c (3 N bytes; McCalpin, STREAM, 1995), at several
sizes, since what fits a cache is faster than memory. FLOP/s are those of a large square matrix product, 2 n^3.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.core.report import Row
from benchmarks.core.stats import spread
from benchmarks.core.timing import Series, Variant, interleave, per_call
from engine.device import Device

MIB = 1 << 20
LEAST_BYTES, LARGE_BYTES = MIB // 4, 256 * MIB
CACHES = 4
"""The largest size is at least this many times the last cache, of which then no more than a quarter can hit."""
MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
ROUNDS, LEAST_ROUNDS, BUDGET_S = 40, 2, 0.4
"""Of each measurement. A limit is the best of them: what the machine does undisturbed."""


@dataclass(frozen=True, slots=True, eq=False)
class Limits:
    """sizes_bytes: moved by one call, rising; bandwidths: bytes a second at each. flops: FLOP/s by precision."""

    sizes_bytes: tuple[int, ...]
    bandwidths: tuple[float, ...]
    flops: Mapping[str, float]
    rows: tuple[Row, ...] = ()

    @property
    def memory_bandwidth(self) -> float:
        """Bytes a second beyond the caches."""
        return self.bandwidths[-1]

    def bandwidth_at(self, moved_bytes: int) -> float:
        """Bytes a second of work that moves so many, between the measured sizes linear in their logarithm.

        No size is slower than a larger one, whatever else the machine did while it was measured.
        """
        rising = np.maximum.accumulate(self.bandwidths[::-1])[::-1]
        return float(np.interp(math.log(moved_bytes), np.log(self.sizes_bytes), rising))

    def least_ms(self, moved_bytes: int, flops: float, precision: str) -> float:
        """The time below which no operator of this size can be: the roofline of Williams et al. (2009)."""
        return 1e3 * max(moved_bytes / self.bandwidth_at(moved_bytes), flops / self.flops[precision])


def measure_limits(device: Device, precisions: Mapping[str, torch.dtype], sizes_bytes: Sequence[int] = ()) -> Limits:
    """The limits of a device; sizes_bytes: rising, where not those of `sizes`."""
    chosen = tuple(sizes_bytes) or sizes(device.kind)
    rows, bandwidths = [], []
    for size in chosen:
        found = _times([per_call(name, work, device) for name, work in _movers(size, device.kind).items()])
        bandwidths.append(max(size / _best_s(series) for series in found.values()))
        rows += [_row(f"memory {name}", f"{size / MIB:g} MiB", series, size, 0) for name, series in found.items()]
    flops = {}
    side = MATRIX_SIDE[device.kind.type]
    for precision, dtype in precisions.items():
        series = _product(device, side, dtype)
        flops[precision] = 2 * side**3 / _best_s(series)
        moved = 3 * side**2 * dtype.itemsize
        rows.append(_row("matrix product", f"{side} x {side}", series, moved, 2 * side**3, precision))
    return Limits(chosen, tuple(bandwidths), flops, tuple(rows))


def sizes(device: torch.device) -> tuple[int, ...]:
    """Bytes moved by a call, four times as many from one to the next, up to well beyond the caches."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _last_cache()
    largest = max(LARGE_BYTES, CACHES * cache)
    count = math.ceil(math.log(largest / LEAST_BYTES, 4)) + 1
    return tuple(LEAST_BYTES * 4**i for i in range(count))


def _last_cache() -> int:
    """Bytes of one processor's last cache, 0 where the system does not say."""
    try:
        return max(0, os.sysconf("SC_LEVEL3_CACHE_SIZE"))
    except (ValueError, OSError):
        return 0


def _movers(size_bytes: int, device: torch.device) -> dict[str, _Mover]:
    """A copy and a triad that move size_bytes each."""
    # Written before they are read: a page that was never written is the one page of zeros.
    copied = [torch.full((size_bytes // 8,), 1.5, device=device) for _ in range(2)]
    triad = [torch.full((size_bytes // 12,), 1.5, device=device) for _ in range(3)]
    return {"copy": _Mover(copied), "triad": _Mover(triad)}


@dataclass(frozen=True, slots=True, eq=False)
class _Mover:
    arrays: list[Tensor]

    def __call__(self) -> Tensor:
        target, source, *third = self.arrays
        return torch.add(source, third[0], alpha=3.0, out=target) if third else target.copy_(source)


def _product(device: Device, side: int, dtype: torch.dtype) -> Series:
    a, b = (torch.randn(side, side, device=device.kind).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return _times([per_call("product", lambda: torch.mm(a, b, out=out), device)])["product"]


def _times(variants: Sequence[Variant]) -> dict[str, Series]:
    return interleave(variants, ROUNDS, settle=0, budget_s=BUDGET_S, least_rounds=LEAST_ROUNDS, title="limits")


def _best_s(series: Series) -> float:
    return float(series.all_ms.min()) / 1e3


def _row(operator: str, shape: str, series: Series, moved_bytes: int, flops: int, precision: str | None = None) -> Row:
    """Times, and what was achieved in the best of them."""
    times, seconds = spread(series.all_ms), _best_s(series)
    return Row(
        {
            "network": None,
            "operator": operator,
            "shape": shape,
            "batch": None,
            "precision": precision,
            "provider": "torch",
        },
        {
            "p50_ms": times.p50_ms,
            "p10_ms": times.p10_ms,
            "p90_ms": times.p90_ms,
            "moved_bytes": moved_bytes,
            "flops": flops,
            "gb_per_s": moved_bytes / seconds / 1e9,
            "gflop_per_s": flops / seconds / 1e9,
        },
    )
