"""Many images in shards: stopped at any moment and resumed without a lost, doubled or changed image.

A shard's images, their order and the batches in which they are made follow from the job and the shard's number
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
from engine.bundle.bundle_folder import manifest_sha256
from engine.diffusion.prediction import Variance
from engine.diffusion.solvers import StepTable
from engine.errors import OutputError, RequestError
from engine.files import atomic_path, make_folder
from engine.images import Bytes, to_uint8
from engine.json_form import encode
from engine.sampling.options import SamplingOptions, refuse
from engine.sampling.requests import Request
from engine.sampling.sampler import Sampler

RUN_NAME = "run.json"
_SHARD_NAME = re.compile(r"shard-\d+(\.npz)?")
_LEFTOVER = re.compile(r"\.tmp-[0-9a-f]{32}(\..*)?")


@dataclass(frozen=True, slots=True, eq=False)
class BulkJob:
    """What to make; the same job on the same backend and machine gives the same bytes.

    n: images. options: how they are made; image i has seed + i, and labels is None, which draws a class from each
    seed, or the class of all. labels_in_turn: image i takes entry i mod their number instead, so that all classes
    balance in any row of shards. shard_size: images a shard. file_format: "npz" or "png". threads: what the backend
    was opened with. classifier_sha256: of the guiding classifier's file. Raises RequestError for impossible values.
    """

    n: int
    options: SamplingOptions = SamplingOptions()
    labels_in_turn: tuple[int, ...] | None = None
    shard_size: int = 256
    file_format: str = "npz"
    threads: int | None = None
    classifier_sha256: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "shard_size"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; expected 1 or more")
        seed = self.options.seed
        if not 0 <= seed <= 2**64 - self.n:
            raise RequestError(f"seed is {seed} for {self.n} images; expected 0 <= seed and seed + n <= 2**64")
        if self.file_format not in FORMATS:
            raise RequestError(f"unknown shard format {self.file_format!r}; known: {', '.join(FORMATS)}")
        if self.labels_in_turn == ():
            raise RequestError("labels_in_turn is empty; give the classes to take in turn, or None")
        self._check_options()

    def _check_options(self) -> None:
        options = self.options
        refuse(
            options, ("seeds", "image", "noise"), "images in shards have seeds in a row; leave seeds, image, noise out"
        )
        if not isinstance(options.steps, int | str):
            raise RequestError("images in shards need steps that run.json can hold: a number or a respacing string")
        if options.labels is not None and (self.labels_in_turn is not None or not isinstance(options.labels, int)):
            raise RequestError(
                "labels of images in shards are one class for all, or labels_in_turn; give one of them as such"
            )
        if (options.guidance is None) != (self.classifier_sha256 is None):
            raise RequestError(
                "guidance and the job's classifier_sha256 belong together, because a resume must know the "
                "classifier; give both or neither"
            )

    @property
    def num_shards(self) -> int:
        """How many shards; only the last may be shorter."""
        return -(-self.n // self.shard_size)

    def images_of(self, shard: int) -> range:
        """The numbers of a shard's images."""
        return range(shard * self.shard_size, min(self.n, (shard + 1) * self.shard_size))

    def options_of(self, images: range) -> SamplingOptions:
        """The options of these images alone: their seeds and labels."""
        labels, turn = self.options.labels, self.labels_in_turn
        if turn is not None:
            labels = [turn[i % len(turn)] for i in images]
        return dataclasses.replace(self.options, seed=self.options.seed + images.start, labels=labels)


@dataclass(frozen=True, slots=True)
class BulkResult:
    """made, kept: images of this call and those that whole shards held before. remade: damaged shards replaced."""

    made: int
    kept: int
    remade: tuple[str, ...] = ()


def generate(sampler: Sampler, job: BulkJob, out: Path, progress: Callable[[int], None] | None = None) -> BulkResult:
    """Make every shard of the job that out does not hold whole; run again after an interruption, it resumes.

    Shards that are there are read and checked first. progress is called with the number of images that are
    done: once after that check, then after each new image. Whatever ends the call, whole shards stay. Raises
    RequestError for a job that contradicts the checkpoint or what out was begun with (naming the differences),
    OutputError if out cannot be written or another process is writing there.
    """
    run = _Run(sampler, job, out)
    make_folder(out)
    with _locked(out):
        missing, remade = run.inspect()
        kept = done = job.n - sum(len(job.images_of(number)) for number in missing)
        if progress is not None:
            progress(done)
        for number in missing:
            requests = run.requests(number)
            images = np.empty(run.shard(number, requests).images_shape, dtype=np.uint8)
            for index, image in run.images(requests):
                images[index] = image
                done += 1
                if progress is not None:
                    progress(done)
            # Only now: a job that fails in its first shard leaves nothing that a better one would differ from.
            run.describe()
            write_shard(out, run.shard(number, requests), images, job.file_format)
    return BulkResult(done - kept, kept, remade)


