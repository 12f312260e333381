"""The network that is measured: what a report says of it, its variants, and real inputs with their fp32 outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.core.report import Missing
from engine.backends.ov.ov_backend import has_bf16
from engine.backends.protocol import Backend
from engine.backends.registry import open_backend
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, weights_name
from engine.checkpoints.types import build_unet
from engine.errors import BackendError, RequestError, UNetRTError
from engine.networks.inputs import Inputs, join_inputs
from engine.networks.unet import UNet
from export.subject import real_cases

Name = tuple[str, str]
"""A backend and its precision, ("ov", "fp32") say."""


def parse_names(text: str) -> tuple[Name, ...]:
    """("ov", "fp32") and others from "ov:fp32,ort:fp32"; raises RequestError."""
    names = []
    for part in text.split(","):
        backend, colon, precision = part.strip().partition(":")
        if not (backend and colon and precision):
            raise RequestError(f"variant {part!r} given; expected BACKEND:PRECISION, for example ov:fp32,ort:fp32")
        names.append((backend, precision))
    return tuple(dict.fromkeys(names))


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """The subject block of a report."""
    manifest = bundle.manifest
    network = reference_network(bundle)
    return {
        "name": bundle.path.name.removesuffix(".engine"),
        "family": manifest.family,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "channels": manifest.unet.config.in_channels,
        "image_size": list(manifest.unet.config.image_size),
        "checkpoint_sha256": manifest.checkpoint_sha256,
    }


def reference_network(bundle: Bundle) -> UNet:
    """The network in plain fp32 torch on the CPU; raises BundleError."""
    from safetensors.torch import load_file

    return build_unet(bundle.manifest.unet.config, load_file(bundle.file(weights_name(UNET))))


def open_variants(
    bundle: Bundle, names: Sequence[Name], threads: int | None
) -> tuple[dict[str, Backend], tuple[Missing, ...]]:
    """Backends by "backend precision", in order, and those that this machine or bundle does not have.

    OpenVINO in bf16 opens on every CPU, and computes in fp32 on those without bf16: there it is one of the missing.
    """
    opened: dict[str, Backend] = {}
    missing = []
    for name, precision in names:
        try:
            backend = open_backend(bundle, name, precision, threads)
            if (name, precision) == ("ov", "bf16") and not has_bf16():
                backend.close()
                raise BackendError("this CPU has no bf16 of its own, so OpenVINO computes in fp32")
            opened[f"{name} {precision}"] = backend
        except (UNetRTError, RuntimeError) as error:
            missing.append(Missing(f"{name} {precision}", str(error)))
    return opened, tuple(missing)


@dataclass(frozen=True, slots=True, eq=False)
class RealInputs:
    """Calls on real trajectories as one batch, and the fp32 network's output of it."""

    case: Inputs
    wanted: Tensor

    def first(self, batch: int) -> Inputs:
        """The calls as a batch of this many, repeated where there are fewer."""
        rows = torch.arange(batch) % len(self.case.x_t)
        return self.case.rows(rows)

    def first_wanted(self, batch: int) -> Tensor:
        """The fp32 output of first(batch)."""
        return self.wanted[torch.arange(batch) % len(self.wanted)]


def real_inputs(bundle: Bundle) -> RealInputs:
    """Inputs as sampling meets them, timesteps spread over the schedule, with the fp32 network's outputs."""
    network = reference_network(bundle)
    cases = real_cases(network, bundle.manifest)
    batch = join_inputs([case for case in cases if not case.is_single] or cases)
    with torch.no_grad():
        return RealInputs(batch, network(**batch.tensors()))
