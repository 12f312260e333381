"""The parts of gpu_check that run in processes of their own; see there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.stats import spread
from benchmarks.step_device import device_step
from benchmarks.timing import Clock, Variant, interleave, on_stream
from engine.backends.registry import open_backend
from engine.backends.trt.trt_library import gpu_capability
from engine.bundle.folder import Bundle
from engine.cli.command import run_command
from engine.device import Device, cuda_device
from engine.diffusion.solvers import ddim_table
from engine.errors import BackendError, RequestError, UNetRTError
from engine.files import atomic_path
from engine.sampling.sampler import Sampler

BACKENDS = (("eager", "fp32"), ("eager", "fp16"), ("ort", "fp32"), ("trt", "fp16"))
REFERENCE = "ort:fp32"
BUNDLE_VARIABLE = "UNET_RT_GPU_BUNDLE"
"""Environment variable: the bundle of digits that the tests of a GPU take instead of building one."""

_ASSETS = Path(__file__).resolve().parents[1] / "assets"
CHECKPOINT, CLASSIFIER = _ASSETS / "digits.pt", _ASSETS / "classifier.pt"
# What assets/digits.pt does not hold (assets/MODEL_CARD.md).
_FACTS = "--family openai-guided --image-size 32x32 --num-head-channels 32 --noise-schedule cosine --prediction x0"
_IMAGES, _STEPS, _BATCH = 10, 50, 16
_WARM_UP, _ROUNDS = 20, 100


def bundle_folder(work: Path) -> Path:
    return work / "digits.engine"


def images_file(work: Path, name: str) -> Path:
    return work / f"{name.replace(':', '-')}.npy"


def build(work: Path, with_classifier: bool = False) -> dict[str, Any]:
    """The bundle with plans for this GPU, by every TensorRT that is installed; without one, the ONNX only.

    with_classifier: of the digits too, which takes a few minutes more. TensorRT for RTX is asked for this GPU's
    compute capability where it knows it.
    """
    from export import to_onnx, to_trt
    from export.trt.build import find_builders

    command = [str(CHECKPOINT), "--out", str(bundle_folder(work)), "--null-class", "10", *_FACTS.split()]
    if with_classifier:
        command += ["--classifier", str(CLASSIFIER), "--classifier-fact", "num_head_channels=32"]
    target = gpu_capability()
    try:
        builders = find_builders((target,))
        command += ["--target", target]
    except UNetRTError:
        builders = find_builders(None)
    status = to_trt.main(command) if builders else to_onnx.main(command)
    if status:
        raise BackendError("the export failed; its error is above")
    plans = Bundle.open(bundle_folder(work)).manifest.plans
    return {"capability": target, "plans": [plan.file for plan in plans]}


def images(work: Path, backend: str, precision: str) -> dict[str, Any]:
    """One digit a class in 50 DDIM steps, seed 0; the same images in every backend up to rounding."""
    sampler = Sampler.open(bundle_folder(work), backend, precision)
    made = sampler.sample(_IMAGES, steps=_STEPS, seed=0, labels=list(range(_IMAGES)))
    with atomic_path(images_file(work, f"images:{backend}:{precision}")) as temporary, temporary.open("wb") as file:
        np.save(file, made.numpy())
    return {"images": len(made), "steps": _STEPS, "precision": sampler.backend.precision}


def latency(work: Path) -> dict[str, Any]:
    """Milliseconds of one DDIM step of a batch: each backend kernel by kernel, and as a graph."""
    device = cuda_device()
    steps: dict[str, Callable[[], None]] = {}
    missing: dict[str, str] = {}
    for backend, precision in (("eager", "fp32"), ("eager", "fp16"), ("trt", "fp16")):
        name = f"{backend} {precision}"
        try:
            steps |= step_ways(name, open_backend(bundle_folder(work), backend, precision), device, _BATCH)
        except (UNetRTError, RuntimeError) as error:
            missing[name] = str(error)
    if not steps:
        raise BackendError(f"no backend could be measured: {missing}")
    return {"batch": _BATCH, "steps": times(steps, on_stream(device.main)), "missing": missing}


def step_ways(name: str, backend: Any, device: Device, batch: int) -> dict[str, Callable[[], None]]:
    """One step of `batch` slots, enqueued as it is and as a replay; the slots' rows end soon, the work stays."""
    direct = device_step(device, backend, ddim_table(backend.manifest.diffusion, _STEPS), batch).enqueue
    direct()
    device.synchronize()
    graph = device.capture(direct)
    return {name: direct, f"{name} + graph": partial(device.replay, graph)}


def times(
    steps: Mapping[str, Callable[[], None]], clock: Clock, warm_up: int = _WARM_UP, rounds: int = _ROUNDS
) -> dict[str, dict[str, float]]:
    """Median and spread of each step; they take turns, so that a change of clock meets all of them alike."""
    taken = interleave([Variant(name, step, clock) for name, step in steps.items()], rounds, warm_up=warm_up)
    spreads = {name: spread(series.all_ms) for name, series in taken.items()}
    return {name: {"median_ms": s.p50_ms, "p10_ms": s.p10_ms, "p90_ms": s.p90_ms} for name, s in spreads.items()}


def run(args: argparse.Namespace) -> None:
    """Run a part and write its result; raises RequestError for an unknown name."""
    kind, *rest = args.part.split(":")
    if kind == "images" and tuple(rest) in BACKENDS:
        result = images(args.work, *rest)
    elif args.part in ("build", "latency"):
        result = {"build": build, "latency": latency}[args.part](args.work)
    else:
        raise RequestError(f"unknown part {args.part!r}; known: build, latency, images:BACKEND:PRECISION")
    with atomic_path(args.result) as temporary:
        temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The command of one part; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_parts", description=__doc__)
    parser.add_argument("part")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--result", type=Path, required=True)
    return run_command(run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
