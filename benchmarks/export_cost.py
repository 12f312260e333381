"""What an export costs: time and peak memory from checkpoint to bundle, by the size of the network.

    python -m benchmarks.export_cost --short --keep build/bench         # two networks to ONNX; their bundles stay
    python -m benchmarks.export_cost --models ddpm-cifar10,adm-64 --targets sm86
    python -m benchmarks.export_cost --checkpoint ckpt.pt --image-size 64 --num-head-channels 64

Every export is `python -m export.to_onnx` or `python -m export.to_trt` in a process of its own, which writes into a
temporary folder; plans are built anew, without the cache. Time varies with what else the machine does, and an export
is measured once unless --repeat says otherwise, so that no ratio is claimed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import shutil
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.environment import cpu, environment
from benchmarks.export_models import DIGITS, NAMES, Model, given_model, make_model, parse_models
from benchmarks.export_picture import draw
from benchmarks.export_run import PHASES, ExportRun, run_export
from benchmarks.harness import make_parser, run_benchmark
from benchmarks.report import Check, Missing, Report, Row
from engine.backends.trt.trt_library import PIP_LINES, RTX
from engine.bundle.folder import Bundle, is_bundle
from engine.bundle.manifest import WEIGHTS_NAME
from engine.checkpoints.facts import add_fact_arguments, facts_from_arguments
from engine.errors import MissingPackageError, RequestError
from engine.files import atomic_folder, make_folder
from export.to_trt import parse_targets
from export.trt.build import find_builders

logger = logging.getLogger(__name__)

SHORT_MODELS = (DIGITS, "ddpm-cifar10")
DEFAULT_TARGETS = ("sm86",)
LIMIT_FACTOR, LIMIT_BYTES = 12, 2 << 30
"""Most memory of an export: so many times the weights in fp32, and what its libraries take whatever the network.

