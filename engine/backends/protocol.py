"""What a backend is: a network that can be called, perhaps captured in a graph, and the module that opens it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from engine.bundle.bundle_folder import Bundle
from engine.bundle.manifest import Manifest
from engine.device import Stream
from engine.diffusion.guidance import Guide
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


class OpenedGuide(Guide, Protocol):
    """A bundle's classifier, opened. name, precision: what runs its gradient, e.g. "ov" in "fp32"."""

    name: str
    precision: str

    def close(self) -> None:
        """Release memory; the guide cannot be called afterwards."""
        ...


class BackendModule(Protocol):
    """What each package in engine.backends offers, as a module; engine.backends.registry lists them.

    NAME: by which a user chooses it, "ort" say. LIBRARIES: the distributions (names as pip knows them) whose version
    decides its rounding, beside torch and numpy; alternatives of one library stand together.
    """

    NAME: str
    LIBRARIES: tuple[str, ...]

    def precisions(self) -> tuple[str, ...]:
        """What it computes in on this machine, the one taken unasked first."""
        ...

    def reason_against(self, bundle: Bundle, precision: str | None) -> str | None:
        """Why this machine cannot run the bundle's network with it, or None.

        precision: one of precisions(), None for the one that it takes unasked. Opens nothing.
        """
        ...

    def open(self, bundle: Bundle, precision: str | None, threads: int | None) -> Backend:
        """The bundle's network, where there is no reason against it.

        threads: CPU threads, None for all cores. Raises BackendError or BundleError.
        """
        ...


class GuideModule(BackendModule, Protocol):
    """A backend's module that runs a classifier's input gradient too."""

    def guide_reason_against(self, bundle: Bundle) -> str | None:
        """Why this machine cannot run the gradient of the bundle's classifier with it, or None."""
        ...

    def open_guide(
        self, bundle: Bundle, precision: str | None, threads: int | None, beside: Backend | None
    ) -> OpenedGuide:
        """The gradient of the bundle's classifier, where there is no reason against it.

        precision: of the U-Net that it guides; the guide takes what suits it of its own. threads: CPU threads, None for
        all cores. beside: that U-Net, which is called by turns with the guide and may share its threads. Raises
        BackendError or BundleError.
        """
        ...


def is_capturable(network: object) -> bool:
    """Whether a backend or guide has bind and lives on a CUDA device."""
    device = getattr(network, "device", None)
    return hasattr(network, "bind") and isinstance(device, torch.device) and device.type == "cuda"
