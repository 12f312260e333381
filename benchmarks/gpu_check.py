"""make gpu-check: everything that needs a GPU, run once, in under ten minutes.

It runs the tests marked gpu, builds plans for this GPU from assets/digits.pt, compares the images of every backend
with those of ONNX Runtime in fp32 on the CPU, and measures the time of a step. Every part is a process of its own
with a time limit, so that one that fails, hangs or crashes leaves the others alone. FOLDER/gpu_check.json says what
each gave, and FOLDER/gpu_check.png shows the images, one row a backend.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import gpu_parts
from engine.cli.command import run_command, table
from engine.device import no_gpu
from engine.errors import BackendError
from engine.files import atomic_path, make_folder
from engine.images import grid, save_png, to_uint8
from judging.metrics import psnr

BUDGET_S = 590.0
_LINES_KEPT = 12


@dataclass(frozen=True, slots=True)
class Part:
    """command: what runs it; its result is the JSON file whose path is put in the place of "{result}"."""

    name: str
    command: tuple[str, ...]
    limit_s: float


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """status: passed, failed, timeout or skipped. result: what it wrote. log: its last lines, unless it passed."""

    name: str
    status: str
    seconds: float
    result: Any = None
    log: tuple[str, ...] = ()


def parts(work: Path) -> tuple[Part, ...]:
    """In this order; the later ones need the bundle that `build` makes in the folder work."""

    def own(name: str, limit_s: float) -> Part:
        command = (sys.executable, "-m", "benchmarks.gpu_parts", name, "--work", str(work), "--result", "{result}")
        return Part(name, command, limit_s)

    # The tests take the bundle that was just built, where it was.
    bundle_path = str(gpu_parts.bundle_folder(work).resolve())
    variable = f"{gpu_parts.BUNDLE_VARIABLE}={bundle_path}"
    tests = ("env", variable, sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests")
    images = [own(f"images:{backend}:{precision}", 45) for backend, precision in gpu_parts.BACKENDS]
    variants = ("--variants", "trt:fp16,eager:fp16,eager:fp32", "--batches", "1,16", "--no-memory", "--short")
    latency = (sys.executable, "-m", "benchmarks.step_latency", bundle_path, *variants, "--seconds", "40")
    return (
        own("build", 240),
        *images,
        # Its report is the part's result.
        Part("latency", (*latency, "--out", str(work), "--name", "latency"), 120),
        Part("tests", tests, 240),
    )


def run_part(part: Part, work: Path, limit_s: float) -> Outcome:
    """Run a part in a process of its own, for limit_s seconds at most."""
    start = time.monotonic()
    if limit_s <= 0:
        return Outcome(part.name, "skipped", 0.0, log=("no time was left",))
    result_file = work / f"{part.name.replace(':', '-')}.json"
    result_file.unlink(missing_ok=True)
    log_file = result_file.with_suffix(".log")
    command = [word.replace("{result}", str(result_file)) for word in part.command]
    with log_file.open("w", encoding="utf-8") as log:
        try:
            code: int | None = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=limit_s, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    seconds = time.monotonic() - start
    lines = tuple(log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_KEPT:])
    try:
        result = json.loads(result_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        result = None
    if code == 0 and (result is not None or "{result}" not in part.command):
        return Outcome(part.name, "passed", seconds, result)
    return Outcome(part.name, "timeout" if code is None else "failed", seconds, result, (*lines, f"exit status {code}"))


def compare(work: Path, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Each backend's images beside those of the reference: largest difference, and PSNR in dB of all of them."""
    reference = _images(work, f"images:{gpu_parts.REFERENCE}", outcomes)
    if reference is None:
        return {}
    found = {}
    for outcome in outcomes:
        images = _images(work, outcome.name, outcomes)
        if images is None or images.shape != reference.shape:
            continue
        found[outcome.name.partition(":")[2]] = {
            "max_abs": float(np.abs(images - reference).max()),
            "psnr_db": psnr(torch.from_numpy(images), torch.from_numpy(reference)).whole,
        }
    return found


def _images(work: Path, name: str, outcomes: Sequence[Outcome]) -> np.ndarray | None:
    """[n, C, H, W] that a part which passed has left."""
    passed = {outcome.name for outcome in outcomes if outcome.status == "passed"}
    path = gpu_parts.images_file(work, name)
    return np.load(path) if name in passed and name.startswith("images:") and path.is_file() else None


def save_picture(path: Path, work: Path, outcomes: Sequence[Outcome]) -> bool:
    """One row of images a backend; False where no backend made any."""
    made = [images for outcome in outcomes if (images := _images(work, outcome.name, outcomes)) is not None]
    if not made:
        return False
    save_png(path, grid(to_uint8(np.concatenate(made)), len(made[0]), 2))
    return True


def check(out: Path, chosen: Sequence[Part] | None = None, budget_s: float = BUDGET_S) -> list[Outcome]:
    """Run the parts one after the other and write gpu_check.json and gpu_check.png after each, into `out`."""
    work = out / "work"
    make_folder(work)
    outcomes: list[Outcome] = []
    end = time.monotonic() + budget_s
    for part in parts(work) if chosen is None else chosen:
        print(f"{part.name} ...", flush=True)
        outcomes.append(run_part(part, work, min(part.limit_s, end - time.monotonic())))
        print(f"  {outcomes[-1].status} after {outcomes[-1].seconds:.1f} s", flush=True)
        _write(out, work, outcomes)
    return outcomes


def _write(out: Path, work: Path, outcomes: Sequence[Outcome]) -> None:
    data = {
        "machine": _machine(),
        "parts": [asdict(outcome) for outcome in outcomes],
        "images": {"reference": gpu_parts.REFERENCE, "backends": compare(work, outcomes)},
    }
    with atomic_path(out / "gpu_check.json") as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    save_picture(out / "gpu_check.png", work, outcomes)


def _machine() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "capability": f"sm{properties.major}{properties.minor}"}
        found |= {"memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


def report(outcomes: Sequence[Outcome], images: dict[str, Any]) -> str:
    """What is printed at the end."""
    rows = [(o.name, o.status, f"{o.seconds:.1f}") for o in outcomes]
    texts = [table(("part", "status", "seconds"), rows)]
    if images:
        compared = [(name, f"{v['max_abs']:.2e}", f"{v['psnr_db']:.1f}") for name, v in images.items()]
        texts.append(table(("images", "max difference", "PSNR dB"), compared))
    for outcome in outcomes:
        if outcome.name == "latency" and outcome.result is not None:
            times = [
                (
                    row["case"]["variant"],
                    str(row["case"]["batch"]),
                    *(f"{row['metrics'][name]:.3f}" for name in ("p50_ms", "p10_ms", "p90_ms", "network_ms")),
                )
                for row in outcome.result["rows"]
            ]
            texts.append(table(("step", "batch", "median ms", "p10", "p90", "network"), times))
    return "\n\n".join(texts)


def run(args: argparse.Namespace) -> None:
    """Raises BackendError where there is no GPU, and where a part did not pass."""
    if not torch.cuda.is_available():
        raise BackendError(no_gpu("gpu-check"))
    outcomes = check(args.out)
    print(report(outcomes, compare(args.out / "work", outcomes)))
    print(f"\nwritten: {args.out / 'gpu_check.json'}")
    bad = [outcome.name for outcome in outcomes if outcome.status != "passed"]
    if bad:
        raise BackendError(f"these parts did not pass: {', '.join(bad)}; their last lines are in gpu_check.json")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 where every part passed, else 2."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="Check this machine's GPU.")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder to write (default gpu_check)")
    return run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
