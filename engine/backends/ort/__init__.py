"""The backend "ort": ONNX Runtime. See engine.backends.protocol.GuideModule."""

from __future__ import annotations

from engine.backends.ort.ort_backend import OrtBackend, OrtGuide
from engine.backends.protocol import Backend
from engine.backends.requirements import classifier_config, missing_file, missing_package
from engine.bundle.folder import Bundle
from engine.bundle.manifest import CLASSIFIER_FP16_NAME, CLASSIFIER_NAME, FP16_ONNX_NAME, ONNX_NAME

NAME = OrtBackend.name
LIBRARIES: tuple[str, ...] = ("onnxruntime", "onnxruntime-gpu")
_FILES = {"fp32": ONNX_NAME, "fp16": FP16_ONNX_NAME}


def precisions() -> tuple[str, ...]:
    return tuple(_FILES)


def reason_against(bundle: Bundle, precision: str | None) -> str | None:
    return missing_file(bundle, _FILES[precision or precisions()[0]]) or _missing()


def open(bundle: Bundle, precision: str | None, threads: int | None) -> OrtBackend:
    taken = precision or precisions()[0]
    return OrtBackend(bundle.manifest, bundle.file(_FILES[taken]), taken, threads)


def guide_reason_against(bundle: Bundle) -> str | None:
    return missing_file(bundle, CLASSIFIER_NAME) or _missing()


def open_guide(bundle: Bundle, precision: str | None, threads: int | None, beside: Backend | None) -> OrtGuide:
    is_half = precision == "fp16" and bundle.has(CLASSIFIER_FP16_NAME)
    name, taken = (CLASSIFIER_FP16_NAME, "fp16") if is_half else (CLASSIFIER_NAME, "fp32")
    return OrtGuide(classifier_config(bundle), bundle.file(name), threads, taken)


def _missing() -> str | None:
    return missing_package("onnxruntime", "onnx")
