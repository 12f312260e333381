"""The backend "eager": the network in torch. See engine.backends.protocol.BackendModule."""

from __future__ import annotations

import torch

from engine.backends.eager.eager_backend import EagerBackend
from engine.backends.requirements import missing_file
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, weights_name

NAME = EagerBackend.name
LIBRARIES: tuple[str, ...] = ()


def precisions() -> tuple[str, ...]:
    return ("fp16", "bf16", "fp32") if torch.cuda.is_available() else ("fp32",)


def reason_against(bundle: Bundle, precision: str | None) -> str | None:
    return missing_file(bundle, weights_name(UNET))


def open(bundle: Bundle, precision: str | None, threads: int | None) -> EagerBackend:
    path = bundle.file(weights_name(UNET))
    return EagerBackend.from_weights(bundle.manifest, path, precision or precisions()[0], threads)
