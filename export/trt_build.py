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

from engine.bundle import PlanEntry
from engine.config import LabelInput, UNetConfig
from engine.errors import ExportError

RTX_PIP_LINE = "pip install 'unet-rt[trt]'"
DEFAULT_BATCH = (1, 8, 64)


@dataclass(frozen=True, slots=True)
class PlanBuilder:
    """One installed library and what it builds here.

    trt: the module. library: its import name. file: the plan's name in the bundle. targets: such as "sm89".
    """

    trt: Any
    library: str
    file: str
    targets: tuple[str, ...]

    def build(self, onnx: Path, config: UNetConfig, batch: tuple[int, int, int], precision: str) -> PlanEntry:
        """Write the plan beside the ONNX file it is built from, and return its entry for the manifest.

        batch: smallest, best and largest batch. Raises ExportError with the library's last error lines.
        """
        trt, log = self.trt, _log(self.trt)
        log.errors.clear()
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        if not parser.parse_from_file(str(onnx)):
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise self._failure(f"cannot read {onnx.name}", reasons or log.errors)
        options = builder.create_builder_config()
        options.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        options.add_optimization_profile(_profile(builder, network, config, batch))
        if hasattr(trt, "ComputeCapability"):
            options.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
                options.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], index)
        plan = builder.build_serialized_network(network, options)
        if plan is None:
            raise self._failure(f"cannot build {self.file} for {', '.join(self.targets)}", log.errors)
        (onnx.parent / self.file).write_bytes(plan)
        return PlanEntry(self.file, self.library, str(trt.__version__), self.targets, batch, precision)

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
        if unknown := [target for target in targets or () if target not in known]:
            raise ExportError(f"unknown target {', '.join(unknown)}; TensorRT-RTX knows {', '.join(known)}")
        builders.append(PlanBuilder(rtx, "tensorrt_rtx", "unet.rtx.plan", targets or known))
    elif targets is not None:
        raise ExportError(
            f"--target {','.join(targets)} needs TensorRT-RTX, which is not installed; install it with: {RTX_PIP_LINE}"
        )
    capability = _gpu_capability()
    datacentre = _import_tensorrt() if capability is not None else None
    if datacentre is not None:
        builders.append(PlanBuilder(datacentre, "tensorrt", f"unet.trt.{capability}.plan", (str(capability),)))
    return tuple(builders)


def known_targets(rtx: Any) -> tuple[str, ...]:
    """Every compute capability that TensorRT-RTX can build for, such as "sm89"."""
    return tuple(name.lower() for name in rtx.ComputeCapability.__members__ if name.startswith("SM"))


def _profile(builder: Any, network: Any, config: UNetConfig, batch: tuple[int, int, int]) -> Any:
    """One optimisation profile over the batch size of every input the network has."""
    shapes = {
        "x_t": (config.in_channels, *config.image_size),
        "timestep": (),
        "y": (config.time_channels,) if config.label is LabelInput.VECTOR else (),
        "cond": (config.cond_channels, *config.image_size),
    }
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        profile.set_shape(name, *((size, *shapes[name]) for size in batch))
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
        """Keeps the last error messages."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, msg: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(msg)

    return Log()
