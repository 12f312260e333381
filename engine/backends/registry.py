"""The Backend protocol and the choice of one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.backends.protocol import Backend
from engine.backends.trt.trt_library import PREFERRED, find_plans, reason_against
from engine.bundle.folder import Bundle
from engine.bundle.manifest import (
    CLASSIFIER_FP16_NAME,
    CLASSIFIER_NAME,
    CLASSIFIER_WEIGHTS_NAME,
    FP16_ONNX_NAME,
    INT8_NAME,
    ONNX_NAME,
    WEIGHTS_NAME,
)
from engine.diffusion.guidance import Guide
from engine.errors import BackendError, BundleError, MissingPackageError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Choice:
    """name: of the backend. precisions: what it offers, its default first. needs: the artefact a precision runs.
    reason_against: why this machine cannot use it, or None."""

    name: str
    precisions: tuple[str, ...]
    needs: dict[str, str]
    reason_against: Callable[[], str | None]


def _missing(module: str, extra: str) -> Callable[[], str | None]:
    def reason() -> str | None:
        import importlib.util

        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed (pip install 'unet-rt[{extra}]')"
        return None

    return reason


def _native_reason() -> str | None:
    from kernels.native.library import reason_against

    return reason_against()


def _eager_precisions() -> tuple[str, ...]:
    return ("fp16", "bf16", "fp32") if torch.cuda.is_available() else ("fp32",)


def _native_precisions() -> tuple[str, ...]:
    """bf16 first where the CPU multiplies it; its instructions are int8's too."""
    from kernels.native.library import NativeError, best_isa

    try:
        best_isa("bf16")
    except NativeError:
        return ("fp32",)
    return ("bf16", "int8", "fp32")


def _choices() -> tuple[_Choice, ...]:
    """Fastest first, for a machine without a usable plan."""
    eager, native = _eager_precisions(), _native_precisions()
    choices = (
        _Choice("native", native, dict.fromkeys(native, WEIGHTS_NAME) | {"int8": INT8_NAME}, _native_reason),
        _Choice("ov", ("fp32", "bf16"), {"fp32": ONNX_NAME, "bf16": ONNX_NAME}, _missing("openvino", "cpu")),
        _Choice("ort", ("fp32", "fp16"), {"fp32": ONNX_NAME, "fp16": FP16_ONNX_NAME}, _missing("onnxruntime", "onnx")),
        _Choice("eager", eager, dict.fromkeys(eager, WEIGHTS_NAME), lambda: None),
    )
    trt = _Choice("trt", PREFERRED, {}, lambda: None)
    return (trt, *reversed(choices)) if torch.cuda.is_available() else (*choices, trt)


