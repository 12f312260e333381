"""The parts of gpu_check that run in processes of their own; see there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine.backends.trt.trt_library import gpu_capability
from engine.bundle.bundle_folder import Bundle
from engine.cli.command import run_command
from engine.errors import BackendError, RequestError, UNetRTError
from engine.files import atomic_path
from engine.sampling.sampler import Sampler

BACKENDS = (("eager", "fp32"), ("eager", "fp16"), ("ort", "fp32"), ("trt", "fp16"))
REFERENCE = "ort:fp32"
BUNDLE_VARIABLE = "UNET_RT_GPU_BUNDLE"
"""Environment variable: the bundle of digits that the tests of a GPU take instead of building one."""

_IMAGES, _STEPS = 10, 50


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
    from judging import digits

    command = [str(digits.CHECKPOINT), "--out", str(bundle_folder(work)), *digits.fact_arguments()]
    if with_classifier:
        command += digits.CLASSIFIER_ARGUMENTS
    target = gpu_capability()
    try:
        builders = find_builders((target,))
        command += ["--target", target]
    except UNetRTError:
        builders = find_builders(None)
    status = to_trt.main(command) if builders else to_onnx.main(command)
    if status:
        raise BackendError("the export failed; its error is above")
    plans = Bundle.open(bundle_folder(work)).manifest.unet.plans
    return {"capability": target, "plans": [plan.file for plan in plans]}


def images(work: Path, backend: str, precision: str) -> dict[str, Any]:
    """One digit a class in 50 DDIM steps, seed 0; the same images in every backend up to rounding."""
    sampler = Sampler.open(bundle_folder(work), backend, precision)
    made = sampler.sample(_IMAGES, steps=_STEPS, seed=0, labels=list(range(_IMAGES)))
    with atomic_path(images_file(work, f"images:{backend}:{precision}")) as temporary, temporary.open("wb") as file:
        np.save(file, made.numpy())
    return {"images": len(made), "steps": _STEPS, "precision": sampler.backend.precision}


def run(args: argparse.Namespace) -> None:
    """Run a part and write its result; raises RequestError for an unknown name."""
    kind, *rest = args.part.split(":")
    if kind == "images" and tuple(rest) in BACKENDS:
        result = images(args.work, *rest)
    elif args.part == "build":
        result = build(args.work)
    else:
        raise RequestError(f"unknown part {args.part!r}; known: build, images:BACKEND:PRECISION")
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
