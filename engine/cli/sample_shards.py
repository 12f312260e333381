"""python -m engine sample with many images: shards that a resume completes, and samples.npz for an evaluator."""

from __future__ import annotations

import argparse
import json
import logging
import time
from typing import Any

from engine.bulk.job import BulkJob, BulkResult, generate, merge
from engine.bundle.file_names import CLASSIFIER, onnx_name
from engine.errors import RequestError
from engine.files import file_sha256
from engine.sampling.options import SamplingOptions
from engine.sampling.sampler import Sampler

logger = logging.getLogger(__name__)

LARGEST_SINGLE_RUN = 1000
"""More images than this in a folder are made in shards."""
DEFAULT_SHARD_SIZE = 256


def is_bulk(args: argparse.Namespace) -> bool:
    """Whether a command line asks for shards; raises RequestError where its options contradict that."""
    if args.shard_size is None and (args.n <= LARGEST_SINGLE_RUN or args.out is None):
        if args.merge:
            raise RequestError(
                "--merge joins shards, and this run has none; give --shard-size and --out, or --format npz for one "
                "samples.npz"
            )
        return False
    if args.out is None:
        raise RequestError("shards need a folder; give --out DIR, or leave --shard-size out")
    if args.grid is not None:
        raise RequestError(
            f"--grid shows one run without shards; leave it out, or give at most {LARGEST_SINGLE_RUN} images and no "
            "--shard-size"
        )
    return True


def sample_in_bulk(
    args: argparse.Namespace, sampler: Sampler, options: SamplingOptions, labels_in_turn: tuple[int, ...] | None
) -> None:
    """Make the shards that --out does not hold yet, join them where asked, and say what was done."""
    job = BulkJob(
        args.n,
        options,
        labels_in_turn,
        shard_size=DEFAULT_SHARD_SIZE if args.shard_size is None else args.shard_size,
        file_format=args.format or "npz",
        threads=args.threads,
        classifier_sha256=None if options.guidance is None else _classifier_sha256(args, sampler),
    )
    progress = _Progress(job.n)
    try:
        result = generate(sampler, job, args.out, progress)
    finally:
        progress.close()
    for name in result.remade:
        logger.warning("%s was damaged and was made again", name)
    merged = merge(sampler, job, args.out) if args.merge else None
    _report(args, sampler, job, result, progress.seconds, None if merged is None else str(merged))


def _classifier_sha256(args: argparse.Namespace, sampler: Sampler) -> str:
    """Of the classifier's file, or of the bundle's own graph."""
    if args.classifier is not None:
        return file_sha256(args.classifier)
    return sampler.backend.manifest.files[onnx_name(CLASSIFIER)].sha256


class _Progress:
    """A bar with images/s of this run alone: neither the images found nor the time to check them count."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._bar: Any = None
        self._start = self.seconds = 0.0

    def __call__(self, done: int) -> None:
        from tqdm import tqdm

        if self._bar is None:
            self._start = time.perf_counter()
            self._bar = tqdm(
                total=self._total, initial=done, unit="image", desc="sampling", smoothing=0.0, disable=None
            )
        else:
            self._bar.update(done - self._done)
        self._done = done
        self.seconds = time.perf_counter() - self._start

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _report(
    args: argparse.Namespace, sampler: Sampler, job: BulkJob, result: BulkResult, seconds: float, merged: str | None
) -> None:
    summary = {
        "images": job.n,
        "made": result.made,
        "kept": result.kept,
        "shards": job.num_shards,
        "shard_size": job.shard_size,
        "sampler": job.options.sampler,
        "backend": sampler.backend.name,
        "precision": sampler.backend.precision,
        "batch_size": job.options.batch_size,
        "seconds": seconds,
        "images_per_second": result.made / seconds if result.made else None,
        "out": str(args.out),
        "merged": merged,
    }
    if args.json:
        print(json.dumps(summary))
        return
    backend, options = sampler.backend, job.options
    rate = f" in {seconds:.1f} s, {result.made / seconds:.2f} images/s" if result.made else ""
    print(
        f"{job.n} images in {job.num_shards} shards: {result.made} made{rate}, {result.kept} were there "
        f"({options.sampler}, {options.steps} steps, backend {backend.name} {backend.precision})"
    )
    print(f"written: {args.out}")
    if merged is not None:
        print(f"written: {merged}")
