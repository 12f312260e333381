"""What the two export commands share: arguments, progress, output, exit status."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engine.bundle.bundle_folder import Bundle
from engine.bundle.manifest import FusionReport, NetworkEntry
from engine.checkpoints.facts import add_fact_arguments
from engine.cli.command import run_command
from engine.cli.info import measurement_table
from engine.errors import OutputError
from engine.json_form import encode
from engine.networks.config import ClassifierConfig, UNetConfig

logger = logging.getLogger(__name__)

Report = Callable[[str], None]
"""Called with a few words at the start of each step."""


def make_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """The arguments of both commands: CHECKPOINT, --out, --json and a flag for each fact."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}",
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="the file that the training wrote")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the bundle to make (default: CHECKPOINT with the suffix .engine)"
    )
    parser.add_argument(
        "--classifier", type=Path, metavar="FILE", help="noise-conditioned classifier whose gradient goes in too"
    )
    parser.add_argument(
        "--classifier-fact", action="append", default=[], metavar="NAME=VALUE", help="a fact its file does not hold"
    )
    parser.add_argument(
        "--native-int8", action="store_true", help="choose 8-bit convolutions for the CPU engine, to be opened in int8"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_fact_arguments(parser)
    return parser


def run(
    work: Callable[[argparse.Namespace], Bundle], parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
    """Parse, work and print the bundle; returns the exit status of engine.cli.command.run_command."""

    def action(args: argparse.Namespace) -> None:
        try:
            bundle = work(args)
        except OSError as error:
            name = f"{error.filename}: " if error.filename else ""
            raise OutputError(f"{name}{error.strerror or error}") from error
        print(json.dumps(summary(bundle), indent=1) if args.json else describe(bundle))

    return run_command(action, parser.parse_args(argv))


def output_folder(args: argparse.Namespace) -> Path:
    """--out, or the checkpoint's name with the suffix .engine, beside it."""
    if args.out is not None:
        return Path(args.out)
    if args.checkpoint.is_dir():
        folder = args.checkpoint.resolve()
        return Path(folder.with_name(folder.name + ".engine"))
    return Path(args.checkpoint.with_suffix(".engine"))


@contextmanager
def progress(steps: int) -> Iterator[Report]:
    """A bar over the steps on stderr, where that is a terminal."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    is_hidden = not sys.stderr.isatty()
    with tqdm(total=steps, disable=is_hidden, bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed} {desc}") as bar:
        started = 0

        def report(step: str) -> None:
            nonlocal started
            bar.update(started - bar.n)
            bar.set_description_str(step)
            started += 1
            if is_hidden:
                logger.info("%s", step)

        if is_hidden:
            yield report
        else:
            with logging_redirect_tqdm():
                yield report
        bar.update(steps - bar.n)


def summary(bundle: Bundle) -> dict[str, object]:
    """What --json prints."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "family": manifest.family,
        "assumptions": [{"name": a[0], "value": a[1], "reason": a[2]} for a in manifest.assumptions],
        "files": {name: entry.size_bytes for name, entry in manifest.files.items()},
        "networks": {name: _summary_of(entry) for name, entry in manifest.networks.named().items()},
    }


def _summary_of(entry: NetworkEntry[UNetConfig | ClassifierConfig]) -> dict[str, object]:
    return {
        "plans": [encode(plan) for plan in entry.plans],
        "files": entry.files,
        "fp32_parts": [{"name": name, "reason": reason} for name, reason in entry.fp32_parts],
        "verification": [encode(m) | {"relative": m.relative, "passed": m.passed} for m in entry.verification],
    }


def describe(bundle: Bundle) -> str:
    """The bundle's files, plans and errors as text."""
    manifest = bundle.manifest
    networks = manifest.networks.named().values()
    lines = [f"{bundle.path}"]
    for name, entry in manifest.files.items():
        lines.append(f"  {name:18} {entry.size_bytes / 1e6:8.2f} MB")
    for plan in (plan for network in networks for plan in network.plans):
        low, best, high = plan.batch_profile
        made_by = f"{plan.library} {plan.library_version}"
        batches = f"batch {low} to {high} (best {best})"
        lines.append(f"{plan.file}: {made_by}, {plan.precision}, {batches}, {' '.join(plan.targets)}")
        if plan.fusion is not None:
            lines.append(f"  {_fusion(plan.fusion)}")
    measured = tuple(m for network in networks for m in network.verification)
    checks = measurement_table(measured) if measured else "nothing was verified"
    return "\n".join([*lines, "", checks])


def _fusion(report: FusionReport) -> str:
    types = ", ".join(f"{count} {name}" for name, count in sorted(report.kernel_types.items()))
    moved = "" if report.traffic_bytes is None else f"{report.traffic_bytes / 1e6:.1f} MB of activations moved, "
    int8 = f"{report.int8_convolutions} convolutions in int8; " if report.int8_convolutions else ""
    return (
        f"{report.launches} kernels ({types}); {int8}fused: {report.norm_silu} of {report.norm_silu_expected} "
        f"norm+SiLU, {report.attention} of {report.attention_expected} attention; {moved}"
        f"{report.activation_bytes / 1e6:.1f} MB of activations held, {report.weight_bytes / 1e6:.1f} MB of weights"
    )
