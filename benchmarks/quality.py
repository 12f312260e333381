"""How good the samples of each backend and precision are, beside how fast they are made.

    python -m benchmarks.quality digits.engine
    python -m benchmarks.quality model.engine --inception pt_inception-2015-12-05-6726825d.pth --reference reference.npz

Every variant makes the same images, from the same seeds, at several numbers of steps. They are judged three ways: by
PSNR beside the fp32 images; by a network, the digits' own evaluator (whose distance is called Fréchet distance, never
FID) or InceptionV3 with weights that the user gives; and by the bits per dimension that the variant gives real images.
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

from benchmarks.environment import environment
from benchmarks.harness import make_parser, run_benchmark
from benchmarks.image_sets import ImageSet, in_turn, read_images, real_digits
from benchmarks.judges import CONFIDENCE, DigitsJudge, FeatureScorer, InceptionJudge, Scorer, TorchFidelityScorer
from benchmarks.quality_checks import cell_checks, finite_check, likelihood_check
from benchmarks.quality_plot import REAL, draw
from benchmarks.quality_run import Cell, Request, bound_row, classes_in_turn, make_cell, samples_row, save_cell
from benchmarks.report import Check, Missing, Report, Row
from benchmarks.subject import Name, describe_bundle, open_variants, parse_names
from engine.backends.registry import variants
from engine.bundle.folder import Bundle
from engine.diffusion.solvers import SAMPLERS
from engine.errors import BackendError, RequestError
from engine.files import file_sha256
from engine.sampling.sampler import Sampler
from recipes.quality import EVALUATOR

DIGITS = EVALUATOR.with_name("digits.pt")
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
    "FID, sFID, IS, precision and recall need weights of InceptionV3, which are not part of this project: get "
    "pt_inception-2015-12-05-6726825d.pth (release fid_weights of pytorch-fid; torch-fidelity publishes the same as "
    "weights-inception-2015-12-05-6726825d.pth) and pass it as --inception FILE, with --reference FILE.npz or a folder "
    "of PNG files; or pip install torch-fidelity and pass --torch-fidelity with --reference; or pass --save-npz and "
    "give the files to guided-diffusion's evaluations/evaluator.py"
)


def parser() -> argparse.ArgumentParser:
    """The command line of this benchmark."""
    made = make_parser("quality", "Samples of every backend and precision beside real ones and beside fp32.")
    made.add_argument("--variants", type=str, help="such as ov:fp32,ort:fp32 (default: all that open)")
    made.add_argument("--sampler", choices=tuple(SAMPLERS), default="ddim")
    made.add_argument("--steps", help=f"such as 10,25,50,100 (default {_listed(LONG)}, with --short {_listed(SHORT)})")
    made.add_argument("-n", type=int, help=f"images each (default {LONG.images}, with --short {SHORT.images})")
    made.add_argument("--batch-size", type=int, default=25, help="images in progress at a time (default 25)")
    made.add_argument("--reference", type=Path, help="real images: .npz with arr_0 or mu and sigma, or a PNG folder")
    made.add_argument("--inception", type=Path, help="weights of InceptionV3 as pytorch-fid publishes them")
    made.add_argument("--torch-fidelity", action="store_true", help="FID and IS by that package, if it is installed")
    made.add_argument("--samples", type=Path, nargs="+", default=[], help=".npz files to judge too: arr_0, arr_1")
    made.add_argument("--bound-images", type=int, help="real images for bits per dimension (100, with --short 10)")
    made.add_argument("--bound-steps", type=int, help="steps of that bound (100, with --short 20)")
    made.add_argument("--save-npz", action="store_true", help="also write the images, for guided-diffusion's evaluator")
    return made


def _listed(sizes: Sizes) -> str:
    return ",".join(map(str, sizes.steps))


def sizes_from(args: argparse.Namespace) -> Sizes:
    """What the options ask for; raises RequestError for numbers below their least."""
    base = SHORT if args.short else LONG
    try:
        steps = tuple(dict.fromkeys(int(part) for part in args.steps.split(","))) if args.steps else base.steps
    except ValueError as error:
        raise RequestError(f"--steps is {args.steps!r}; expected numbers such as 10,25,50") from error
    sizes = Sizes(
        steps,
        base.images if args.n is None else args.n,
        base.bound_images if args.bound_images is None else args.bound_images,
        base.bound_steps if args.bound_steps is None else args.bound_steps,
    )
    for name, value, least in (
        ("--steps", min(sizes.steps), 1),
        ("-n", sizes.images, 2),
        ("--bound-images", sizes.bound_images, 1),
        ("--bound-steps", sizes.bound_steps, 1),
        ("--batch-size", args.batch_size, 1),
    ):
        if value < least:
            raise RequestError(f"{name} is {value}; expected {least} or more")
    return sizes


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What images are judged by. real: images that none of it saw, of which a part gets bits per dimension."""

    scorers: Sequence[Scorer]
    real: ImageSet | None
    missing: Sequence[Missing]


