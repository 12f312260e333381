"""The backend "native": this package's CPU engine. See engine.backends.protocol.GuideModule.

Its modules are imported on first use, because a program that runs another backend needs none of them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from engine.backends.protocol import Backend
from engine.backends.requirements import classifier_config, missing_file
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import CLASSIFIER, UNET, ranges_name, weights_name

if TYPE_CHECKING:
    from engine.backends.native.native_backend import NativeBackend
    from engine.backends.native.native_guide import NativeGuide

logger = logging.getLogger(__name__)

NAME = "native"
LIBRARIES: tuple[str, ...] = ()


def precisions() -> tuple[str, ...]:
    """bf16 first where the CPU multiplies it; its instructions are int8's too."""
    from kernels.native.library import NativeError, best_isa

    try:
        best_isa("bf16")
    except NativeError:
        return ("fp32",)
    return ("bf16", "int8", "fp32")


def reason_against(bundle: Bundle, precision: str | None) -> str | None:
    from engine.backends.native.native_backend import unsupported

    needed = ranges_name(UNET) if precision == "int8" else weights_name(UNET)
    return missing_file(bundle, needed) or _machine_reason() or unsupported(bundle.manifest.unet.config)


def open(bundle: Bundle, precision: str | None, threads: int | None) -> NativeBackend:
    from engine.backends.native.native_backend import NativeBackend

    backend = NativeBackend.open(bundle, precision or precisions()[0], threads)
    logger.info("backend native computes with %s instructions", backend.isa.name.lower())
    return backend


def guide_reason_against(bundle: Bundle) -> str | None:
    from engine.backends.native.native_guide import unsupported

    return missing_file(bundle, weights_name(CLASSIFIER)) or _machine_reason() or unsupported(classifier_config(bundle))


def open_guide(bundle: Bundle, precision: str | None, threads: int | None, beside: Backend | None) -> NativeGuide:
    from engine.backends.native.native_backend import NativeBackend
    from engine.backends.native.native_guide import NativeGuide

    taken = precisions()[0] if precision in (None, "bf16", "int8") else "fp32"
    return NativeGuide.open(bundle, taken, threads, beside if isinstance(beside, NativeBackend) else None)


def _machine_reason() -> str | None:
    from kernels.native.library import reason_against

    return reason_against()
