"""What a backend is: a network that can be called, and one that can be captured in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.bundle.manifest import Manifest
from engine.device import Stream
from engine.networks.inputs import UNCONDITIONED, Conditions


class Backend(Protocol):
    """A network that can be called.

    name, precision: what runs, e.g. "ort" in "fp32". device: where inputs and outputs live.
    """

    name: str
    precision: str
    device: torch.device
    manifest: Manifest

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        """x_t [B, C, H, W] fp32, timestep [B] fp32, conditions -> out [B, C', H, W] fp32."""
        ...

    def close(self) -> None:
        """Release memory; the backend cannot be called afterwards."""
        ...


class Bound(Protocol):
    """A network bound to buffers at fixed addresses; it keeps them alive."""

    def enqueue(self, stream: Stream) -> None:
        """One call on this stream, from the input buffers to the output buffers."""
        ...

    def check_capturable(self, stream: Stream) -> None:
        """Raises BackendError where calls on this stream cannot be captured."""
        ...


class Capturable(Protocol):
    """A backend, or a guide, whose calls can be captured in a graph."""

    device: torch.device

    def fit(self, batch: int) -> int:
        """The smallest batch, `batch` or more, that it runs without padding of its own."""
        ...

    def bind(self, buffers: Mapping[str, Tensor]) -> Bound:
        """Take inputs from and put results into these, by the names of its ONNX graph; all of one batch that fits.

        A network: x_t, timestep, its conditions, out. A classifier's gradient: x_t, timestep, label, scale,
        grad, log_p.
        """
        ...


def is_capturable(network: object) -> bool:
    """Whether a backend or guide has bind and lives on a CUDA device."""
    device = getattr(network, "device", None)
    return hasattr(network, "bind") and isinstance(device, torch.device) and device.type == "cuda"
