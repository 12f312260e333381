"""The backend "ov": OpenVINO. See engine.backends.protocol.GuideModule."""

from __future__ import annotations

from engine.backends.ov.ov_backend import HINTS, OpenVINOBackend, OpenVINOGuide
from engine.backends.protocol import Backend
from engine.backends.requirements import classifier_config, missing_file, missing_package
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import CLASSIFIER, UNET, onnx_name

NAME = OpenVINOBackend.name
LIBRARIES: tuple[str, ...] = ("openvino",)


def precisions() -> tuple[str, ...]:
    return tuple(HINTS)


def reason_against(bundle: Bundle, precision: str | None) -> str | None:
    return missing_file(bundle, onnx_name(UNET)) or _missing()


def open(bundle: Bundle, precision: str | None, threads: int | None) -> OpenVINOBackend:
    return OpenVINOBackend(bundle.manifest, bundle.file(onnx_name(UNET)), precision or precisions()[0], threads)


def guide_reason_against(bundle: Bundle) -> str | None:
    return missing_file(bundle, onnx_name(CLASSIFIER)) or _missing()


def open_guide(bundle: Bundle, precision: str | None, threads: int | None, beside: Backend | None) -> OpenVINOGuide:
    return OpenVINOGuide(classifier_config(bundle), bundle.file(onnx_name(CLASSIFIER)), threads)


def _missing() -> str | None:
    return missing_package("openvino", "cpu")