def merge(sampler: Sampler, job: BulkJob, out: Path) -> Path:
    """Join the shards of a finished run to out/samples.npz, and return that path; see engine.bulk.shards.merge_shards.

    Raises what generate raises, and RequestError for a shard that is missing or damaged.
    """
    run = _Run(sampler, job, out)
    with _locked(out):
        run.check_description()
        return merge_shards(out, run.shards(), job.file_format)


class _Run:
    """One job on one sampler and folder."""

    def __init__(self, sampler: Sampler, job: BulkJob, out: Path) -> None:
        self._sampler, self._job, self._out = sampler, job, out
        self._table = sampler.table(job.options)
        config = sampler.config
        self._shape = (*config.image_size, config.in_channels)
        self._is_labelled = config.num_classes is not None or job.options.guidance is not None
        self._description = _describe(sampler, job, self._table)
        self._is_described = False

    def requests(self, number: int) -> list[Request]:
        """The requests of a shard, numbered from 0."""
        images = self._job.images_of(number)
        return self._sampler.requests(len(images), self._job.options_of(images), table=self._table)

    def shard(self, number: int, requests: list[Request]) -> Shard:
        start = self._job.images_of(number).start
        labels = tuple(r.label or 0 for r in requests) if self._is_labelled else None
        return Shard(number, start, tuple(r.seed for r in requests), labels, self._shape)

    def shards(self) -> Iterator[Shard]:
        """Every shard of the job."""
        return (self.shard(number, self.requests(number)) for number in range(self._job.num_shards))

    def images(self, requests: list[Request]) -> Iterator[tuple[int, Bytes]]:
        """Finished images of a shard with their place in it, uint8 [H, W, C]; the slots start empty for each shard."""
        options = self._job.options
        for step in self._sampler.run(requests, options.guide, batch_size=options.batch_size):
            if step.is_last:
                yield step.request.index, to_uint8(step.x_prev[None])[0]

    def inspect(self) -> tuple[list[int], tuple[str, ...]]:
        """The numbers of the shards to make, and the names of damaged ones; removes what killed runs left."""
        self.check_description()
        missing, damaged = [], []
        for shard in self.shards():
            path = shard.path(self._out, self._job.file_format)
            if read_shard(self._out, shard, self._job.file_format) is None:
                missing.append(shard.number)
                damaged += [path.name] if path.exists() else []
        _remove_leftovers(self._out)
        return missing, tuple(damaged)

    def check_description(self) -> None:
        """Raises RequestError where the folder holds another run or shards of nobody knows what."""
        path, count = self._out / RUN_NAME, self._job.num_shards
        own = {shard_name(i, self._job.file_format) for i in range(count)}
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
                f"{self._job.shard_size} images as {self._job.file_format}); move it away"
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


def _describe(sampler: Sampler, job: BulkJob, table: StepTable) -> dict[str, Any]:
    """Everything that the bytes of the shards hang on, as JSON."""
    manifest, options = sampler.backend.manifest, job.options
    return {
        "format_version": 1,
        "bundle": {
            "manifest_sha256": manifest_sha256(manifest),
            "checkpoint_sha256": manifest.checkpoint_sha256,
        },
        "table": {
            "sampler": options.sampler,
            "steps": str(options.steps),
            "eta": options.eta,
            "variance": None if options.variance is None else Variance(options.variance).value,
            "rows": len(table),
            "sha256": hashlib.sha256(table.to_array().astype("<f8").tobytes()).hexdigest(),
        },
        "images": job.n,
        "seeds": {"first": options.seed, "last": options.seed + job.n - 1},
        "labels": _labels_rule(job, sampler),
        "guidance": _guidance(job),
        # As text, because an interval may be infinite, which JSON has no number for.
        "classifier_free_guidance": {k: str(v) for k, v in dataclasses.asdict(options.free_guidance).items()},
        "shard_size": job.shard_size,
        "batch_size": options.batch_size,
        "format": job.file_format,
        "machine": _machine(sampler, job),
        "versions": _versions(sampler.backend.name),
    }


def _labels_rule(job: BulkJob, sampler: Sampler) -> Any:
    if job.labels_in_turn is not None:
        return {"in_turn": list(job.labels_in_turn)}
    if job.options.labels is not None:
        return {"all": job.options.labels}
    return "drawn" if sampler.config.num_classes is not None or job.options.guidance is not None else None


def _guidance(job: BulkJob) -> dict[str, Any] | None:
    guidance = job.options.guidance
    if guidance is None:
        return None
    return {
        "classifier_sha256": job.classifier_sha256,
        # The same file read with other facts is another classifier.
        "config_sha256": _digest(encode(guidance.guide.config)),
        "scale": guidance.scale,
        "torch_threads": torch.get_num_threads(),
    }


def _digest(value: Any) -> str:
    """The sha256 of a JSON value, as a manifest's own."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _machine(sampler: Sampler, job: BulkJob) -> dict[str, Any]:
    """What decides the rounding of one backend: another processor or thread count adds in another order."""
    backend = sampler.backend
    on_gpu = backend.device.type == "cuda"
    return {
        "backend": backend.name,
        "precision": backend.precision,
        "device": torch.cuda.get_device_name(backend.device) if on_gpu else _processor(),
        "threads": job.threads if job.threads is not None else torch.get_num_threads(),
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
