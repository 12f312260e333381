"""The backend "ort": ONNX Runtime. See engine.backends.protocol.GuideModule."""

from __future__ import annotations

from engine.backends.ort.ort_backend import OrtBackend, OrtGuide
from engine.backends.protocol import Backend
from engine.backends.requirements import classifier_config, missing_file, missing_package
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import CLASSIFIER, UNET, onnx_name

NAME = OrtBackend.name
LIBRARIES: tuple[str, ...] = ("onnxruntime", "onnxruntime-gpu")
_FILES = {"fp32": onnx_name(UNET), "fp16": onnx_name(UNET, "fp16")}


def precisions() -> tuple[str, ...]:
    return tuple(_FILES)


def reason_against(bundle: Bundle, precision: str | None) -> str | None:
    return missing_file(bundle, _FILES[precision or precisions()[0]]) or _missing()


def open(bundle: Bundle, precision: str | None, threads: int | None) -> OrtBackend:
    taken = precision or precisions()[0]
    return OrtBackend(bundle.manifest, bundle.file(_FILES[taken]), taken, threads)


def guide_reason_against(bundle: Bundle) -> str | None:
    return missing_file(bundle, onnx_name(CLASSIFIER)) or _missing()


def open_guide(bundle: Bundle, precision: str | None, threads: int | None, beside: Backend | None) -> OrtGuide:
    is_half = precision == "fp16" and bundle.has(onnx_name(CLASSIFIER, "fp16"))
    name, taken = (onnx_name(CLASSIFIER, "fp16"), "fp16") if is_half else (onnx_name(CLASSIFIER), "fp32")
    return OrtGuide(classifier_config(bundle), bundle.file(name), threads, taken)


def _missing() -> str | None:
    return missing_package("onnxruntime", "onnx")
