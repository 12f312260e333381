"""8-bit convolutions of the CPU engine: which can be, and the file of a bundle that says which are.

A 3x3 convolution whose block lets it be (int8_convolutions) and whose input a norm writes for it alone can read that
input as bytes. The file is JSON:

    {"format": 1, "convolutions": {"blocks.3.conv1": {"scale": 0.0123, "zero": 23}, ...}}
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.backends.native.program import Code, Mode, Operator, Program
from engine.errors import BackendError

FORMAT = 1
LARGEST_BYTE = 255
MOST_PRODUCTS = 66000
"""Whose sum the engine's int32 holds."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """What the bytes of a convolution's input stand for: (byte - zero) * scale."""

    scale: float
    zero: int


def find_candidates(program: Program) -> dict[str, int]:
    """The convolutions that can read bytes, by name such as "blocks.3.conv1": the maps that they read."""
    names = {weight.place: weight.name.removesuffix(".weight") for weight in program.weights}
    written_by = {operator.dst: operator.code for operator in program.operators}
    readers: dict[int, int] = {}
    for operator in program.operators:
        for source in (*operator.src, *operator.extra, operator.add):
            readers[source] = readers.get(source, 0) + 1
    return {
        names[operator.weight]: operator.src[0]
        for operator in program.operators
        if _can_read_bytes(program, operator, names)
        and written_by[operator.src[0]] is Code.NORM
        and readers[operator.src[0]] == 1
    }


def _can_read_bytes(program: Program, operator: Operator, names: Mapping[int, str]) -> bool:
    is_plain = operator.code is Code.CONV and operator.mode is Mode.PLAIN and operator.stride == 1
    if not is_plain or operator.kernel != 3 or len(operator.src) != 1:
        return False
    products = program.maps[operator.src[0]].channels * operator.kernel**2
    return names[operator.weight] in program.int8_names and products <= MOST_PRODUCTS


def with_int8(program: Program, ranges: Mapping[str, ByteRange]) -> Program:
    """The program with these convolutions in int8; raises BackendError for a name that is no candidate."""
    candidates = find_candidates(program) if ranges else {}
    unknown = sorted(set(ranges) - set(candidates))
    if unknown:
        raise BackendError(
            f"{unknown[0]} cannot be computed in int8: it is no 3x3 convolution of a ResBlock behind a norm; build the "
            "bundle again with: python -m export.to_trt CHECKPOINT --native-int8"
        )
    maps = list(program.maps)
    for name, found in ranges.items():
        index = candidates[name]
        maps[index] = dataclasses.replace(maps[index], scale=found.scale, zero=found.zero)
    return dataclasses.replace(program, maps=tuple(maps))


def write_ranges(path: Path, ranges: Mapping[str, ByteRange]) -> None:
    """Write the file; raises OSError."""
    convolutions = {name: dataclasses.asdict(found) for name, found in ranges.items()}
    path.write_text(json.dumps({"format": FORMAT, "convolutions": convolutions}, indent=1) + "\n", encoding="utf-8")


def read_ranges(path: Path) -> dict[str, ByteRange]:
    """The convolutions of a file and their ranges; raises BackendError for anything that is no such file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise BackendError(f"{path} has format {data['format']}; this version reads {FORMAT}")
        return {str(name): _read_range(entry) for name, entry in data["convolutions"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackendError(f"{path} holds no ranges of int8 convolutions ({error}); export the bundle again") from error


def _read_range(entry: Mapping[str, Any]) -> ByteRange:
    scale, zero = float(entry["scale"]), entry["zero"]
    if not (math.isfinite(scale) and 2.0**-100 < scale < 2.0**100):
        raise ValueError(f"a scale is {scale}; expected a positive number")
    if not isinstance(zero, int) or not 0 <= zero <= LARGEST_BYTE:
        raise ValueError(f"a zero is {zero!r}; expected 0 to {LARGEST_BYTE}")
    return ByteRange(scale, zero)
