"""TensorRT plans from an ONNX file: one code path for `tensorrt` (data centre) and `tensorrt_rtx` (RTX cards).

TensorRT-RTX writes a plan for a list of compute capabilities and needs no GPU. The data-centre library builds for
the GPU in this machine. What one of them lacks is asked for by hasattr, never by version.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from engine.backends.trt.trt_library import DATACENTRE, PIP_LINES, RTX, Library, gpu_capability, load_library
from engine.bundle.file_names import network_of, plan_name
from engine.bundle.manifest import FusionReport, PlanEntry
from engine.errors import ExportError
from export.trt.fusion import fusable, fusion_report, warn_unfused
from export.trt.plan_cache import load_plan, plan_key, store_plan
from export.trt.plugin_triton import plugin_nodes, register_plugin
from export.trt.timing_cache import keep_timings, use_timings

logger = logging.getLogger(__name__)

Profile = tuple[int, int, int]
"""Smallest, best and largest batch of a plan; three times the same is a static plan."""

DEFAULT_BATCH: Profile = (1, 8, 64)

DATACENTRE_TARGETS = ("sm90", "sm100")
"""Hopper and Blackwell data-centre GPUs: only `tensorrt` builds for them, on the GPU itself."""

_FLAGS = ("REQUIRE_USER_ALLOCATION",)
"""Set where the library has them: TensorRT-RTX captures a plan in a CUDA graph only if its memory is the caller's."""
_STRIPPED = ("STRIP_PLAN", "REFIT_IDENTICAL")
"""Weights come back as they were, so every fusion stays that a plan with weights has."""


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What only `tensorrt` on a GPU can do.

    hardware_compatible: the plan runs on every GPU from compute capability 8.0 on, and may be slower. strip_weights:
    the plan holds no weights, and gets them from the bundle's ONNX file when it is opened. triton_plugins:
    GroupNorm+SiLU are the Triton kernel (export.trt.plugin_triton).
    """

    hardware_compatible: bool = False
    strip_weights: bool = False
    triton_plugins: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """The options of export.to_trt that set them."""
        names = {
            "--hardware-compatible": self.hardware_compatible,
            "--strip-weights": self.strip_weights,
            "--plugins triton": self.triton_plugins,
        }
        return tuple(name for name, is_set in names.items() if is_set)


NO_OPTIONS = BuildOptions()


@dataclass(frozen=True, slots=True)
class PlanBuilder:
    """One installed library and what it builds here.

    built_by: in the plan's name, "rtx" say. targets: such
    as "sm89". device: name of the GPU that a plan is timed on, None where it is timed on none. options: only of
    `tensorrt`.
    """

    library: Library
    built_by: str
    targets: tuple[str, ...]
    device: str | None = None
    options: BuildOptions = NO_OPTIONS

    def build(self, onnx: Path, batch: Profile, precision: str, cache: Path | None = None) -> PlanEntry:
        """Write the plan beside the ONNX file it is built from, and return its entry for the manifest.

        batch: smallest, best and largest batch. cache: folder of built plans (export.trt.plan_cache), None for none.
        Raises ExportError with the library's last error lines.
        """
        file = self.plan_name(onnx, batch)
        key = None if cache is None else plan_key(onnx, self._configuration(batch))
        kept = None if cache is None or key is None else load_plan(cache, key)
        plan, fusion = kept or self._build(onnx, file, batch, cache)
        if cache is not None and key is not None and kept is None:
            store_plan(cache, key, plan, fusion)
        if fusion is not None:
            warn_unfused(file, fusion)
        (onnx.parent / file).write_bytes(plan)
        weights_file = onnx.name if self.options.strip_weights else None
        library, version = self.library.name, str(self.library.trt.__version__)
        return PlanEntry(file, library, version, self.targets, batch, precision, fusion, weights_file)

    def plan_name(self, onnx: Path, batch: Profile) -> str:
        """ "unet.rtx.plan" from unet.fp16.onnx, with a static batch "unet.b8.rtx.plan"."""
        return plan_name(network_of(onnx.name), self.built_by, batch[0] if batch[0] == batch[2] else None)

    def _configuration(self, batch: Profile) -> dict[str, object]:
        """Everything beside the network that decides what the library makes."""
        trt = self.library.trt
        return {
            "library": self.library.name,
            "version": str(trt.__version__),
            "targets": self.targets,
            "device": self.device,
            "batch": batch,
            "options": asdict(self.options),
            "flags": [name for name in _FLAGS if hasattr(trt.BuilderFlag, name)],
        }

    def _build(self, onnx: Path, file: str, batch: Profile, cache: Path | None) -> tuple[bytes, FusionReport | None]:
        trt, log = self.library.trt, self.library.log
        log.clear()
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, log)
        with self._source(onnx) as source:
            is_read = parser.parse_from_file(str(source))
        if not is_read:
            reasons = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise self._failure(f"cannot read {onnx.name}", reasons or log.errors)
        config = builder.create_builder_config()
        self._configure(config)
        config.add_optimization_profile(_profile(builder, network, batch))
        timings = None if cache is None or self.device is None else cache / self._timing_name()
        if timings is not None:
            use_timings(config, timings)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise self._failure(f"cannot build {file} for {', '.join(self.targets)}", log.errors)
        if timings is not None:
            keep_timings(config, timings)
        report = fusion_report(log.kernels, fusable(onnx))
        log.clear()
        return bytes(plan), report

    @contextmanager
    def _source(self, onnx: Path) -> Iterator[Path]:
        """The file that the library reads: the ONNX file, or for the time of reading one with plugin nodes."""
        if not self.options.triton_plugins:
            yield onnx
            return
        register_plugin(self.targets[0])
        # In the same folder, because the weights may lie in a file beside the ONNX file.
        with_plugins = onnx.with_name(f"plugins.{onnx.name}")
        try:
            if plugin_nodes(onnx, with_plugins) == 0:
                logger.warning("%s has no float16 GroupNorm before SiLU for --plugins to replace", onnx.name)
                yield onnx
            else:
                yield with_plugins
        finally:
            with_plugins.unlink(missing_ok=True)

    def _configure(self, config: Any) -> None:
        trt = self.library.trt
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        wanted = _FLAGS + (_STRIPPED if self.options.strip_weights else ())
        for name in wanted:
            if hasattr(trt.BuilderFlag, name):
                config.set_flag(getattr(trt.BuilderFlag, name))
        if self.options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if hasattr(trt, "ComputeCapability"):
            config.num_compute_capabilities = len(self.targets)
            for index, target in enumerate(self.targets):
                config.set_compute_capability(trt.ComputeCapability.__members__[target.upper()], index)

    def _timing_name(self) -> str:
        where = re.sub(r"\W+", "-", f"{self.library.name} {self.library.trt.__version__} {self.device}").lower()
        return f"{where}.timings"

    def _failure(self, what: str, reasons: Any) -> ExportError:
        lines = "\n".join(f"  {reason}" for reason in list(reasons)[-5:]) or "  (it gave no reason)"
        return ExportError(
            f"{self.library.name} {self.library.trt.__version__} {what}:\n{lines}\n"
            "Try fewer targets with --target, a smaller batch with --batch, or export without plans: "
            "python -m export.to_onnx CHECKPOINT"
        )


def find_builders(targets: tuple[str, ...] | None, options: BuildOptions = NO_OPTIONS) -> tuple[PlanBuilder, ...]:
    """The builders this machine has; none where no usable TensorRT is installed.

    targets: compute capabilities to build for, or None for all that TensorRT-RTX knows. A process that registers
    plugins never loads TensorRT-RTX, which would end it. Raises ExportError for an unknown target, for any target where
    TensorRT-RTX is not installed or used, and for options where there is no `tensorrt` with a GPU.
    """
    builders: list[PlanBuilder] = []
    rtx = None if options.triton_plugins else load_library(RTX)
    if rtx is not None:
        builders.append(PlanBuilder(rtx, "rtx", _known(targets, rtx.trt)))
    elif targets is not None:
        reason = (
            "is not used with --plugins"
            if options.triton_plugins
            else f"is not installed; install it with: {PIP_LINES[RTX]}"
        )
        raise ExportError(f"--target {','.join(targets)} needs TensorRT-RTX, which {reason}")
    datacentre = load_library(DATACENTRE) if torch.cuda.is_available() else None
    if datacentre is not None:
        builders.append(_datacentre_builder(datacentre, gpu_capability(), options))
    elif options.flags:
        raise ExportError(
            f"{', '.join(options.flags)} needs the package tensorrt and an NVIDIA GPU in this machine; leave it "
            "out, or export on such a machine"
        )
    return tuple(builders)


def _known(targets: tuple[str, ...] | None, rtx: Any) -> tuple[str, ...]:
    known = known_targets(rtx)
    unknown = [target for target in targets or () if target not in known]
    if datacentre_only := [target for target in unknown if target in DATACENTRE_TARGETS]:
        raise ExportError(
            f"{', '.join(datacentre_only)} is a data-centre GPU, which TensorRT-RTX does not build for; export "
            "without --target on a machine with that GPU and the package tensorrt"
        )
    if unknown:
        raise ExportError(f"unknown target {', '.join(unknown)}; TensorRT-RTX knows {', '.join(known)}")
    return targets or known


def _datacentre_builder(library: Library, capability: str, options: BuildOptions) -> PlanBuilder:
    is_early = int(capability.removeprefix("sm")) < 80
    if options.hardware_compatible and is_early:
        raise ExportError(f"--hardware-compatible needs compute capability 8.0 or above, and this is {capability}")
    if options.strip_weights and options.triton_plugins:
        raise ExportError("--strip-weights and --plugins do not go together: a plugin's weights cannot be given later")
    target, name = ("sm80+", "sm80plus") if options.hardware_compatible else (capability, capability)
    return PlanBuilder(library, f"trt.{name}", (target,), torch.cuda.get_device_name(), options)


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
