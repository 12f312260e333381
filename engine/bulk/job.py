"""Many images in shards: stopped at any moment and resumed without a lost, doubled or changed image.

A shard's images, their order and the batches in which they are made follow from the plan and the shard's number
alone, and a shard appears under its name when it is whole. run.json beside the shards says how they were made; a
resume with anything else is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.backends.registry import libraries
from engine.bulk.shards import FORMATS, Shard, merge_shards, read_shard, shard_name, write_shard
from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from engine.diffusion.prediction import Variance
from engine.diffusion.solvers import StepTable
from engine.errors import OutputError, RequestError
from engine.files import atomic_path, make_folder
from engine.images import Bytes, to_uint8
from engine.sampling.sampler import Request, Sampler

RUN_NAME = "run.json"
_SHARD_NAME = re.compile(r"shard-\d+(\.npz)?")
_LEFTOVER = re.compile(r"\.tmp-[0-9a-f]{32}(\..*)?")


@dataclass(frozen=True, slots=True)
class BulkPlan:
    """What to make; the same plan on the same backend and machine gives the same bytes.

    n: images; image i has seed + i. steps, sampler, eta, variance: as in Sampler.sample. labels: None draws a class
    from each seed, a number is the class of all, of a tuple image i takes entry i mod its length, so that the tuple
    of all classes balances them in any row of shards. shard_size: images a shard. batch_size: images in progress at a
    time. file_format: "npz" or "png". threads: what the backend was opened with. classifier_sha256: of the guiding
    classifier's file. cfg: classifier-free guidance. Raises RequestError for impossible values.
    """

    n: int
    steps: int | str = 50
    sampler: str = "ddim"
    eta: float = 0.0
    variance: Variance | None = None
    labels: int | tuple[int, ...] | None = None
    seed: int = 0
    shard_size: int = 256
    batch_size: int = 16
    file_format: str = "npz"
    threads: int | None = None
    classifier_sha256: str | None = None
    cfg: ClassifierFreeGuidance = ClassifierFreeGuidance()

    def __post_init__(self) -> None:
        for name in ("n", "shard_size", "batch_size"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; expected 1 or more")
        if not 0 <= self.seed <= 2**64 - self.n:
            raise RequestError(f"seed is {self.seed} for {self.n} images; expected 0 <= seed and seed + n <= 2**64")
        if self.file_format not in FORMATS:
            raise RequestError(f"unknown shard format {self.file_format!r}; known: {', '.join(FORMATS)}")
        if self.labels == ():
            raise RequestError("labels is empty; give a class, the classes to take in turn, or None")

    @property
    def num_shards(self) -> int:
        """How many shards; only the last may be shorter."""
        return -(-self.n // self.shard_size)

    def images_of(self, shard: int) -> range:
        """The numbers of a shard's images."""
        return range(shard * self.shard_size, min(self.n, (shard + 1) * self.shard_size))

    def labels_of(self, images: range) -> int | list[int] | None:
        """The labels of these images as Sampler.requests takes them."""
        if isinstance(self.labels, tuple):
            return [self.labels[i % len(self.labels)] for i in images]
        return self.labels


@dataclass(frozen=True, slots=True)
class BulkResult:
    """made, kept: images of this call and those that whole shards held before. remade: damaged shards replaced."""

    made: int
    kept: int
    remade: tuple[str, ...] = ()


def generate(
    sampler: Sampler,
    plan: BulkPlan,
    out: Path,
    guidance: ClassifierGuidance | None = None,
    progress: Callable[[int], None] | None = None,
) -> BulkResult:
    """Make every shard of the plan that out does not hold whole; run again after an interruption, it resumes.

    Shards that are there are read and checked first. progress is called with the number of images that are
    done: once after that check, then after each new image. Whatever ends the call, whole shards stay. Raises
    RequestError for a plan that contradicts the checkpoint or what out was begun with (naming the differences),
    OutputError if out cannot be written or another process is writing there.
    """
    job = _Job(sampler, plan, out, guidance)
    make_folder(out)
    with _locked(out):
        missing, remade = job.inspect()
        kept = done = plan.n - sum(len(plan.images_of(number)) for number in missing)
        if progress is not None:
            progress(done)
        for number in missing:
            requests = job.requests(number)
            images = np.empty(job.shard(number, requests).images_shape, dtype=np.uint8)
            for index, image in job.images(requests):
                images[index] = image
                done += 1
                if progress is not None:
                    progress(done)
            # Only now: a plan that fails in its first shard leaves nothing that a better one would differ from.
            job.describe()
            write_shard(out, job.shard(number, requests), images, plan.file_format)
    return BulkResult(done - kept, kept, remade)


