"""Which TensorRT this machine has, and which of a bundle's plans fit it: `tensorrt` 10 and 11, and `tensorrt_rtx`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.backends.trt.trt_log import process_log
from engine.bundle.bundle_folder import Bundle
from engine.bundle.manifest import PlanEntry
from engine.device import no_gpu
from engine.errors import BackendError
from engine.files import user_cache_folder

PREFERRED = ("fp16", "bf16", "int8", "fp32")
"""Precisions of plans, the one taken unasked first."""

REBUILD = "python -m export.to_trt CHECKPOINT"
DATACENTRE, RTX = "tensorrt", "tensorrt_rtx"
"""The libraries, by the names of their packages."""

PIP_LINES = {DATACENTRE: "pip install tensorrt", RTX: "pip install 'unet-rt[trt]'"}


@dataclass(frozen=True, slots=True, eq=False)
class Library:
    """An installed TensorRT. trt: the module. log: its one logger of this process."""

    name: str
    trt: Any
    log: Any

    def failure(self, what: str, remedy: str) -> BackendError:
        """An error with the last lines of the log."""
        lines = "; ".join(list(self.log.lines)[-3:]) or "it gave no reason"
        return BackendError(f"{self.name} {self.trt.__version__} {what}: {lines}; {remedy}")


@dataclass(frozen=True, slots=True, eq=False)
class Plans:
    """Plans of one network and precision that one library can run on this GPU, with their batches."""

    library: Library
    entries: tuple[PlanEntry, ...]

    @property
    def precision(self) -> str:
        return self.entries[0].precision

    def pieces(self, batch: int) -> list[int]:
        """The batches, each of one plan, that hold `batch` images: as many of the largest as fit, then one more."""
        largest = max(entry.batch_profile[2] for entry in self.entries)
        sizes = [largest] * (batch // largest)
        rest = batch % largest
        return [*sizes, min(_padded(entry, rest) for entry in self._holding(rest))] if rest else sizes

    def entry_for(self, batch: int) -> PlanEntry:
        """The plan made for the fewest batches among those that run this one."""
        return min(
            (entry for entry in self._holding(batch) if entry.batch_profile[0] <= batch),
            key=lambda entry: entry.batch_profile[2] - entry.batch_profile[0],
        )

    def _holding(self, batch: int) -> list[PlanEntry]:
        return [entry for entry in self.entries if batch <= entry.batch_profile[2]]


def _padded(entry: PlanEntry, batch: int) -> int:
    """Few different batches, because each needs an execution context: powers of two to 8, then multiples of 8."""
    smallest, _, largest = entry.batch_profile
    if batch <= smallest:
        return smallest
    step = 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8
    return min(step, largest)


def find_plans(
    bundle: Bundle,
    network: str,
    precision: str | None,
    load: Callable[[str], Library | None] | None = None,
    capability: str | None = None,
) -> Plans:
    """The plans of "unet" or "classifier" for this machine; raises BackendError that names the remedy.

    precision: None takes fp16 where there is such a plan. load, capability: of this machine unless given.
    """
    made = bundle.manifest.networks.named().get(network)
    entries = () if made is None else made.plans
    if not entries:
        raise BackendError(f"{bundle.path} holds no TensorRT plan of its {network}; build it with: {REBUILD}")
    here = capability or gpu_capability()
    load = load or load_library
    known = {name: load(name) for name in dict.fromkeys(entry.library for entry in entries)}
    reasons: list[str] = []
    # Data-centre plans first: they were timed on the GPU that they are for.
    for name in sorted(known, key=lambda name: name != DATACENTRE):
        library = known[name]
        if library is None:
            line = PIP_LINES.get(name, f"pip install {name}")
            reasons.append(f"the plans of {name} need that package, which is not installed; {line}")
            continue
        fitting = _fitting([entry for entry in entries if entry.library == name], library, here, precision, reasons)
        if fitting:
            return Plans(library, fitting)
    raise BackendError(f"no TensorRT plan of {bundle.path} fits this machine: " + "; ".join(dict.fromkeys(reasons)))


def _fitting(
    entries: Sequence[PlanEntry], library: Library, here: str, precision: str | None, reasons: list[str]
) -> tuple[PlanEntry, ...]:
    """The entries for this GPU, library version and precision; adds to the reasons why the others are not."""
    version = str(library.trt.__version__)
    usable = []
    for entry in entries:
        if not any(runs_on(target, here) for target in entry.targets):
            reasons.append(
                f"{entry.file} was built for {', '.join(entry.targets)} and this GPU is {here}; build it with: "
                f"{REBUILD} --target {here}"
            )
        elif entry.library_version != version:
            reasons.append(
                f"{entry.file} was built by {entry.library} {entry.library_version} and {version} is installed; build "
                f"it again with: {REBUILD}"
            )
        else:
            usable.append(entry)
    offered = {entry.precision for entry in usable}
    chosen = precision or next((name for name in PREFERRED if name in offered), None)
    fitting = tuple(entry for entry in usable if entry.precision == chosen)
    if usable and not fitting:
        reasons.append(
            f"its plans are {', '.join(sorted(offered))}; build others with: {REBUILD} --precision {precision}"
        )
    return fitting


def runs_on(target: str, here: str) -> bool:
    """Whether a GPU such as "sm89" runs what was built for a target: itself, or "sm80+" for all from 8.0 on."""
    if target.endswith("+"):
        return int(here.removeprefix("sm")) >= int(target[:-1].removeprefix("sm"))
    return here == target


def gpu_capability() -> str:
    """ "sm89" for the GPU in this machine; raises BackendError where there is none."""
    if not torch.cuda.is_available():
        raise BackendError(no_gpu("the trt backend"))
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


def load_library(name: str) -> Library | None:
    """DATACENTRE or RTX, to build and to run plans; None for another, and where it is not installed.

    Not before its first use: a process that registers plugins of `tensorrt` must never load `tensorrt_rtx`.
    """
    # A wheel can be installed without the libraries that it loads; that is an OSError.
    try:
        if name == RTX:
            import tensorrt_rtx as trt
        elif name == DATACENTRE:
            import tensorrt as trt
        else:
            return None
    except (ImportError, OSError):
        return None
    return Library(name, trt, process_log(trt))


def cache_folder() -> Path:
    """Where compiled kernels are kept between runs: XDG_CACHE_HOME, or ~/.cache."""
    return user_cache_folder("runtime")
