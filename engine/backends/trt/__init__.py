"""The backend "trt": TensorRT. See engine.backends.protocol.GuideModule."""

from __future__ import annotations

from engine.backends.protocol import Backend
from engine.backends.requirements import classifier_config
from engine.backends.trt.trt_backend import TrtBackend, TrtGuide
from engine.backends.trt.trt_library import PREFERRED, find_plans
from engine.bundle.bundle_folder import Bundle
from engine.errors import BackendError

NAME = TrtBackend.name
LIBRARIES: tuple[str, ...] = ("tensorrt-rtx-cu13", "tensorrt")


def precisions() -> tuple[str, ...]:
    return PREFERRED


def reason_against(bundle: Bundle, precision: str | None) -> str | None:
    return _reason_against(bundle, "unet", precision)


def open(bundle: Bundle, precision: str | None, threads: int | None) -> TrtBackend:
    return TrtBackend(bundle, precision)


def guide_reason_against(bundle: Bundle) -> str | None:
    return _reason_against(bundle, "classifier", None)


def open_guide(bundle: Bundle, precision: str | None, threads: int | None, beside: Backend | None) -> TrtGuide:
    return TrtGuide(classifier_config(bundle), bundle)


def _reason_against(bundle: Bundle, network: str, precision: str | None) -> str | None:
    try:
        find_plans(bundle, network, precision)
    except BackendError as error:
        return str(error)
    return None
