"""Every backend, in order of preference, and the choice of one for a bundle."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from engine.backends import eager, native, ort, ov, trt
from engine.backends.protocol import Backend, BackendModule, GuideModule, OpenedGuide
from engine.backends.requirements import classifier_config
from engine.bundle.bundle_folder import Bundle
from engine.errors import BackendError

logger = logging.getLogger(__name__)

BACKENDS: tuple[BackendModule, ...] = tuple([native, ov, ort, eager, trt])
"""The fastest first on a machine without CUDA; on one with CUDA the order is the reverse."""

GUIDES: tuple[GuideModule, ...] = tuple([native, ov, ort, trt])
"""Those that run a classifier's gradient; beside a network in another backend the first of these that can."""

AUTO = "auto"
"""The name that leaves the choice to this module."""

NAMES: tuple[str, ...] = tuple(module.NAME for module in BACKENDS)


def preferred() -> tuple[BackendModule, ...]:
    """Every backend, the fastest on this machine first."""
    return BACKENDS[::-1] if torch.cuda.is_available() else BACKENDS


def variants() -> tuple[tuple[str, str], ...]:
    """(backend, precision) for everything that the backends offer on this machine, the fastest backend first."""
    return tuple((module.NAME, precision) for module in preferred() for precision in module.precisions())


def libraries(name: str) -> tuple[str, ...]:
    """The distributions whose version decides the rounding of a backend, beside torch and numpy.

    name: as Backend.name. Of a backend that is not in this module, one of a caller's own say, nothing is known: ().
    """
    known = {module.NAME: module.LIBRARIES for module in BACKENDS}
    return known.get(name, ())


def open_backend(
    bundle: str | Path | Bundle, name: str = AUTO, precision: str | None = None, threads: int | None = None
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
    order = preferred()
    names = ", ".join(module.NAME for module in order)
    if name != AUTO and name not in NAMES:
        raise BackendError(f"unknown backend {name!r}; known: {AUTO}, {names}")
    rejected: list[str] = []
    for module in order:
        if name not in (AUTO, module.NAME):
            continue
        reason = _reason_against(module, opened, precision)
        if reason is None:
            backend = module.open(opened, precision, threads)
            why = rejected or ([f"first of {names}"] if name == AUTO else [])
            logger.info("backend %s in %s%s", backend.name, backend.precision, _in_brackets(why))
            return backend
        rejected.append(f"{module.NAME}: {reason}")
    raise BackendError("no backend can run this bundle here: " + "; ".join(rejected))


def _reason_against(module: BackendModule, bundle: Bundle, precision: str | None) -> str | None:
    offered = module.precisions()
    if precision is not None and precision not in offered:
        return f"it offers {', '.join(offered)}, not {precision}"
    return module.reason_against(bundle, precision)


def open_guide(
    bundle: Bundle,
    backend: str = AUTO,
    precision: str | None = None,
    threads: int | None = None,
    beside: Backend | None = None,
) -> OpenedGuide:
    """The gradient of the bundle's classifier, without torch autograd.

    backend: of the U-Net, which is taken where it can run the classifier; otherwise the first of GUIDES that can:
    native (this package's CPU engine), else OpenVINO, else ONNX Runtime, the latter two with the exported graph.
    Beside trt that takes a plan of the classifier for this machine, which then is part of the CUDA graph. precision: of
    the U-Net; native takes bf16 for bf16, int8 and None where the CPU multiplies it, ort takes classifier.fp16.onnx for
    fp16 where the bundle has it, trt takes what the plan is in, and everything else is fp32. threads: CPU threads, None
    for all cores. beside: the U-Net, whose threads a native classifier shares with a native U-Net, as their calls
    follow one another. Which one was taken is logged, with a warning where the U-Net's own cannot run the classifier.
    Raises BundleError for a bundle without a classifier and BackendError where nothing can run it.
    """
    classifier_config(bundle)
    rejected: list[str] = []
    for module in sorted(GUIDES, key=lambda module: backend != module.NAME):
        reason = module.guide_reason_against(bundle)
        if reason is None:
            guide = module.open_guide(bundle, precision, threads, beside)
            logger.info("classifier on %s in %s%s", guide.name, guide.precision, _in_brackets(rejected))
            return guide
        if backend == module.NAME:
            logger.warning("the classifier cannot run on %s as the network does, which is slower: %s", backend, reason)
        rejected.append(f"{module.NAME}: {reason}")
    raise BackendError("nothing here can run the bundle's classifier: " + "; ".join(rejected))


def _in_brackets(reasons: list[str]) -> str:
    return f" ({'; '.join(reasons)})" if reasons else ""
