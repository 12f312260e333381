"""How good the samples of each backend and precision are, beside how fast they are made.

    python -m benchmarks.quality digits.engine
    python -m benchmarks.quality model.engine --inception weights-inception-2015-12-05-6726825d.pth \\
        --reference reference.npz

Every variant makes the same images, from the same seeds, at several numbers of steps. They are judged three ways: by
PSNR beside the fp32 images; by a network, the digits' own evaluator (whose distance is called Fréchet distance, never
FID) or InceptionV3 by torch-fidelity, with weights that the user gives; and by the bits per dimension that the variant
gives real images.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.core.environment import environment
from benchmarks.core.harness import check_least, make_parser, parse_numbers, run_benchmark
from benchmarks.core.measured_network import Name, describe_bundle, open_variants, parse_names
from benchmarks.core.pictures import REAL, draw_quality
from benchmarks.core.report import Check, Missing, Report, Row
from benchmarks.quality.cells import Cell, ImageRequest, bound_row, classes_in_turn, make_cell, samples_row, save_cell
from benchmarks.quality.image_checks import cell_checks, finite_check, likelihood_check
from engine.backends.registry import variants
from engine.bundle.bundle_folder import Bundle
from engine.errors import BackendError, RequestError
from engine.sampling.sampler import Sampler
from judging.image_sets import ImageSet, in_turn, read_images
from judging.scorers import CONFIDENCE, DigitsJudge, FeatureScorer, InceptionJudge

SAMPLERS = ("ddim", "dpmpp", "plms", "ddpm")
FP32_REFERENCE: Name = ("eager", "fp32")


@dataclass(frozen=True, slots=True)
class Sizes:
    """steps: of the sampler. images: of each variant and number of steps. bound_*: of the bits per dimension."""

    steps: tuple[int, ...]
    images: int
    bound_images: int
    bound_steps: int


LONG = Sizes((10, 25, 50, 100), 500, 100, 100)
SHORT = Sizes((4, 8, 16), 60, 10, 20)

NO_INCEPTION = (
    "FID, IS, precision and recall need torch-fidelity (pip install --no-deps torch-fidelity) and its weights of "
    "InceptionV3, weights-inception-2015-12-05-6726825d.pth, as --inception FILE with --reference FILE.npz or a folder "
    "of PNG files; or pass --save-npz and give the files to guided-diffusion's evaluations/evaluator.py, for sFID too"
)


def parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    made = make_parser("quality", "Samples of every backend and precision beside real ones and beside fp32.")
    made.add_argument("--variants", type=str, help="such as ov:fp32,ort:fp32 (default: all that open)")
    made.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    made.add_argument("--steps", help=f"such as 10,25,50,100 (default {_listed(LONG)}, with --short {_listed(SHORT)})")
    made.add_argument("-n", type=int, help=f"images each (default {LONG.images}, with --short {SHORT.images})")
    made.add_argument("--batch-size", type=int, default=25, help="images in progress at a time (default 25)")
    made.add_argument("--reference", type=Path, help="real images: .npz with arr_0 or mu and sigma, or a PNG folder")
    made.add_argument("--inception", type=Path, help="weights of InceptionV3 as torch-fidelity publishes them")
    made.add_argument("--bound-images", type=int, help="real images for bits per dimension (100, with --short 10)")
    made.add_argument("--bound-steps", type=int, help="steps of that bound (100, with --short 20)")
    made.add_argument("--save-npz", action="store_true", help="also write the images, for guided-diffusion's evaluator")
    return made


def _listed(sizes: Sizes) -> str:
    return ",".join(map(str, sizes.steps))


def sizes_from(args: argparse.Namespace) -> Sizes:
    """What the options ask for; raises RequestError for numbers below their least."""
    base = SHORT if args.short else LONG
    sizes = Sizes(
        base.steps if args.steps is None else parse_numbers(args.steps, "--steps"),
        base.images if args.n is None else args.n,
        base.bound_images if args.bound_images is None else args.bound_images,
        base.bound_steps if args.bound_steps is None else args.bound_steps,
    )
    for option, value, least in (
        ("-n", sizes.images, 2),
        ("--bound-images", sizes.bound_images, 1),
        ("--bound-steps", sizes.bound_steps, 1),
        ("--batch-size", args.batch_size, 1),
    ):
        check_least(option, value, least)
    return sizes


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What images are judged by. real: images that none of it saw, of which a part gets bits per dimension.

    reads_digits: whether the images are digits and an evaluator of digits is among the scorers.
    """

    scorers: Sequence[FeatureScorer]
    real: ImageSet | None
    missing: Sequence[Missing]
    reads_digits: bool = False