def open_backend(
    bundle: str | Path | Bundle, name: str = "auto", precision: str | None = None, threads: int | None = None
) -> Backend:
    """Open a bundle's network on the fastest backend that this machine and the bundle support.

    name: "auto", "trt" (TensorRT), "native" (this package's CPU engine), "ov" (OpenVINO), "ort" (ONNX Runtime) or
    "eager" (torch). precision: None takes bf16 for native where the CPU multiplies it (AMX or AVX-512-bf16) and else
    fp32, fp32 for ov and ort, fp32 for eager on a CPU and fp16 on CUDA, fp16 for trt where the bundle has such a plan.
    threads: CPU threads, None for all cores. Which one was taken and why is logged. Raises BackendError,
    MissingPackageError or BundleError.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if threads is not None and threads < 1:
        raise BackendError(f"threads is {threads}; expected 1 or more")
    choices = {choice.name: choice for choice in _choices()}
    if name != "auto" and name not in choices:
        raise BackendError(f"unknown backend {name!r}; known: auto, {', '.join(choices)}")
    rejected: list[str] = []
    for choice in choices.values():
        if name not in ("auto", choice.name):
            continue
        reason = _reason_against(choice, opened, precision)
        if reason is None:
            taken = precision or choice.precisions[0]
            why = rejected or ([f"first of {', '.join(choices)}"] if name == "auto" else [])
            why = [*why, *_instructions(choice.name, taken)]
            logger.info("backend %s in %s%s", choice.name, taken, f" ({'; '.join(why)})" if why else "")
            if choice.name == "trt":
                return _open_trt(opened, precision)
            if choice.name == "native":
                return _open_native(opened, taken, threads)
            return _open(choice.name, opened, taken, choice.needs[taken], threads)
        rejected.append(f"{choice.name}: {reason}")
    raise BackendError("no backend can run this bundle here: " + "; ".join(rejected))


def _reason_against(choice: _Choice, bundle: Bundle, precision: str | None) -> str | None:
    if precision is not None and precision not in choice.precisions:
        return f"it offers {', '.join(choice.precisions)}, not {precision}"
    if choice.name == "trt":
        return reason_against(bundle, precision)
    artefact = choice.needs[precision or choice.precisions[0]]
    if not bundle.has(artefact):
        return f"the bundle holds no {artefact}"
    reason = choice.reason_against()
    if reason is None and choice.name == "native":
        from engine.backends.native.native_backend import unsupported

        return unsupported(bundle.manifest.config)
    return reason


def _instructions(name: str, precision: str) -> list[str]:
    """Those that the CPU engine runs on."""
    if name != "native":
        return []
    from kernels.native.library import best_isa

    return [f"instructions: {best_isa(precision).name.lower()}"]


def _open_trt(bundle: Bundle, precision: str | None) -> Backend:
    from engine.backends.trt.trt_backend import TrtBackend

    return TrtBackend(bundle, precision)


def _open_native(bundle: Bundle, precision: str, threads: int | None) -> Backend:
    from engine.backends.native.native_backend import NativeBackend

    return NativeBackend.open(bundle, precision, threads)


def _open(name: str, bundle: Bundle, precision: str, artefact: str, threads: int | None) -> Backend:
    path = bundle.file(artefact)
    match name:
        case "ov":
            from engine.backends.ov.ov_backend import OpenVINOBackend

            return OpenVINOBackend(bundle.manifest, path, precision, threads)
        case "ort":
            from engine.backends.ort.ort_backend import OrtBackend

            return OrtBackend(bundle.manifest, path, precision, threads)
        case _:
            from engine.backends.eager.eager_backend import EagerBackend

            return EagerBackend.from_weights(bundle.manifest, path, precision, threads)


def open_guide(
    bundle: Bundle,
    backend: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    beside: Backend | None = None,
) -> Guide:
    """The gradient of the bundle's classifier, without torch autograd.

    backend: of the U-Net, which is taken where it can run the classifier; otherwise native (this package's CPU engine),
    else OpenVINO, else ONNX Runtime, the latter two with the exported graph. Beside trt that takes a plan of the
    classifier for this machine, which then is part of the CUDA graph. precision: of the U-Net; native takes bf16 for
    bf16, int8 and None where the CPU multiplies it, ort takes classifier.fp16.onnx for fp16 where the bundle has it,
    and everything else is fp32. threads: CPU threads, None for all cores. beside: the U-Net, whose threads a native
    classifier shares with a native U-Net, as their calls follow one another. Which one was taken is logged. Raises
    BundleError for a bundle without a classifier and BackendError where nothing can run it.
    """
    entry = bundle.manifest.classifier
    if entry is None:
        raise BundleError(
            f"{bundle.path} holds no classifier; pass its file with --classifier, or build the bundle again with: "
            "python -m export.to_trt CHECKPOINT --classifier FILE"
        )
    if backend == "trt":
        try:
            plans = find_plans(bundle, "classifier", None)
        except BackendError as error:
            logger.warning("classifier without TensorRT, each step waits for it: %s", error)
        else:
            from engine.backends.trt.trt_backend import TrtGuide

            return TrtGuide(entry.config, bundle, plans)
    reasons = {
        "native": _native_guide_reason(bundle),
        "ov": _missing("openvino", "cpu")(),
        "ort": _missing("onnxruntime", "onnx")(),
    }
    order = sorted(reasons, key=lambda name: name != backend)
    name = next((name for name in order if reasons[name] is None), None)
    if name is None:
        raise BackendError("nothing here can run the bundle's classifier: " + "; ".join(map(str, reasons.values())))
    taken = _guide_precision(name, precision, bundle)
    why = [f"{other}: {reasons[other]}" for other in order[: order.index(name)]]
    logger.info("classifier on %s in %s%s", name, taken, f" ({'; '.join(why)})" if why else "")
    if name == "native":
        from engine.backends.native.native_backend import NativeBackend
        from engine.backends.native.native_guide import NativeGuide

        return NativeGuide.open(bundle, taken, threads, beside if isinstance(beside, NativeBackend) else None)
    if name == "ov":
        from engine.backends.ov.ov_backend import OpenVINOGuide

        return OpenVINOGuide(entry.config, bundle.file(CLASSIFIER_NAME), threads)
    from engine.backends.ort.ort_backend import OrtGuide

    return OrtGuide(entry.config, bundle.file(CLASSIFIER_FP16_NAME if taken == "fp16" else CLASSIFIER_NAME), threads)


def _guide_precision(name: str, precision: str | None, bundle: Bundle) -> str:
    """What a classifier beside a U-Net in `precision` is computed in."""
    if name == "native" and precision in (None, "bf16", "int8"):
        return _native_precisions()[0]
    is_half = name == "ort" and precision == "fp16" and bundle.has(CLASSIFIER_FP16_NAME)
    return "fp16" if is_half else "fp32"


def _native_guide_reason(bundle: Bundle) -> str | None:
    """Why the CPU engine cannot run a bundle's classifier, or None."""
    from engine.backends.native.native_guide import unsupported

    assert bundle.manifest.classifier is not None
    if not bundle.has(CLASSIFIER_WEIGHTS_NAME):
        return f"the bundle holds no {CLASSIFIER_WEIGHTS_NAME}"
    return _native_reason() or unsupported(bundle.manifest.classifier.config)


__all__ = ["Backend", "MissingPackageError", "open_backend", "open_guide"]