def merge(sampler: Sampler, plan: BulkPlan, out: Path, guidance: ClassifierGuidance | None = None) -> Path:
    """Join the shards of a finished run to out/samples.npz, and return that path; see engine.bulk.shards.merge_shards.

    Raises what generate raises, and RequestError for a shard that is missing or damaged.
    """
    job = _Job(sampler, plan, out, guidance)
    with _locked(out):
        job.check_description()
        return merge_shards(out, job.shards(), plan.file_format)


class _Job:
    """One plan on one sampler and folder."""

    def __init__(self, sampler: Sampler, plan: BulkPlan, out: Path, guidance: ClassifierGuidance | None) -> None:
        if (guidance is None) != (plan.classifier_sha256 is None):
            raise RequestError(
                "guidance and the plan's classifier_sha256 belong together, because a resume must know the "
                "classifier; give both or neither"
            )
        self._sampler, self._plan, self._out, self._guidance = sampler, plan, out, guidance
        self._table = sampler.table(plan.steps, plan.sampler, plan.eta, plan.variance, plan.cfg.plus_plus)
        config = sampler.config
        self._shape = (*config.image_size, config.in_channels)
        self._is_labelled = config.num_classes is not None or guidance is not None
        self._description = _describe(sampler, plan, self._table, guidance)
        self._is_described = False

    def requests(self, number: int) -> list[Request]:
        """The requests of a shard, numbered from 0."""
        images = self._plan.images_of(number)
        labels, seed = self._plan.labels_of(images), self._plan.seed + images.start
        return self._sampler.requests(
            len(images), self._table, labels, seed, guidance=self._guidance, cfg_scale=self._plan.cfg
        )

    def shard(self, number: int, requests: list[Request]) -> Shard:
        start = self._plan.images_of(number).start
        labels = tuple(r.classifier_label for r in requests) if self._is_labelled else None
        return Shard(number, start, tuple(r.seed for r in requests), labels, self._shape)

    def shards(self) -> Iterator[Shard]:
        """Every shard of the plan."""
        return (self.shard(number, self.requests(number)) for number in range(self._plan.num_shards))

    def images(self, requests: list[Request]) -> Iterator[tuple[int, Bytes]]:
        """Finished images of a shard with their place in it, uint8 [H, W, C]; the slots start empty for each shard."""
        for step in self._sampler.run(requests, self._guidance, batch_size=self._plan.batch_size):
            if step.is_last:
                yield step.request.index, to_uint8(step.x_prev[None])[0]

    def inspect(self) -> tuple[list[int], tuple[str, ...]]:
        """The numbers of the shards to make, and the names of damaged ones; removes what killed runs left."""
        self.check_description()
        missing, damaged = [], []
        for shard in self.shards():
            path = shard.path(self._out, self._plan.file_format)
            if read_shard(self._out, shard, self._plan.file_format) is None:
                missing.append(shard.number)
                damaged += [path.name] if path.exists() else []
        _remove_leftovers(self._out)
        return missing, tuple(damaged)

    def check_description(self) -> None:
        """Raises RequestError where the folder holds another run or shards of nobody knows what."""
        path, count = self._out / RUN_NAME, self._plan.num_shards
        own = {shard_name(i, self._plan.file_format) for i in range(count)}
        found = {entry.name for entry in self._out.iterdir() if _SHARD_NAME.fullmatch(entry.name)}
        if path.exists():
            _compare(path, self._description)
            self._is_described = True
        elif found:
            raise RequestError(
                f"{self._out} holds {min(found)} but no {RUN_NAME}, so that nobody knows how it was made; choose "
                "another folder"
            )
        if foreign := sorted(found - own):
            raise RequestError(
                f"{self._out} holds {foreign[0]}, which is no shard of this run ({count} shards of "
                f"{self._plan.shard_size} images as {self._plan.file_format}); move it away"
            )

    def describe(self) -> None:
        """Write run.json before the first shard."""
        if self._is_described:
            return
        with atomic_path(self._out / RUN_NAME) as temp, temp.open("w", encoding="utf-8") as file:
            json.dump(self._description, file, indent=1)
            file.write("\n")
            # A shard that a power failure cuts is found and made again; without this file none could be resumed.
            file.flush()
            os.fsync(file.fileno())
        self._is_described = True