def judgement(args: argparse.Namespace, bundle: Bundle, count: int) -> Judgement:
    """Scorers for this bundle and these options; raises RequestError for options that lack another."""
    digits = _shipped_digits(bundle)
    real = digits.real_digits() if digits else None
    given = read_images(args.reference) if args.reference is not None else None
    scorers = [FeatureScorer(DigitsJudge(digits.EVALUATOR), real["train"])] if digits and real else []
    if args.inception is None:
        missing = [Missing("FID", NO_INCEPTION)]
    else:
        reference = given or (real["train"] if real else None)
        if reference is None:
            raise RequestError("--inception needs real images too; add --reference FILE.npz or a folder of PNG files")
        scorers.append(FeatureScorer(InceptionJudge(args.inception), reference))
        missing = []
    if real is not None:
        return Judgement(scorers, in_turn(real["held_out"], count), missing, reads_digits=True)
    return Judgement(scorers, given if given is not None and given.images is not None else None, missing)


def _shipped_digits(bundle: Bundle) -> Any:
    """judging.digits for a bundle of the shipped digits model, for whose images there is an evaluator; else None.

    Where the repository is not there, no bundle is one of it.
    """
    try:
        from judging import digits
    except ImportError:
        return None
    return digits if digits.is_shipped(bundle.manifest.checkpoint_sha256) else None


def work(args: argparse.Namespace, command: str) -> Report:
    """The report; everything that can be refused is refused before the first image."""
    sizes = sizes_from(args)
    bundle = Bundle.open(args.bundle)
    _check_network(args, bundle)
    judged = judgement(args, bundle, max(sizes.images, sizes.bound_images))
    rows = [_row_of(REAL, _first(judged.real, sizes.images), judged)] if judged.reads_digits and judged.real else []
    with _opened(args, bundle) as (samplers, missing):
        request = ImageRequest(args.sampler, sizes.images, args.batch_size)
        run = _Run(request, judged.scorers, samplers, args.out if args.save_npz else None)
        cells, checks = run.cells(sizes.steps)
        bounds, no_bounds = run.bounds(judged.real, sizes)
    return Report(
        benchmark="quality",
        command=command,
        environment=environment(args.threads),
        subject=describe_bundle(bundle),
        settings=_settings(sizes, request, judged, run.reference),
        rows=[*rows, *cells, *bounds],
        checks=[*checks, *map(likelihood_check, bounds)],
        missing=[*missing, *judged.missing, *no_bounds],
    )


def _check_network(args: argparse.Namespace, bundle: Bundle) -> None:
    config = bundle.manifest.unet.config
    classes_in_turn(config, 1)
    if config.cond_channels and not config.self_condition:
        raise RequestError("this network starts from a condition image; quality is measured of networks without one")
    if (args.save_npz or args.inception) and config.in_channels not in (1, 3):
        raise RequestError(f"images of {config.in_channels} channels are neither grey nor RGB; leave FID and npz out")


def _first(images: ImageSet, count: int) -> ImageSet:
    assert images.images is not None
    labels = None if images.labels is None else images.labels[:count]
    return ImageSet(images.name, images.images[:count], labels)


