"""What an export costs: time and peak memory from checkpoint to bundle, by the size of the network.

    python -m benchmarks.export_cost --short --keep build/bench         # two networks to ONNX; their bundles stay
    python -m benchmarks.export_cost --models ddpm-cifar10,adm-64 --targets sm86

Every export is `python -m export.to_onnx` or `python -m export.to_trt` in a process of its own, which writes into a
temporary folder; plans are built anew, without the cache. Time varies with what else the machine does, and an export
is measured once, so that no ratio is claimed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks.core.environment import cpu, environment
from benchmarks.core.harness import make_parser, run_benchmark
from benchmarks.core.pictures import draw_export_cost
from benchmarks.core.report import Check, Missing, Report, Row
from benchmarks.exports.export_run import PHASES, run_export
from benchmarks.random_models import MODELS, write_random_model
from engine.backends.trt.trt_library import PIP_LINES, RTX
from engine.bundle.bundle_folder import Bundle, is_bundle
from engine.bundle.file_names import UNET, weights_name
from engine.errors import BackendError, RequestError
from engine.files import atomic_folder, make_folder
from export.to_trt import parse_targets
from export.trt.build import find_builders

logger = logging.getLogger(__name__)

DIGITS = "digits"
NAMES = (DIGITS, *MODELS)
SHORT_MODELS = (DIGITS, "ddpm-cifar10")
DEFAULT_TARGETS = ("sm86",)
LIMIT_FACTOR, LIMIT_BYTES = 12, 2 << 30
"""Most memory of an export: so many times the weights in fp32, and what its libraries take whatever the network.

Measured from 1 to 36 million parameters: 5.9 times and 0.7 GB to ONNX, 6.3 times and 1.0 GB with a plan. The rest is
for other versions of the libraries, and for processors with more threads, each of which has its own buffers.
"""


@dataclass(frozen=True, slots=True)
class ExportModel:
    """A checkpoint on disk and the arguments that its export takes; classifier: those that add one, or none."""

    name: str
    checkpoint: Path
    arguments: tuple[str, ...] = ()
    classifier: tuple[str, ...] = ()

    @property
    def checkpoint_bytes(self) -> int:
        """Of the file, or of every file in the folder."""
        if self.checkpoint.is_file():
            return self.checkpoint.stat().st_size
        return sum(path.stat().st_size for path in self.checkpoint.rglob("*") if path.is_file())


def make_model(name: str, folder: Path) -> ExportModel:
    """One of NAMES; a random one is written into the folder.

    Raises MissingPackageError without diffusers, BackendError for the digits where the repository is not there.
    """
    if name != DIGITS:
        return ExportModel(name, write_random_model(folder / name, MODELS[name]))
    try:
        from judging import digits
    except ImportError as error:
        raise BackendError("the digits model is part of the repository; run this in a checkout of it") from error
    return ExportModel(DIGITS, digits.CHECKPOINT, digits.fact_arguments(), digits.CLASSIFIER_ARGUMENTS)


@dataclass(frozen=True, slots=True)
class Export:
    """One way to export a model. what: for a reader. module: export.to_onnx or export.to_trt."""

    model: ExportModel
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


def exports_of(model: ExportModel, targets: tuple[str, ...] | None, short: bool) -> list[Export]:
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


def measure_export(export: Export, work: Path, cores: int | None, keep: Path | None) -> Result:
    """Run an export. keep: where its bundle stays."""
    variant, out = f"{export.model.name}: {export.what}", work / "out.engine"
    run = run_export(export.command(out), work, cores)
    if run.status:
        reason = f"exit status {run.status}: {' | '.join(run.last_lines) or 'it printed nothing'}"
        check = Check(f"{variant}: the export succeeds", False, remedy=reason)
        return Result(None, (check,), (Missing(variant, reason),))
    parameters, bundle_bytes = _parameters(Bundle.open(out)), _folder_bytes(out)
    if keep is not None:
        with atomic_folder(keep / f"{export.model.name}.engine", is_bundle) as kept:
            shutil.copytree(out, kept, dirs_exist_ok=True)
    shutil.rmtree(out)
    limit = memory_limit(parameters)
    metrics = {
        "parameters": parameters,
        "checkpoint_bytes": export.model.checkpoint_bytes,
        "bundle_bytes": bundle_bytes,
        "wall_s": run.wall_s,
        "cpu_s": run.cpu_s,
        "peak_bytes": run.peak_bytes,
        **{name: run.phases_s.get(name) for name in PHASES},
    }
    return Result(
        Row({"model": export.model.name, "what": export.what}, metrics),
        (
            Check(f"{variant}: the export succeeds", True),
            Check(
                f"{variant}: peak memory in bytes is bounded by the size of the weights",
                run.peak_bytes <= limit,
                run.peak_bytes,
                limit,
                f"it took {run.peak_bytes / 1e9:.2f} GB, more than {LIMIT_FACTOR} times the fp32 weights and "
                f"{LIMIT_BYTES / 1e9:.2f} GB; look for copies that export keeps",
            ),
        ),
    )


def _parameters(bundle: Bundle) -> int:
    """Numbers in the network's weights."""
    from safetensors import safe_open

    with safe_open(bundle.file(weights_name(UNET)), "pt") as file:
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


def parse_models(text: str) -> tuple[str, ...]:
    """Names out of "digits,adm-64"; raises RequestError."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if unknown := [name for name in names if name not in NAMES]:
        raise RequestError(f"unknown model {', '.join(unknown)!r}; --models takes some of {','.join(NAMES)}")
    return names


def make_models(names: Sequence[str], work: Path) -> Iterator[ExportModel | Missing]:
    """One after the other, so that no two random checkpoints are on disk; Missing for one that is too much."""
    for name in names:
        folder = work / "models"
        try:
            model = make_model(name, folder)
        except BackendError as error:
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
    """Every export of every model; raises RequestError or ExportError for wrong arguments."""
    names = parse_models(args.models or ",".join(SHORT_MODELS if args.short else NAMES))
    targets, missing = usable_targets(args.targets, args.short)
    if args.keep is not None:
        make_folder(args.keep)
    found, absent = list[Result](), list(missing)
    with tempfile.TemporaryDirectory() as folder, tqdm(disable=not sys.stderr.isatty(), unit="export") as bar:
        work = Path(folder)
        for model in make_models(names, work):
            if isinstance(model, Missing):
                absent.append(model)
                continue
            for export in exports_of(model, targets, args.short):
                bar.set_description(f"{model.name}: {export.what}")
                found.append(measure_export(export, work, args.threads, args.keep))
                logger.info("%s: %s: %s", model.name, export.what, _outcome(found[-1]))
                bar.update()
    return Report(
        benchmark="export_cost",
        command=command,
        environment=environment(args.threads),
        subject={"name": ", ".join(dict.fromkeys(str(r.row.case["model"]) for r in found if r.row is not None))},
        settings={
            "short": args.short,
            "targets": list(targets or ()),
            "memory_limit_factor": LIMIT_FACTOR,
            "memory_limit_bytes": LIMIT_BYTES,
            "note": "each figure is one measurement; no ratio is claimed",
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
    parser.add_argument(
        "--targets", type=parse_targets, metavar="SM,...", help="plans of TensorRT-RTX for these (default sm86)"
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="where each model's last bundle stays")
    return run_benchmark("export_cost", parser, measure, draw_export_cost, argv)


if __name__ == "__main__":
    sys.exit(main())
