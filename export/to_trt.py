"""From a checkpoint to a bundle with TensorRT plans.

    python -m export.to_trt ckpt.pt     makes ckpt.engine/ with unet.onnx, unet.fp16.onnx and unet.rtx.plan

--precision bf16, int8 or fp32 makes the second ONNX file, if any, and the plan in that precision. Where no TensorRT is
installed the bundle is made without a plan and runs on the other backends.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.backends.trt.trt_library import PIP_LINES, RTX
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import CLASSIFIER, onnx_name
from engine.bundle.manifest import PlanEntry
from engine.checkpoints.types import Checkpoint
from engine.errors import ExportError
from export import arguments as cli
from export.onnx.onnx_file import has_wide_products
from export.precision import Precision
from export.to_onnx import export_bundle, read_checkpoint, read_classifier
from export.trt.build import DEFAULT_BATCH, NO_OPTIONS, BuildOptions, PlanBuilder, Profile, find_builders
from export.trt.plan_cache import plan_cache_folder

logger = logging.getLogger(__name__)


def export_trt_bundle(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    classifier: Checkpoint | None = None,
    precision: Precision = Precision.FP16,
    native_int8: bool = False,
    targets: tuple[str, ...] | None = None,
    batches: Sequence[Profile] = (DEFAULT_BATCH,),
    options: BuildOptions = NO_OPTIONS,
    cache: Path | None = None,
    report: cli.Report = logger.info,
) -> Bundle:
    """Make the bundle `out` with fp32 ONNX, ONNX in the precision, and a plan of each TensorRT that works here.

    classifier: whose gradient goes in too, in fp32, and in fp16 unless the precision is FP32. native_int8: as there.
    targets: compute
    capabilities such as "sm89" for TensorRT-RTX, None for all it knows that can run the precision. batches: smallest,
    best and largest batch of each plan. options: of `tensorrt`'s plans. cache: folder of built plans, None for none.
    Raises what export.to_onnx.export_bundle raises, and ExportError for a target that is unknown or cannot be built.
    Without TensorRT the bundle has no plan and a warning is logged.
    """
    builders = find_builders(targets, options)
    if not builders:
        logger.warning("no TensorRT is installed here, so no plan is built; install it with: %s", PIP_LINES[RTX])
    check_targets(precision, targets)

    def make_plans(onnx: Path) -> tuple[PlanEntry, ...]:
        is_classifier = onnx.name.startswith("classifier")
        computes_in = Precision.FP16 if onnx.name == onnx_name(CLASSIFIER, "fp16") else precision
        able = builders
        if computes_in is Precision.INT8 or has_wide_products(onnx):
            if targets is not None and "sm75" in targets and not is_classifier:
                raise ExportError(
                    f"{onnx.name} has float32 convolutions, which sm75 cannot run (the parts that float16 cannot "
                    "hold are listed above); leave sm75 out of --target"
                )
            able = _without_sm75(builders, onnx.name)
        return tuple(builder.build(onnx, batch, computes_in.value, cache) for builder in able for batch in batches)

    return export_bundle(
        checkpoint,
        out,
        classifier=classifier,
        precision=precision,
        native_int8=native_int8,
        make_plans=make_plans if builders else None,
        report=report,
    )


def check_targets(precision: Precision, targets: tuple[str, ...] | None) -> None:
    """Raise ExportError for a target that cannot run a precision."""
    if targets is not None and "sm75" in targets and precision is not Precision.FP16:
        raise ExportError(
            f"TensorRT-RTX has no {precision.value} convolutions for sm75; leave sm75 out of --target, or use "
            "--precision fp16"
        )


def _without_sm75(builders: Sequence[PlanBuilder], name: str) -> tuple[PlanBuilder, ...]:
    able = []
    for builder in builders:
        targets = tuple(target for target in builder.targets if target != "sm75")
        if targets != builder.targets:
            logger.warning("the plan of %s leaves out sm75, which runs its products in fp16 only", name)
        if targets:
            able.append(dataclasses.replace(builder, targets=targets))
    return tuple(able)


def parse_targets(text: str) -> tuple[str, ...]:
    """ "sm86,sm89" as ("sm86", "sm89"), each once."""
    targets = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if not targets:
        raise argparse.ArgumentTypeError('expected compute capabilities such as "sm86,sm89"')
    return targets


def parse_batches(text: str) -> tuple[Profile, ...]:
    """ "1:8:64" as ((1, 8, 64),), one plan for a range; "1,8" as ((1, 1, 1), (8, 8, 8)), a static plan each."""
    try:
        if ":" in text:
            low, best, high = (int(part) for part in text.split(":"))
            profiles = [(low, best, high)]
        else:
            profiles = [(size, size, size) for size in dict.fromkeys(int(part) for part in text.split(","))]
    except ValueError:
        profiles = [(0, 0, 0)]
    if not all(1 <= low <= best <= high for low, best, high in profiles):
        raise argparse.ArgumentTypeError(
            f'{text!r}: expected smallest:best:largest batch, such as "1:8:64", or fixed batches, such as "1,8,64"'
        )
    return tuple(profiles)


EXAMPLES = """examples:
  python -m export.to_trt assets/digits.pt --image-size 32 --num-head-channels 32 --noise-schedule cosine
  python -m export.to_trt ema_0.9999_500000.pt --family openai-improved --target sm86,sm89 --batch 1,16,128
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = cli.make_parser(
        "export.to_trt", "Make a verified bundle with TensorRT plans from a trained checkpoint.", EXAMPLES
    )
    parser.add_argument(
        "--target",
        type=parse_targets,
        metavar="SM,...",
        help="compute capabilities of the TensorRT-RTX plan, such as sm86,sm89 (default: all it knows)",
    )
    parser.add_argument(
        "--batch",
        type=parse_batches,
        metavar="MIN:OPT:MAX|N,...",
        default=(DEFAULT_BATCH,),
        help="smallest, best and largest batch of the plan (default 1:8:64), or fixed batches with a plan each",
    )
    parser.add_argument(
        "--precision",
        type=Precision,
        choices=tuple(Precision),
        metavar="fp16|bf16|fp32|int8",
        default=Precision.FP16,
        help="what the plan computes in (default fp16; int8: fp16 with 8-bit 3x3 convolutions)",
    )
    parser.add_argument(
        "--hardware-compatible",
        action="store_true",
        help="a plan of tensorrt for every GPU from compute capability 8.0 on",
    )
    parser.add_argument(
        "--strip-weights",
        action="store_true",
        help="a plan of tensorrt without weights, which come from the bundle's ONNX file when it is opened",
    )
    parser.add_argument(
        "--plugins",
        choices=("triton",),
        help="GroupNorm+SiLU of tensorrt's plan by the Triton kernel; no plan of TensorRT-RTX is built",
    )
    parser.add_argument("--no-cache", action="store_true", help="build every plan anew and keep none for later")

    def work(args: argparse.Namespace) -> Bundle:
        options = BuildOptions(args.hardware_compatible, args.strip_weights, args.plugins == "triton")
        find_builders(args.target, options)  # a wrong target is said before the work begins
        check_targets(args.precision, args.target)
        checkpoint = read_checkpoint(args)
        classifier = read_classifier(args, checkpoint)
        more = args.native_int8, args.precision is not Precision.FP32, classifier is not None
        with cli.progress(3 + sum(more)) as report:
            return export_trt_bundle(
                checkpoint,
                cli.output_folder(args),
                classifier=classifier,
                precision=args.precision,
                native_int8=args.native_int8,
                targets=args.target,
                batches=args.batch,
                options=options,
                cache=None if args.no_cache else plan_cache_folder(),
                report=report,
            )

    return cli.run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