def _row_of(name: str, images: ImageSet, judged: Judgement) -> Row:
    assert images.images is not None
    pixels = images.images
    return samples_row(name, None, len(pixels), [each.score(pixels, images.labels) for each in judged.scorers])


@contextmanager
def _opened(args: argparse.Namespace, bundle: Bundle) -> Iterator[tuple[Mapping[str, Sampler], Sequence[Missing]]]:
    """The variants that open, closed again at the end; one in fp32 is always asked for."""
    names = parse_names(args.variants) if args.variants else variants()
    if all(precision != "fp32" for _, precision in names):
        names = (*names, FP32_REFERENCE)
    backends, missing = open_variants(bundle, names, args.threads)
    if not backends:
        raise BackendError("no variant opens: " + "; ".join(f"{each.variant}: {each.reason}" for each in missing))
    samplers = {variant: Sampler(backend, bundle, args.threads) for variant, backend in backends.items()}
    try:
        yield samplers, missing
    finally:
        for sampler in samplers.values():
            sampler.close()


class _Run:
    """The variants' turns: at each number of steps the fp32 reference first, then the others beside it."""

    def __init__(
        self,
        request: ImageRequest,
        scorers: Sequence[FeatureScorer],
        samplers: Mapping[str, Sampler],
        npz_folder: Path | None,
    ) -> None:
        self._request, self._scorers, self._npz_folder = request, scorers, npz_folder
        in_fp32 = [name for name in samplers if name.endswith(" fp32")]
        preferred = " ".join(FP32_REFERENCE)
        self.reference = preferred if preferred in in_fp32 else next(iter(in_fp32), None)
        self._samplers = dict(sorted(samplers.items(), key=lambda item: item[0] != self.reference))

    def cells(self, steps: Sequence[int]) -> tuple[list[Row], list[Check]]:
        """A row and its checks for every number of steps and variant."""
        rows, checks = [], []
        with tqdm(total=len(steps) * len(self._samplers), disable=not sys.stderr.isatty(), leave=False) as bar:
            for count in steps:
                reference: Cell | None = None
                for variant, sampler in self._samplers.items():
                    bar.set_description(f"{variant}, {count} steps")
                    cell = make_cell(variant, sampler, self._request, count, self._scorers, reference)
                    rows.append(cell.row())
                    checks += self._checks(cell, reference)
                    if self._npz_folder is not None and cell.is_finite:
                        save_cell(self._npz_folder, self._request.sampler, cell)
                    if variant == self.reference:
                        reference = cell
                    bar.update()
        return rows, checks

    def _checks(self, cell: Cell, reference: Cell | None) -> list[Check]:
        if reference is None:
            return [finite_check(cell)]
        return cell_checks(cell, cell.variant.rpartition(" ")[2], reference)

    def bounds(self, real: ImageSet | None, sizes: Sizes) -> tuple[list[Row], list[Missing]]:
        """Bits per dimension of every variant."""
        if real is None:
            return [], [Missing("bits per dimension", "they need real images; add --reference with images")]
        images = _first(real, sizes.bound_images)
        rows, missing = [], []
        for variant, sampler in self._samplers.items():
            try:
                rows.append(bound_row(variant, sampler, self._request, images, sizes.bound_steps))
            except RequestError as error:
                missing.append(Missing(f"bits per dimension of {variant}", str(error)))
        return rows, missing


def _settings(sizes: Sizes, request: ImageRequest, judged: Judgement, reference: str | None) -> dict[str, Any]:
    return {
        "sampler": request.sampler,
        "steps": list(sizes.steps),
        "images": sizes.images,
        "batch_size": request.batch_size,
        "seeds": f"0 to {sizes.images - 1}",
        "fp32_reference": reference,
        "judges": [scorer.name for scorer in judged.scorers],
        "confidence": CONFIDENCE,
        "bound_images": sizes.bound_images,
        "bound_steps": sizes.bound_steps,
        "images_per_s": "one run each, after one batch that is not counted; variants do not take turns",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_benchmark("quality", parser(), work, draw_quality, argv)
