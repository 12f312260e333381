"""A backend of one's own: the network in ONNX's reference evaluator, slow and independent of every other library.

Nothing has to be registered to use it: a Sampler takes any object of this form.

    sampler = Sampler(backend.open(Bundle.open("ckpt.engine"), None, None))
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, onnx_name
from engine.bundle.manifest import Manifest
from engine.errors import BackendError
from engine.networks.inputs import UNCONDITIONED, Conditions, Inputs

NAME = "reference"
LIBRARIES: tuple[str, ...] = ("onnx",)


def precisions() -> tuple[str, ...]:
    """What it offers here, its default first."""
    return ("fp32",)


def reason_against(bundle: Bundle, precision: str | None) -> str | None:
    """Why it cannot run this bundle here, or None."""
    if importlib.util.find_spec("onnx") is None:
        return "onnx is not installed (pip install 'unet-rt[onnx]')"
    return None if bundle.has(onnx_name(UNET)) else f"the bundle holds no {onnx_name(UNET)}"


def open(bundle: Bundle, precision: str | None, threads: int | None) -> ReferenceBackend:
    """The bundle's network; threads are not its to choose. Raises BackendError where there is a reason against it."""
    if reason := reason_against(bundle, precision):
        raise BackendError(f"the {NAME} backend cannot be used: {reason}")
    from onnx.reference import ReferenceEvaluator

    # Bundle.file checks the file's hash before it gives its path.
    return ReferenceBackend(bundle.manifest, ReferenceEvaluator(str(bundle.file(onnx_name(UNET)))))


class ReferenceBackend:
    """See engine.backends.protocol.Backend."""

    name, precision = NAME, "fp32"

    def __init__(self, manifest: Manifest, evaluator: Any) -> None:
        self.manifest, self.device = manifest, torch.device("cpu")
        self._evaluator: Any = evaluator

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        """x_t [B, C, H, W], timestep [B] float32 -> [B, C', H, W] float32; raises BackendError once closed."""
        if self._evaluator is None:
            raise BackendError("this backend was closed; open the bundle again")
        # The graph's inputs have the names of the conditions: label and image.
        feed = {name: value.numpy() for name, value in Inputs(x_t, timestep, conditions).tensors().items()}
        return torch.from_numpy(self._evaluator.run(None, feed)[0])

    def close(self) -> None:
        """Release the model."""
        self._evaluator = None
