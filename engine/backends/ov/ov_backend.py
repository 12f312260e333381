"""The network's ONNX file in OpenVINO on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.bundle.manifest import Manifest
from engine.errors import BackendError, MissingPackageError
from engine.networks.config import ClassifierConfig
from engine.networks.inputs import UNCONDITIONED, Conditions, Inputs

_NETWORK_INPUTS = ("x_t", "timestep", "label", "image")
HINTS = {"fp32": "f32", "bf16": "bf16"}
"""Precision, the one taken unasked first, and its name in OpenVINO."""


def has_bf16() -> bool:
    """Whether this CPU computes in bf16 by itself; False where OpenVINO is not installed."""
    try:
        import openvino
    except ImportError:
        return False
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compile_file(path: Path, precision: str, threads: int | None) -> Any:
    """An openvino.CompiledModel on the CPU, precision "fp32" or "bf16"; raises MissingPackageError or BackendError."""
    try:
        import openvino
    except ImportError as error:
        raise MissingPackageError("openvino", "the ov backend", "cpu") from error
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[precision], "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        return core.compile_model(core.read_model(path), "CPU", options)
    except RuntimeError as error:
        raise BackendError(f"OpenVINO {openvino.__version__} cannot compile {path}: {error}") from error


class OpenVINOBackend:
    """One compiled model. The precision is always set: left alone, OpenVINO takes bf16 where the CPU has it."""

    name = "ov"

    def __init__(self, manifest: Manifest, path: Path, precision: str, threads: int | None) -> None:
        self._model: Any = compile_file(path, precision, threads)
        # A cast right behind an input gives it a second name.
        self._inputs = [next(name for name in _NETWORK_INPUTS if name in value.names) for value in self._model.inputs]
        self.manifest, self.precision = manifest, precision
        self.device = torch.device("cpu")

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        """See engine.backends.protocol.Backend."""
        if self._model is None:
            raise BackendError("this backend was closed; open the bundle again")
        given = Inputs(x_t, timestep, conditions).tensors()
        feed = [given[name].contiguous().numpy() for name in self._inputs]
        result = self._model(feed)[self._model.outputs[0]]
        return torch.from_numpy(result.copy())

    def close(self) -> None:
        self._model = None


class OpenVINOGuide:
    """A bundle's classifier.onnx as an engine.diffusion.guidance.Guide, always in float32."""

    name = OpenVINOBackend.name
    precision = "fp32"

    def __init__(self, config: ClassifierConfig, path: Path, threads: int | None) -> None:
        self._model: Any = compile_file(path, self.precision, threads)
        self._config = config

    @property
    def config(self) -> ClassifierConfig:
        return self._config

    def __call__(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See engine.diffusion.guidance.Guide; raises BackendError once closed."""
        if self._model is None:
            raise BackendError("this classifier was closed; open the bundle again")
        given = {"x_t": x_t, "timestep": timestep, "label": label, "scale": scale}
        results = self._model({name: value.contiguous().numpy() for name, value in given.items()})
        grad, log_p = (torch.from_numpy(results[name].copy()) for name in ("grad", "log_p"))
        return grad, log_p

    def close(self) -> None:
        """Release the model."""
        self._model = None