def judgement(args: argparse.Namespace, is_digits: bool, count: int) -> Judgement:
    """Scorers for this bundle and these options; raises RequestError for options that lack another."""
    digits = real_digits() if is_digits else None
    given = read_images(args.reference) if args.reference is not None else None
    reference = given or (digits["train"] if digits else None)
    scorers: list[Scorer] = [FeatureScorer(DigitsJudge(), digits["train"])] if digits else []
    for option, is_asked in (("--inception", args.inception is not None), ("--torch-fidelity", args.torch_fidelity)):
        if is_asked and reference is None:
            raise RequestError(f"{option} needs real images too; add --reference FILE.npz or a folder of PNG files")
    if args.inception is not None and reference is not None:
        scorers.append(FeatureScorer(InceptionJudge(args.inception), reference))
    elif args.torch_fidelity and reference is not None:
        scorers.append(TorchFidelityScorer(reference))
    missing = [] if args.inception or args.torch_fidelity else [Missing("FID", NO_INCEPTION)]
    real = in_turn(digits["held_out"], count) if digits else given if given and given.images is not None else None
    return Judgement(scorers, real, missing)


def is_shipped_digits(bundle: Bundle) -> bool:
    """Whether a bundle was made of assets/digits.pt, for whose images there is an evaluator."""
    return DIGITS.exists() and bundle.manifest.checkpoint_sha256 == file_sha256(DIGITS)


def work(args: argparse.Namespace, command: str) -> Report:
    """The report; everything that can be refused is refused before the first image."""
    sizes = sizes_from(args)
    bundle = Bundle.open(args.bundle)
    is_digits = is_shipped_digits(bundle)
    _check_network(args, bundle)
    judged = judgement(args, is_digits, max(sizes.images, sizes.bound_images))
    others = [read_images(path) for path in args.samples]
    if others and (not judged.scorers or any(each.images is None for each in others)):
        raise RequestError("--samples needs images, and something to judge them: add --inception and --reference")
    rows = [_row_of(REAL, _first(judged.real, sizes.images), judged)] if is_digits and judged.real else []
    rows += [_row_of(each.name, each, judged) for each in others]
    with _opened(args, bundle) as (samplers, missing):
        request = Request(args.sampler, sizes.images, args.batch_size)
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
    config = bundle.manifest.config
    classes_in_turn(config, 1)
    if config.cond_channels and not config.self_condition:
        raise RequestError("this network starts from a condition image; quality is measured of networks without one")
    if (args.save_npz or args.inception or args.torch_fidelity) and config.in_channels not in (1, 3):
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
        self, request: Request, scorers: Sequence[Scorer], samplers: Mapping[str, Sampler], npz_folder: Path | None
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


def _settings(sizes: Sizes, request: Request, judged: Judgement, reference: str | None) -> dict[str, Any]:
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
    return run_benchmark("quality", parser(), work, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
