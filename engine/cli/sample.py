"""python -m engine sample: images from a bundle to files."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from engine.checkpoints.facts import facts_from_items
from engine.checkpoints.load import load_checkpoint
from engine.cli.sample_shards import is_bulk, sample_in_bulk
from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from engine.errors import RequestError
from engine.files import atomic_path, make_folder
from engine.images import Bytes, check_png_channels, grid, save_images, save_npz, save_png, to_uint8
from engine.networks.classifier import AutogradGuide
from engine.sampling.options import Labels, SamplingOptions
from engine.sampling.requests import Request, drawable_labels, images_at_a_time
from engine.sampling.sampler import Sampler

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Results:
    """Finished images by index, and what the run took."""

    images: dict[int, Bytes] = field(default_factory=dict)
    seconds: float = 0.0


def sample(args: argparse.Namespace) -> None:
    """Make the images, write each PNG as it finishes, then the table, the npz and the grid."""
    if args.out is None and args.grid is None:
        raise RequestError("nothing would be kept; give --out DIR, --grid FILE or both")
    in_shards = is_bulk(args)
    sampler = Sampler.open(args.bundle, args.backend, args.precision, args.threads)
    if args.grid is not None or (args.format or ("npz" if in_shards else "png")) == "png":
        check_png_channels(sampler.config.in_channels)
    options = _options(args, _guidance(args, sampler))
    if in_shards:
        sample_in_bulk(args, sampler, options, _labels_in_turn(args, sampler, options))
        return
    options = dataclasses.replace(options, labels=_labels(args, sampler, options))
    requests = sampler.requests(args.n, options)
    if args.grid is not None:
        _columns(args, sampler, options)
        if args.enlarge < 1:
            raise RequestError(f"--enlarge is {args.enlarge}; expected 1 or more")
        make_folder(args.grid.parent)
    if args.out is not None:
        make_folder(args.out)
    results = _Results()
    with _written_on_interrupt(args, requests, results):
        _run(args, sampler, requests, options, results)
    if args.grid is not None:
        whole = np.concatenate([results.images[i] for i in range(args.n)])
        save_png(args.grid, grid(whole, _columns(args, sampler, options), args.enlarge))
    _report(args, sampler, requests, results)


def _run(
    args: argparse.Namespace,
    sampler: Sampler,
    requests: list[Request],
    options: SamplingOptions,
    results: _Results,
) -> None:
    from tqdm import tqdm

    start = time.perf_counter()
    total = sum(len(request.table) for request in requests)
    with tqdm(total=total, unit="step", desc="sampling", disable=None) as bar:
        for step in sampler.run(requests, options.guide, batch_size=options.batch_size):
            bar.update()
            if step.is_last:
                number = step.request.index
                image = to_uint8(step.x_prev[None].clamp(-1, 1))
                if args.out is not None and args.format != "npz":
                    save_images(args.out, image, [number])
                # Only now: what is in the results is listed in samples.csv.
                results.images[number] = image
    results.seconds = time.perf_counter() - start


@contextmanager
def _written_on_interrupt(args: argparse.Namespace, requests: list[Request], results: _Results) -> Iterator[None]:
    """Whatever ends the run, the images finished until then are on disk with their table."""
    try:
        yield
    finally:
        done = sorted(results.images)
        if args.out is not None and done:
            if args.format == "npz":
                labels = [requests[i].label or 0 for i in done]
                save_npz(args.out / "samples.npz", np.concatenate([results.images[i] for i in done]), labels)
            _write_table(args, [requests[i] for i in done])


def _write_table(args: argparse.Namespace, requests: list[Request]) -> None:
    with atomic_path(args.out / "samples.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["index", "seed", "label"])
        writer.writerows([r.index, r.seed, r.label or 0] for r in requests)


def _guidance(args: argparse.Namespace, sampler: Sampler) -> ClassifierGuidance | None:
    if args.classifier is None:
        return None if args.classifier_scale is None else sampler.classifier_guidance(args.classifier_scale)
    facts = {"image_size": sampler.config.image_size} | facts_from_items(args.classifier_fact, "--classifier-fact")
    classifier = load_checkpoint(args.classifier, **facts)
    for assumption in classifier.assumptions:
        logger.info("classifier: assumed %s", assumption)
    return ClassifierGuidance(
        AutogradGuide(classifier.classifier()), 1.0 if args.classifier_scale is None else args.classifier_scale
    )


def _options(args: argparse.Namespace, guidance: ClassifierGuidance | None) -> SamplingOptions:
    """The options on the command line; --per-class is no part of them yet."""
    return SamplingOptions(
        steps=args.steps,
        sampler=args.sampler,
        eta=args.eta,
        variance=args.variance,
        labels=args.label,
        seed=args.seed,
        guidance=guidance,
        guidance_scale=ClassifierFreeGuidance(
            args.guidance_scale,
            args.guidance_rescale,
            interval=tuple(args.guidance_interval),
            plus_plus=args.guidance_plus_plus,
        ),
        batch_size=args.batch_size,
    )


def _classes(sampler: Sampler, options: SamplingOptions) -> list[int]:
    guidance = options.guidance
    return drawable_labels(sampler.config, None if guidance is None else guidance.guide.config)


def _labels(args: argparse.Namespace, sampler: Sampler, options: SamplingOptions) -> Labels | None:
    if not args.per_class:
        return options.labels
    classes = _classes(sampler, options)
    if not classes or args.n % len(classes):
        raise RequestError(f"--per-class needs a multiple of the {len(classes)} classes, got -n {args.n}")
    return [classes[i * len(classes) // args.n] for i in range(args.n)]


def _labels_in_turn(args: argparse.Namespace, sampler: Sampler, options: SamplingOptions) -> tuple[int, ...] | None:
    """--per-class as the labels_in_turn of a BulkJob: in shards the classes take turns."""
    if not args.per_class:
        return None
    _labels(args, sampler, options)
    return tuple(_classes(sampler, options))


def _columns(args: argparse.Namespace, sampler: Sampler, options: SamplingOptions) -> int:
    if args.columns is not None:
        if args.columns < 1:
            raise RequestError(f"--columns is {args.columns}; expected 1 or more")
        return int(args.columns)
    if args.per_class:
        return int(args.n) // max(1, len(_classes(sampler, options)) or args.n)
    return math.ceil(math.sqrt(args.n))


def _report(args: argparse.Namespace, sampler: Sampler, requests: list[Request], results: _Results) -> None:
    steps = len(requests[0].table)
    # Slots are refilled as they empty, and all requests here have the same length: rounds of full batches.
    together = images_at_a_time(requests, args.batch_size)
    calls = math.ceil(args.n / together) * steps
    batch = min(args.n, together)
    summary = {
        "images": len(results.images),
        "steps": steps,
        "sampler": args.sampler,
        "backend": sampler.backend.name,
        "precision": sampler.backend.precision,
        "batch_size": batch,
        "seconds": results.seconds,
        "ms_per_step": 1000 * results.seconds / calls,
        "images_per_second": len(results.images) / results.seconds,
        "out": str(args.out) if args.out is not None else None,
        "grid": str(args.grid) if args.grid is not None else None,
    }
    if args.json:
        print(json.dumps(summary))
        return
    print(
        f"{summary['images']} images in {results.seconds:.1f} s ({args.sampler}, {steps} steps): "
        f"{summary['ms_per_step']:.2f} ms per step of batch {batch}, {summary['images_per_second']:.2f} images/s, "
        f"backend {summary['backend']} {summary['precision']}"
    )
    for place in (args.out, args.grid):
        if place is not None:
            print(f"written: {place}")
