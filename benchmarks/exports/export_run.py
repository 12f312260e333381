"""One export as a process of its own: its time, its peak memory, and when each of its phases began."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.errors import BackendError

PHASES = {
    "read_s": "",
    "onnx_s": "writing weights and fp32 ONNX",
    "typed_onnx_s": "writing fp16 ONNX",
    "verify_s": "verifying against the checkpoint",
    "native_int8_s": "choosing 8-bit convolutions for the CPU engine",
    "classifier_s": "exporting the classifier's gradient",
    "plans_s": "building plans",
}
"""Metric -> the line with which export.to_onnx begins that phase. The first begins with the process: imports, reading
the checkpoint, and sampling the inputs of the verification."""

LINES_KEPT = 12
_CHILD_USAGE = Path(__file__).with_name("child_usage.py")


@dataclass(frozen=True, slots=True)
class ExportRun:
    """status: of the process, negative for a signal. phases_s: those it went through. last_lines: of its output."""

    status: int
    wall_s: float
    cpu_s: float
    peak_bytes: int
    phases_s: dict[str, float]
    last_lines: tuple[str, ...]


def run_export(command: Sequence[str], work: Path, cores: int | None = None) -> ExportRun:
    """Run a command that prints what export does. work: a folder for what it used. cores: all where None.

    Raises BackendError where it cannot be measured.
    """
    result = work / "usage.json"
    result.unlink(missing_ok=True)
    limited = [] if cores is None else ["--cores", str(cores)]
    wrapped = [sys.executable, str(_CHILD_USAGE), str(result), *limited, "--", *command]
    start = time.perf_counter()
    lines: list[tuple[float, str]] = []
    with subprocess.Popen(
        wrapped,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append((time.perf_counter() - start, line.rstrip("\n")))
    texts = tuple(text for _, text in lines if text.strip())[-LINES_KEPT:]
    if process.returncode or not result.is_file():
        raise BackendError(f"the export could not be measured: {' | '.join(texts) or 'it printed nothing'}")
    used = json.loads(result.read_text(encoding="utf-8"))
    return ExportRun(
        status=used["status"],
        wall_s=used["wall_s"],
        cpu_s=used["cpu_s"],
        peak_bytes=used["peak_bytes"],
        phases_s=phases(lines, used["wall_s"]),
        last_lines=texts,
    )


def phases(lines: Sequence[tuple[float, str]], end_s: float) -> dict[str, float]:
    """Seconds of each phase, from (seconds since the start, line) in order; the last goes on to the end."""
    names = {text: name for name, text in PHASES.items()}
    begun = [(0.0, "read_s"), *((at, names[text]) for at, text in lines if text and text in names)]
    ends = [at for at, _ in begun[1:]] + [end_s]
    return {name: max(0.0, end - at) for (at, name), end in zip(begun, ends, strict=True)}
