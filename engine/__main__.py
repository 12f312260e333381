"""The command line: python -m engine sample | info."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.backends.registry import AUTO, NAMES
from engine.checkpoints.facts import add_fact_arguments
from engine.cli.command import run_command
from engine.cli.info import info
from engine.cli.sample import sample
from engine.diffusion.prediction import Variance
from engine.diffusion.solvers import SAMPLERS

_EXAMPLES = """examples:
  python -m engine sample digits.engine -n 64 --steps 50 --sampler ddim --class 7 --seed 0 --out samples
  python -m engine sample digits.engine -n 100 --per-class --grid digits.png --enlarge 4
  python -m engine sample digits.engine -n 500 --sampler ddpm --steps 250 --format npz --out samples
  python -m engine sample digits.engine -n 50000 --per-class --out samples --merge     # again, to resume
  python -m engine sample digits.engine -n 100 --per-class --sampler dpmpp --steps 20 --guidance-scale 3 --out guided
  python -m engine sample digits.engine -n 16 --classifier classifier.pt --classifier-fact num_head_channels=32 \\
      --classifier-scale 2 --out guided
  python -m engine info digits.engine --verify
  python -m engine info ema_0.9999_500000.pt --image-size 64 --num-head-channels 64
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of both commands."""
    parser = argparse.ArgumentParser(
        prog="python -m engine",
        description="Sample from a bundle, or say what a bundle or checkpoint is.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_sample(commands.add_parser("sample", help="make images from a bundle"))
    _add_info(commands.add_parser("info", help="describe a bundle or any checkpoint"))
    return parser


def _add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, help="folder that export.to_onnx or export.to_trt made")
    parser.add_argument("-n", type=int, default=16, help="number of images (default 16)")
    parser.add_argument("--steps", default="50", help='number of steps, or a respacing such as "10,10,10" or "ddim50"')
    parser.add_argument("--sampler", choices=tuple(SAMPLERS), default="ddim", help="default ddim")
    parser.add_argument("--eta", type=float, default=0.0, help="DDIM stochasticity, 0 to 1 (default 0)")
    parser.add_argument("--variance", choices=tuple(variance.value for variance in Variance), help="of a DDPM step")
    labels = parser.add_mutually_exclusive_group()
    labels.add_argument(
        "--class", dest="label", type=int, help="one class for all images (default: drawn from the seed)"
    )
    labels.add_argument(
        "--per-class", action="store_true", help="as many of every class: one after the other, in shards in turn"
    )
    parser.add_argument("--seed", type=int, default=0, help="image i has seed SEED + i (default 0)")
    parser.add_argument("--out", type=Path, help="folder for the images")
    parser.add_argument("--format", choices=("png", "npz"), help="files in --out (default png, of shards npz)")
    parser.add_argument(
        "--shard-size",
        type=int,
        metavar="M",
        help="shards of M images and a run.json; the same command again resumes (default with -n above 1000: 256)",
    )
    parser.add_argument("--merge", action="store_true", help="join the shards to one samples.npz at the end")
    parser.add_argument("--grid", type=Path, help="one PNG with all images, without gaps")
    parser.add_argument("--columns", type=int, help="columns of the grid (default: one row a class, or a square)")
    parser.add_argument("--enlarge", type=int, default=1, help="integer enlargement of the grid (default 1)")
    parser.add_argument("--backend", default=AUTO, help=f"{', '.join(NAMES)}, or {AUTO} for the fastest here (default)")
    parser.add_argument(
        "--precision", help="fp32, bf16, fp16 or int8, where the backend has it (default: the backend's own choice)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--batch-size", type=int, default=16, help="largest batch of the network (default 16)")
    parser.add_argument(
        "--classifier", type=Path, help="classifier checkpoint for guidance instead of the bundle's own"
    )
    parser.add_argument(
        "--classifier-scale",
        type=float,
        help="classifier gradient scale, by the bundle's classifier unless --classifier is given (then default 1)",
    )
    parser.add_argument("--guidance-scale", type=float, default=1.0, help="classifier-free guidance (default 1: none)")
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("FIRST", "LAST"),
        default=(-math.inf, math.inf),
        help="training timesteps with classifier-free guidance (default: all)",
    )
    parser.add_argument(
        "--guidance-rescale", type=float, default=0.0, metavar="PHI", help="its rescaling (default 0: none)"
    )
    parser.add_argument(
        "--guidance-plus-plus", action="store_true", help="in the form of CFG++, with ddim; scale 0 to 1"
    )
    parser.add_argument(
        "--classifier-fact", action="append", default=[], metavar="NAME=VALUE", help="a fact its file does not hold"
    )
    parser.add_argument("--json", action="store_true", help="print a summary as JSON on stdout")
    parser.set_defaults(action=sample)


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, help="a bundle or a checkpoint file")
    parser.add_argument("--verify", action="store_true", help="check the hash of every file of a bundle")
    parser.add_argument("--json", action="store_true", help="print as JSON on stdout")
    add_fact_arguments(parser)
    parser.set_defaults(action=info)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    args = make_parser().parse_args(argv)
    return run_command(args.action, args)


if __name__ == "__main__":
    sys.exit(main())