def _describe(
    sampler: Sampler, plan: BulkPlan, table: StepTable, guidance: ClassifierGuidance | None
) -> dict[str, Any]:
    """Everything that the bytes of the shards hang on, as JSON."""
    manifest = sampler.backend.manifest
    return {
        "format_version": 1,
        "bundle": {
            "manifest_sha256": _digest(manifest.to_dict()),
            "checkpoint_sha256": manifest.checkpoint_sha256,
        },
        "table": {
            "sampler": plan.sampler,
            "steps": str(plan.steps),
            "eta": plan.eta,
            "variance": None if plan.variance is None else plan.variance.value,
            "rows": len(table),
            "sha256": hashlib.sha256(table.to_array().astype("<f8").tobytes()).hexdigest(),
        },
        "images": plan.n,
        "seeds": {"first": plan.seed, "last": plan.seed + plan.n - 1},
        "labels": _labels_rule(plan, sampler, guidance),
        "guidance": _guidance(plan, guidance),
        # As text, because an interval may be infinite, which JSON has no number for.
        "classifier_free_guidance": {k: str(v) for k, v in dataclasses.asdict(plan.cfg).items()},
        "shard_size": plan.shard_size,
        "batch_size": plan.batch_size,
        "format": plan.file_format,
        "machine": _machine(sampler, plan),
        "versions": _versions(sampler.backend.name),
    }


def _labels_rule(plan: BulkPlan, sampler: Sampler, guidance: ClassifierGuidance | None) -> Any:
    if isinstance(plan.labels, tuple):
        return {"in_turn": list(plan.labels)}
    if plan.labels is not None:
        return {"all": plan.labels}
    return "drawn" if sampler.config.num_classes is not None or guidance is not None else None


def _guidance(plan: BulkPlan, guidance: ClassifierGuidance | None) -> dict[str, Any] | None:
    if guidance is None:
        return None
    return {
        "classifier_sha256": plan.classifier_sha256,
        # The same file read with other facts is another classifier.
        "config_sha256": _digest(guidance.guide.config.to_dict()),
        "scale": guidance.scale,
        "torch_threads": torch.get_num_threads(),
    }


def _digest(value: Any) -> str:
    """The sha256 of a JSON value, as a manifest's own."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _machine(sampler: Sampler, plan: BulkPlan) -> dict[str, Any]:
    """What decides the rounding of one backend: another processor or thread count adds in another order."""
    backend = sampler.backend
    on_gpu = backend.device.type == "cuda"
    return {
        "backend": backend.name,
        "precision": backend.precision,
        "device": torch.cuda.get_device_name(backend.device) if on_gpu else _processor(),
        "threads": plan.threads if plan.threads is not None else torch.get_num_threads(),
    }


def _processor() -> str:
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1]
    return platform.processor() or platform.machine()


def _versions(backend: str) -> dict[str, str]:
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    for name in ("pillow", "unet-rt", *libraries(backend)):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def _compare(path: Path, now: dict[str, Any]) -> None:
    """Raises RequestError naming every entry of run.json that differs from this run's."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path} is damaged ({error}), so that nobody knows how its shards were made; choose another folder"
        ) from error
    # Through JSON, as the file went: tuples become lists.
    differences = list(_differences("", before, json.loads(json.dumps(now))))
    if differences:
        raise RequestError(
            f"{path.parent} was begun with other settings: {'; '.join(differences)}. Resume with the settings of "
            f"{path.name}, or choose another folder"
        )


def _differences(name: str, before: Any, now: Any) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            yield from _differences(f"{name}.{key}" if name else key, before.get(key), now.get(key))
    elif before != now:
        yield f"{name} was {_short(before)} and is {_short(now)}"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process at a time works in a folder; the lock ends with its process, however that ends."""
    try:
        import fcntl
    except ImportError:
        # Not a POSIX system: two runs in one folder stay the caller's matter.
        yield
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot open {folder}: {error.strerror}; choose the folder of a run") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise OutputError(
            f"another process is writing to {folder}; wait until it ends, or choose another one"
        ) from error
    try:
        yield
    finally:
        os.close(handle)


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed runs were writing; another living one cannot be at work under the lock."""
    for entry in folder.iterdir():
        if _LEFTOVER.fullmatch(entry.name):
            with suppress(OSError):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
