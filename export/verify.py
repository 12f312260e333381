"""Every artefact beside the fp32 U-Net, on the inputs it will really see (export.subject).

Each artefact that this machine can run gets them one by one and in batches that mix timesteps. The difference is judged
relative to the rms of the network's own output, and where a runner can show intermediate results the block that differs
most is named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.backends.ort.ort_backend import OrtBackend
from engine.backends.ov.ov_backend import OpenVINOBackend, has_bf16
from engine.backends.protocol import Backend
from engine.bundle.file_names import UNET, onnx_name, weights_name
from engine.bundle.manifest import Manifest, Measurement
from engine.errors import ExportError, MissingPackageError
from engine.networks.inputs import Inputs
from engine.networks.unet import UNet
from export.onnx import block_outputs as layers
from export.precision import GpuHalf, Precision
from export.subject import Subject

logger = logging.getLogger(__name__)

LIMITS = {
    # Sums in another order and Winograd's convolutions: 3e-7 to 2e-6 measured. A wrong weight or operator gives 1e-2.
    "fp32": 3e-5,
    # Eleven bits of mantissa, rounded after every operator: 5e-4 to 2.4e-3 measured. An overflow gives infinity.
    "fp16": 1e-2,
    # Eight bits: 5e-3 to 7e-2 measured, more for steep attention. bf16 runs only where it is asked for, so its error
    # is recorded for that choice and only nonsense fails.
    "bf16": 5e-1,
    # Eight bits at every large convolution: 3.5e-2 to 6.5e-2 measured. Its error, too, is recorded for who chose it.
    "int8": 5e-1,
}
"""Largest rms error accepted, relative to the rms of the network's output, for each precision."""


@dataclass(slots=True)
class Difference:
    """Accumulates how far results are from what was wanted."""

    max_abs: float = 0.0
    squares: float = 0.0
    wanted_squares: float = 0.0
    count: int = 0

    def add(self, got: Tensor, wanted: Tensor) -> None:
        error = got.double() - wanted.double()
        # max() of a NaN and a number depends on their order; a NaN must stay.
        self.max_abs = float(np.maximum(self.max_abs, float(error.abs().max())))
        self.squares += float(error.square().sum())
        self.wanted_squares += float(wanted.double().square().sum())
        self.count += wanted.numel()

    @property
    def rms(self) -> float:
        return float(np.sqrt(self.squares / self.count))

    @property
    def wanted_rms(self) -> float:
        return float(np.sqrt(self.wanted_squares / self.count))

    @property
    def relative(self) -> float:
        """rms over the wanted rms; infinite where it is not a number, so that it is never taken for small."""
        ratio = self.rms / max(self.wanted_rms, 1e-30)
        return ratio if np.isfinite(ratio) else float("inf")


@dataclass(frozen=True, slots=True, eq=False)
class Typed:
    """The network in another precision: its ONNX file's name, and the same types in torch (int8's are fp16)."""

    precision: Precision
    file: str
    unet: UNet


@dataclass(frozen=True, slots=True, eq=False)
class Runner:
    """One way to run one artefact. layers: results of the blocks by their index, for a batch of one."""

    artefact: str
    name: str
    precision: str
    run: Callable[[Inputs], Tensor]
    layers: Callable[[Inputs], Mapping[int, Tensor]] | None = None


def runners(folder: Path, manifest: Manifest, typed: Typed | None) -> Iterator[Runner]:
    """Every way that this machine has to run an artefact of the folder; each is released when the next is asked for."""
    yield from _onnxruntime(folder / onnx_name(UNET), manifest, "fp32")
    for precision in ("fp32", "bf16") if has_bf16() else ("fp32",):
        yield from _openvino(folder / onnx_name(UNET), manifest, precision, precision)
    if typed is None:
        return
    if typed.precision is Precision.BF16:
        # ONNX Runtime's CPU provider has no bf16 operators; OpenVINO reads the types and computes in fp32.
        yield from _openvino(folder / typed.file, manifest, "bf16", "fp32")
    else:
        yield from _onnxruntime(folder / typed.file, manifest, typed.precision.value)
    yield _torch(typed)


