"""TensorRT plans from an ONNX file: one code path for `tensorrt` (data centre) and `tensorrt_rtx` (RTX cards).

TensorRT-RTX writes a plan for a list of compute capabilities and needs no GPU. The data-centre library builds for
the GPU in this machine. What one of them lacks is asked for by hasattr, never by version.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.bundle import FusionReport, PlanEntry
from engine.errors import ExportError
from export.fusion import fusable, fusion_report, warn_unfused
from export.plan_cache import load_plan, plan_key, store_plan

RTX_PIP_LINE = "pip install 'unet-rt[trt]'"
Profile = tuple[int, int, int]
"""Smallest, best and largest batch of a plan; three times the same is a static plan."""

DEFAULT_BATCH: Profile = (1, 8, 64)

DATACENTRE_TARGETS = ("sm90", "sm100")
"""Hopper and Blackwell data-centre GPUs: only `tensorrt` builds for them, on the GPU itself."""

_FLAGS = ("REQUIRE_USER_ALLOCATION",)
"""Set where the library has them: TensorRT-RTX captures a plan in a CUDA graph only if its memory is the caller's."""


@dataclass(frozen=True, slots=True)
class PlanBuilder:
    """One installed library and what it builds here.

    trt: the module. library: its import name. suffix: of the plan's name in the bundle, "rtx.plan" say. targets: such
    as "sm89". device: name of the GPU that a plan is timed on, None where it is timed on none.
    """

    trt: Any
    library: str
    suffix: str
    targets: tuple[str, ...]
    device: str | None = None

    def build(self, onnx: Path, batch: Profile, precision: str, cache: Path | None = None) -> PlanEntry:
        """Write the plan beside the ONNX file it is built from, and return its entry for the manifest.

        batch: smallest, best and largest batch. cache: folder of built plans (export.plan_cache), None for none.
        Raises ExportError with the library's last error lines.
        """
        file = self.plan_name(onnx, batch)
        key = None if cache is None else plan_key(onnx, self._configuration(batch))
        kept = None if cache is None or key is None else load_plan(cache, key)
        plan, fusion = kept or self._build(onnx, file, batch)
        if cache is not None and key is not None and kept is None:
            store_plan(cache, key, plan, fusion)
        if fusion is not None:
            warn_unfused(file, fusion)
        (onnx.parent / file).write_bytes(plan)
        return PlanEntry(file, self.library, str(self.trt.__version__), self.targets, batch, precision, fusion)

    def plan_name(self, onnx: Path, batch: Profile) -> str:
        """ "unet.rtx.plan" from unet.fp16.onnx, with a static batch "unet.b8.rtx.plan"."""
        network = onnx.name.split(".")[0]
        return f"{network}.b{batch[0]}.{self.suffix}" if batch[0] == batch[2] else f"{network}.{self.suffix}"

    def _configuration(self, batch: Profile) -> dict[str, object]:
        """Everything beside the network that decides what the library makes."""
        return {
            "library": self.library,
            "version": str(self.trt.__version__),
            "targets": self.targets,
            "device": self.device,
            "batch": batch,
            "flags": [name for name in _FLAGS if hasattr(self.trt.BuilderFlag, name)],
        }

    def _build(self, onnx: Path, file: str, batch: Profile) -> tuple[bytes, FusionReport | None]:
        trt, log = self.trt, _log(self.trt)
        log.clear()
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(onnx)):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise self._failure(f"cannot read {onnx.name}", reasons or log.errors)
        options = builder.create_builder_config()
        options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        for name in _FLAGS:
            if hasattr(trt.BuilderFlag, name):
                options.set_flag(getattr(trt.BuilderFlag, name))
        options.add_optimization_profile(_profile(builder, network, batch))
        if hasattr(trt, "ComputeCapability"):
            options.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
                options.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], index)
        plan = builder.build_serialized_network(network, options)
        if plan is None:
            raise self._failure(f"cannot build {file} for {', '.join(self.targets)}", log.errors)
        report = fusion_report(log.kernels, fusable(onnx))
        log.clear()
        return bytes(plan), report

    def _failure(self, what: str, reasons: Any) -> ExportError:
        lines = "\n".join(f"  {reason}" for reason in list(reasons)[-5:]) or "  (it gave no reason)"
        return ExportError(
            f"{self.library} {self.trt.__version__} {what}:\n{lines}\n"
            "Try fewer targets with --target, a smaller batch with --batch, or export without plans: "
            "python -m export.to_onnx CHECKPOINT"
        )


def find_builders(targets: tuple[str, ...] | None) -> tuple[PlanBuilder, ...]:
    """The builders this machine has; none where no usable TensorRT is installed.

    targets: compute capabilities to build for, or None for all that TensorRT-RTX knows. Raises ExportError for an
    unknown target, and for any target where TensorRT-RTX is not installed.
    """
    builders: list[PlanBuilder] = []
    rtx = _import_rtx()
    if rtx is not None:
        known = known_targets(rtx)
        unknown = [target for target in targets or () if target not in known]
        if datacentre_only := [target for target in unknown if target in DATACENTRE_TARGETS]:
            raise ExportError(
                f"{', '.join(datacentre_only)} is a data-centre GPU, which TensorRT-RTX does not build for; export "
                "without --target on a machine with that GPU and the package tensorrt"
            )
        if unknown:
            raise ExportError(f"unknown target {', '.join(unknown)}; TensorRT-RTX knows {', '.join(known)}")
        builders.append(PlanBuilder(rtx, "tensorrt_rtx", "rtx.plan", targets or known))
    elif targets is not None:
        raise ExportError(
            f"--target {','.join(targets)} needs TensorRT-RTX, which is not installed; install it with: {RTX_PIP_LINE}"
        )
    capability = _gpu_capability()
    datacentre = _import_tensorrt() if capability is not None else None
    if datacentre is not None:
        device = torch.cuda.get_device_name()
        builders.append(PlanBuilder(datacentre, "tensorrt", f"trt.{capability}.plan", (str(capability),), device))
    return tuple(builders)


def known_targets(rtx: Any) -> tuple[str, ...]:
    """Every compute capability that TensorRT-RTX can build for, such as "sm89"."""
    return tuple(name.lower() for name in rtx.ComputeCapability.__members__ if name.startswith("SM"))


def _profile(builder: Any, network: Any, batch: Profile) -> Any:
    """One optimisation profile over the batch size of every input the network has."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        profile.set_shape(tensor.name, *((size, *tuple(tensor.shape)[1:]) for size in batch))
    return profile


def _import_rtx() -> Any:
    try:
        import tensorrt_rtx
    except (ImportError, OSError):
        return None
    return tensorrt_rtx


def _import_tensorrt() -> Any:
    # Its wheel can be installed without the libraries that it loads.
    try:
        import tensorrt
    except (ImportError, OSError):
        return None
    return tensorrt


def _gpu_capability() -> str | None:
    """ "sm90" for the GPU in this machine, or None."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


@functools.cache
def _log(trt: Any) -> Any:
    """The library's one logger: a process may have only one, so it is made once and its lines are cleared."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error messages, and the lines that export.fusion reads."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)
            self.kernels: list[str] = []

        def clear(self) -> None:
            self.errors.clear()
            self.kernels.clear()

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(msg)
            elif msg.startswith(("Layers:", "Total ")):
                self.kernels += msg.splitlines()

    return Log()
