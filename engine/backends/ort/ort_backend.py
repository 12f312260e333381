"""The network's ONNX file in ONNX Runtime on a CPU: the portable backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.bundle.manifest import Manifest
from engine.errors import BackendError, MissingPackageError
from engine.networks.config import ClassifierConfig
from engine.networks.inputs import UNCONDITIONED, Conditions, Inputs


def open_session(path: Path, threads: int | None) -> Any:
    """An onnxruntime.InferenceSession on the CPU; raises MissingPackageError, or BackendError for a bad file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime", "the ort backend", "onnx") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no public base
        raise BackendError(f"ONNX Runtime {onnxruntime.__version__} cannot open {path}: {error}") from error


def run_session(session: Any, given: Mapping[str, Tensor | None], outputs: Sequence[str] | None = None) -> list[Tensor]:
    """The named outputs (None: all), for the inputs among `given` that the network has; others are ignored."""
    tensors = {value.name: given[value.name] for value in session.get_inputs()}
    feed = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items() if tensor is not None}
    return [torch.from_numpy(result) for result in session.run(outputs, feed)]


class OrtBackend:
    """One ONNX Runtime session; rows of a batch do not influence each other's bits."""

    name = "ort"

    def __init__(self, manifest: Manifest, path: Path, precision: str, threads: int | None) -> None:
        self._session = open_session(path, threads)
        self.manifest, self.precision = manifest, precision
        self.device = torch.device("cpu")

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        """See engine.backends.protocol.Backend."""
        if self._session is None:
            raise BackendError("this backend was closed; open the bundle again")
        return run_session(self._session, Inputs(x_t, timestep, conditions).tensors())[0]

    def close(self) -> None:
        self._session = None


class OrtGuide:
    """A bundle's classifier.onnx, or classifier.fp16.onnx, as an engine.diffusion.guidance.Guide."""

    name = OrtBackend.name

    def __init__(self, config: ClassifierConfig, path: Path, threads: int | None, precision: str = "fp32") -> None:
        """precision: what the file computes in."""
        self._session = open_session(path, threads)
        self._config, self.precision = config, precision

    @property
    def config(self) -> ClassifierConfig:
        return self._config

    def __call__(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See engine.diffusion.guidance.Guide; raises BackendError once closed."""
        if self._session is None:
            raise BackendError("this classifier was closed; open the bundle again")
        given = {"x_t": x_t, "timestep": timestep, "label": label, "scale": scale}
        grad, log_p = run_session(self._session, given, ["grad", "log_p"])
        return grad, log_p

    def close(self) -> None:
        """Release the session."""
        self._session = None