def _onnxruntime(path: Path, manifest: Manifest, precision: str) -> Iterator[Runner]:
    try:
        backend = OrtBackend(manifest, path, precision, None)
        blocks = layers.OnnxLayers(path)
    except MissingPackageError:
        return
    yield Runner(path.name, "onnxruntime cpu", precision, _caller(backend), blocks)
    backend.close()


def _openvino(path: Path, manifest: Manifest, precision: str, hint: str) -> Iterator[Runner]:
    try:
        backend = OpenVINOBackend(manifest, path, hint, None)
    except MissingPackageError:
        return
    yield Runner(path.name, "openvino cpu", precision, _caller(backend))
    backend.close()


def _torch(typed: Typed) -> Runner:
    """The network in torch, every intermediate rounded as on a GPU: what plans and CUDA compute."""

    def run(case: Inputs) -> Tensor:
        with GpuHalf(), torch.no_grad():
            return typed.unet(**case.tensors())

    def run_layers(case: Inputs) -> Mapping[int, Tensor]:
        with GpuHalf():
            return layers.torch_layers(typed.unet, case)

    precision = "bf16" if typed.precision is Precision.BF16 else "fp16"
    return Runner(weights_name(UNET), "torch cpu", precision, run, run_layers)


def _caller(backend: Backend) -> Callable[[Inputs], Tensor]:
    return lambda case: backend(case.x_t, case.timestep, case.conditions)


def measure(runner: Runner, subject: Subject) -> Measurement:
    """The runner's error over all cases of the subject."""
    unet = subject.unet
    total, blocks = Difference(), dict[int, Difference]()
    for case, reference in zip(subject.cases, subject.wanted, strict=True):
        total.add(runner.run(case), reference)
        if case.is_single and runner.layers is not None:
            expected = layers.torch_layers(unet, case)
            for index, value in runner.layers(case).items():
                if value.shape == expected[index].shape:
                    blocks.setdefault(index, Difference()).add(value, expected[index])
    worst = max(blocks, key=lambda index: blocks[index].relative, default=None)
    return Measurement(
        artefact=runner.artefact,
        runner=runner.name,
        precision=runner.precision,
        max_abs=total.max_abs,
        rms=total.rms,
        reference_rms=total.wanted_rms,
        limit=LIMITS[runner.precision],
        worst_layer=None if worst is None else f"blocks.{worst} {type(unet.config.blocks[worst]).__name__}",
        worst_layer_error=None if worst is None else blocks[worst].relative,
    )


def verify(folder: Path, subject: Subject, typed: Typed | None = None) -> tuple[Measurement, ...]:
    """Measure every artefact in the folder that this machine can run; raises ExportError past a limit.

    subject: what the folder was made of. typed: the half-precision network of the folder, if it has one.
    """
    results = [measure(runner, subject) for runner in runners(folder, subject.manifest, typed)]
    for name in (onnx_name(UNET), *([] if typed is None else [typed.file])):
        if all(result.artefact != name for result in results):
            logger.warning("%s was not verified: install a library that runs it: pip install 'unet-rt[cpu]'", name)
    check(results)
    return tuple(results)


def check(measurements: Sequence[Measurement]) -> None:
    """Raise ExportError if one is past its limit."""
    failed = [m for m in measurements if not m.passed]
    if not failed:
        return
    lines = [
        f"  {m.artefact} on {m.runner} in {m.precision}: error {m.relative:.2g} of the output's rms, "
        f"limit {m.limit:.0e}" + (f"; worst layer {m.worst_layer}, {m.worst_layer_error:.2g}" if m.worst_layer else "")
        for m in failed
    ]
    remedy = "do not use it; please report the checkpoint's family and these lines"
    if all(m.precision != "fp32" for m in failed):
        remedy = "this network needs fp32: export it with python -m export.to_onnx CHECKPOINT"
    raise ExportError("the export differs from the checkpoint by too much:\n" + "\n".join(lines) + f"\n{remedy}")