Measured from 1 to 36 million parameters: 5.9 times and 0.7 GB to ONNX, 6.3 times and 1.0 GB with a plan. The rest is
for other versions of the libraries, and for processors with more threads, each of which has its own buffers.
"""


@dataclass(frozen=True, slots=True)
class Export:
    """One way to export a model. what: for a reader. module: export.to_onnx or export.to_trt."""

    model: Model
    what: str
    module: str
    arguments: tuple[str, ...]

    def command(self, out: Path) -> list[str]:
        """The child process."""
        words = [str(self.model.checkpoint), "--out", str(out), *self.model.arguments, *self.arguments]
        return [sys.executable, "-m", self.module, *words]


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """row: None where the export failed, and then missing says how it ended."""

    row: Row | None
    checks: tuple[Check, ...]
    missing: tuple[Missing, ...] = ()


def memory_limit(parameters: int) -> int:
    """Bytes that an export of a network of so many parameters may take."""
    return LIMIT_FACTOR * 4 * parameters + LIMIT_BYTES


def exports_of(model: Model, targets: tuple[str, ...] | None, short: bool) -> list[Export]:
    """ONNX alone, with plans where there are targets, with the model's classifier; in short the last of these alone.

    Short exports choose 8-bit convolutions too, for what is measured of the bundles afterwards.
    """
    found = [Export(model, "onnx", "export.to_onnx", ())]
    if targets is not None:
        plan = ("--target", ",".join(targets), "--no-cache")
        found.append(Export(model, f"onnx + plan {' '.join(targets)}", "export.to_trt", plan))
    if model.classifier:
        found.append(Export(model, "onnx + classifier", "export.to_onnx", model.classifier))
    if not short:
        return found
    last = found[-1]
    return [dataclasses.replace(last, what=f"{last.what} + int8", arguments=(*last.arguments, "--native-int8"))]


def measure_export(export: Export, work: Path, repeat: int, cores: int | None, keep: Path | None) -> Result:
    """Run an export `repeat` times, one after the other; stops at one that fails. keep: where its bundle stays."""
    variant = f"{export.model.name}: {export.what}"
    out, runs = work / "out.engine", list[ExportRun]()
    for _ in range(repeat):
        shutil.rmtree(out, ignore_errors=True)
        run = run_export(export.command(out), work, cores)
        if run.status:
            return _failed(variant, run)
        runs.append(run)
    parameters, bundle_bytes = _parameters(Bundle.open(out)), _folder_bytes(out)
    if keep is not None:
        with atomic_folder(keep / f"{export.model.name}.engine", is_bundle) as kept:
            shutil.copytree(out, kept, dirs_exist_ok=True)
    shutil.rmtree(out)
    peak, limit = max(run.peak_bytes for run in runs), memory_limit(parameters)
    row = Row(
        {"model": export.model.name, "what": export.what},
        {
            "parameters": parameters,
            "checkpoint_bytes": export.model.checkpoint_bytes,
            "bundle_bytes": bundle_bytes,
            "count": len(runs),
            "wall_s": statistics.median(run.wall_s for run in runs),
            "wall_least_s": min(run.wall_s for run in runs),
            "wall_most_s": max(run.wall_s for run in runs),
            "cpu_s": statistics.median(run.cpu_s for run in runs),
            "peak_bytes": peak,
        }
        | {name: _median_phase(name, runs) for name in PHASES},
    )
    return Result(
        row,
        (
            Check(f"{variant}: the export succeeds", True),
            Check(
                f"{variant}: peak memory in bytes is bounded by the size of the weights",
                peak <= limit,
                peak,
                limit,
                f"it took {peak / 1e9:.2f} GB, more than {LIMIT_FACTOR} times the fp32 weights and "
                f"{LIMIT_BYTES / 1e9:.2f} GB; look for copies that export keeps",
            ),
        ),
    )


def _failed(variant: str, run: ExportRun) -> Result:
    reason = f"exit status {run.status}: {' | '.join(run.last_lines) or 'it printed nothing'}"
    check = Check(f"{variant}: the export succeeds", False, remedy=reason)
    return Result(None, (check,), (Missing(variant, reason),))


def _median_phase(name: str, runs: Sequence[ExportRun]) -> float | None:
    found = [run.phases_s[name] for run in runs if name in run.phases_s]
    return statistics.median(found) if found else None


def _parameters(bundle: Bundle) -> int:
    """Numbers in the network's weights."""
    from safetensors import safe_open

    with safe_open(bundle.file(WEIGHTS_NAME), "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def usable_targets(given: tuple[str, ...] | None, short: bool) -> tuple[tuple[str, ...] | None, tuple[Missing, ...]]:
    """What plans are built for, None for no plans and then why; raises ExportError for an unknown target."""
    if given is None and short:
        return None, (Missing("onnx + plan", f"not in the short form; add --targets {DEFAULT_TARGETS[0]}"),)
    if importlib.util.find_spec("tensorrt_rtx") is None:
        return None, (Missing("onnx + plan", f"TensorRT-RTX is not installed; install it with: {PIP_LINES[RTX]}"),)
    targets = given or DEFAULT_TARGETS
    find_builders(targets)
    return targets, ()


def models_of(args: Namespace, work: Path) -> Iterator[Model | Missing]:
    """One after the other, so that no two random checkpoints are on disk; Missing for one that cannot be made or held.

    Raises RequestError, and CheckpointError for a file of the user's that is not there.
    """
    facts = facts_from_arguments(args)
    if facts and args.checkpoint is None:
        raise RequestError("facts belong to a checkpoint; give its file with --checkpoint")
    if args.checkpoint is not None:
        yield given_model(args.checkpoint, facts)
        if args.models is None:
            return
    for name in parse_models(args.models or ",".join(SHORT_MODELS if args.short else NAMES)):
        folder = work / "models"
        try:
            model = make_model(name, folder)
        except MissingPackageError as error:
            yield Missing(name, str(error))
            continue
        wanted, there = memory_limit(model.checkpoint_bytes // 4), cpu()["memory_bytes"]
        yield (
            model
            if wanted <= there
            else Missing(name, f"its export may take {wanted / 1e9:.0f} GB and this machine has {there / 1e9:.0f} GB")
        )
        shutil.rmtree(folder, ignore_errors=True)


def measure(args: Namespace, command: str) -> Report:
    """Every export of every model; raises RequestError, CheckpointError or ExportError for wrong arguments."""
    if args.repeat < 1:
        raise RequestError(f"--repeat is {args.repeat}; expected 1 or more")
    targets, missing = usable_targets(args.targets, args.short)
    if args.keep is not None:
        make_folder(args.keep)
    found, absent = list[Result](), list(missing)
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=not sys.stderr.isatty(), unit="export") as bar:
        work = Path(folder)
        for model in models_of(args, work):
            if isinstance(model, Missing):
                absent.append(model)
                continue
            for export in exports_of(model, targets, args.short):
                bar.set_description(f"{model.name}: {export.what}")
                found.append(measure_export(export, work, args.repeat, args.threads, args.keep))
                logger.info("%s: %s: %s", model.name, export.what, _outcome(found[-1]))
                bar.update()
    return Report(
        benchmark="export_cost",
        command=command,
        environment=environment(args.threads),
        subject={"name": ", ".join(dict.fromkeys(str(r.row.case["model"]) for r in found if r.row is not None))},
        settings={
            "short": args.short,
            "repeat": args.repeat,
            "targets": list(targets or ()),
            "memory_limit_factor": LIMIT_FACTOR,
            "memory_limit_bytes": LIMIT_BYTES,
            "note": "each figure is one measurement, or the median of `count`; no ratio is claimed",
        },
        rows=[result.row for result in found if result.row is not None],
        checks=[check for result in found for check in result.checks],
        missing=[*absent, *(each for result in found for each in result.missing)],
    )


def _outcome(result: Result) -> str:
    """A few words for who waits: a long run must not lose what it has found if it is ended."""
    if result.row is None:
        return result.missing[0].reason
    metrics = result.row.metrics
    return f"{metrics['wall_s']:.1f} s, peak {(metrics['peak_bytes'] or 0) / 1e9:.2f} GB"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = make_parser("export_cost", "Time and peak memory of exports by model size.", takes_bundle=False)
    parser.add_argument("--models", metavar="NAME,...", help=f"of {','.join(NAMES)} (default all)")
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a checkpoint of yours, with its facts")
    parser.add_argument(
        "--targets", type=parse_targets, metavar="SM,...", help="plans of TensorRT-RTX for these (default sm86)"
    )
    parser.add_argument("--repeat", type=int, default=1, metavar="N", help="measure each export N times (default 1)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where each model's last bundle stays")
    add_fact_arguments(parser)
    return run_benchmark("export_cost", parser, measure, draw, argv)


if __name__ == "__main__":
    sys.exit(main())
