"""The peak memory of one variant at one batch, in a process that opens nothing else.

python -m benchmarks.steps.peak_memory x.engine ov:fp32 16 prints one line of JSON: resident memory of the host, and on
a GPU what the driver gave away.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.core.measured_network import Name, parse_names
from benchmarks.steps.slot_loop import SAMPLERS, StepKind, StepNetwork, slot_loop
from engine.backends.registry import open_backend
from engine.bundle.bundle_folder import Bundle
from engine.cli.command import run_command
from engine.errors import BackendError, RequestError
from engine.sampling.sampler import Sampler

LIMIT_S = 300.0
_STEPS_RUN = 4
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True)
class PeakMemory:
    """resident_bytes: of the process, with its libraries and weights. device_bytes: of the GPU, None without one."""

    resident_bytes: int
    device_bytes: int | None = None


def resident_bytes() -> int:
    """The most that this process has had in memory."""
    # getrusage alone would do, but Linux lets a child begin with the peak of the process that started it.
    found = re.search(r"^VmHWM:\s*(\d+) kB", _STATUS.read_text(), re.MULTILINE) if _STATUS.exists() else None
    if found:
        return int(found.group(1)) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(bundle: Bundle, name: Name, batch: int, kind: StepKind, threads: int | None) -> PeakMemory:
    """Open the variant and run a few steps in this process."""
    free_before = _free_bytes()
    sampler = Sampler(open_backend(bundle, *name, threads), bundle, threads)
    network = StepNetwork(sampler, sampler.classifier_guidance() if kind.guided else None)
    least = free_before
    with slot_loop(network, kind, batch) as loop:
        for _ in range(_STEPS_RUN):
            loop.refill()
            loop.step()
            free = _free_bytes()
            least = free if least is None or free is None else min(least, free)
    on_device = None if free_before is None or least is None else free_before - least
    return PeakMemory(resident_bytes(), on_device)


def in_child(bundle: Path, name: Name, batch: int, kind: StepKind, threads: int | None) -> PeakMemory:
    """measure() in a process of its own; raises BackendError with the child's last line."""
    command = [sys.executable, "-m", "benchmarks.steps.peak_memory", str(bundle), ":".join(name), str(batch)]
    command += ["--sampler", kind.sampler, "--steps", str(kind.steps)]
    command += ["--guided"] if kind.guided else []
    command += [] if threads is None else ["--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"its peak memory took more than {LIMIT_S:.0f} s to measure") from error
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise BackendError(f"measuring its peak memory ended with exit status {done.returncode}: {lines[-1]}")
    return PeakMemory(**json.loads(done.stdout.splitlines()[-1]))


def _free_bytes() -> int | None:
    """Of the GPU's memory, as the driver counts it, which includes what torch did not allocate."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def _run(args: argparse.Namespace) -> None:
    names = parse_names(args.variant)
    if len(names) != 1:
        raise RequestError(f"{len(names)} variants given; a process measures one, for example ov:fp32")
    kind = StepKind(args.sampler, args.steps, args.guided)
    print(json.dumps(asdict(measure(Bundle.open(args.bundle), names[0], args.batch, kind, args.threads))))


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps.peak_memory", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("variant", help="BACKEND:PRECISION")
    parser.add_argument("batch", type=int)
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guided", action="store_true")
    parser.add_argument("--threads", type=int)
    return run_command(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
