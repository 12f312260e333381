"""From a checkpoint to a bundle that runs wherever ONNX Runtime, OpenVINO or torch does.

    python -m export.to_onnx ckpt.pt        makes ckpt.engine/ with unet.onnx, unet.safetensors and manifest.json

`export_bundle` is the same from Python; export.to_trt adds float16 and TensorRT plans through its arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from engine.backends.native.byte_ranges import write_ranges
from engine.bundle.bundle_folder import Bundle, is_bundle
from engine.bundle.file_names import CLASSIFIER, UNET, onnx_name, ranges_name, weights_name
from engine.bundle.manifest import ClassifierEntry, NetworkEntry, Networks, PlanEntry
from engine.checkpoints.facts import facts_from_arguments, facts_from_items
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.errors import CheckpointError, ExportError, MissingPackageError
from engine.files import atomic_folder, make_folder
from engine.networks.config import LabelInput, UNetConfig
from engine.networks.half import norm_names
from engine.networks.unet import UNet
from export import arguments as cli
from export.fp32_parts import Fp32Part, find_fp32_parts
from export.guide import check_fit, export_classifier
from export.int8.native_int8 import choose_int8, describe_int8
from export.int8.quantise import quantise
from export.onnx.onnx_file import OPSET, quiet_exporter, save_program
from export.precision import NOTES, Precision, typed_unet
from export.subject import Subject, make_subject
from export.verify import Typed, verify
from export.weights import save_weights

logger = logging.getLogger(__name__)

_LIBRARIES = ("unet-rt", "torch", "numpy", "onnx", "onnxscript", "onnxruntime", "openvino")

MakePlans = Callable[[Path], tuple[PlanEntry, ...]]
"""Builds plans from an ONNX file, beside it."""

Entry = TypeVar("Entry", NetworkEntry[UNetConfig], ClassifierEntry)


def export_bundle(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    classifier: Checkpoint | None = None,
    precision: Precision = Precision.FP32,
    native_int8: bool = False,
    make_plans: MakePlans | None = None,
    report: cli.Report = logger.info,
) -> Bundle:
    """Make the bundle `out` from a checkpoint, whole or not at all; a bundle of that name is replaced.

    classifier: whose input gradient goes into classifier.onnx beside the network (export.onnx.gradient). precision: of
    a second ONNX file, unet.fp16.onnx for example, and of classifier.fp16.onnx unless it is FP32. native_int8: whether
    unet.int8.json is made, for the CPU engine (export.int8.native_int8). make_plans: called with the path of each file
    in that precision once all are verified. report: told of each step. Raises CheckpointError
    for a classifier in the U-Net's place or one that does not fit it, ExportError for an artefact that cannot be built
    or differs by too much, OutputError for a folder that cannot be written or is no bundle, MissingPackageError without
    onnx.
    """
    _check_packages()
    if classifier is not None:
        check_fit(classifier, checkpoint)
    make_folder(Path(out).absolute().parent)
    files = dict.fromkeys((weights_name(UNET), onnx_name(UNET)), NOTES[Precision.FP32])
    subject = make_subject(checkpoint)
    parts: tuple[Fp32Part, ...] = ()
    typed: Typed | None = None
    with atomic_folder(Path(out), is_bundle) as folder:
        report("writing weights and fp32 ONNX")
        save_weights(checkpoint.weights, folder / weights_name(UNET))
        export_onnx(subject.unet, folder / onnx_name(UNET))
        if precision is not Precision.FP32:
            report(f"writing {precision.value} ONNX")
            parts = choose_fp32_parts(subject, precision)
            typed = write_typed(subject, precision, parts, folder)
            files[typed.file] = NOTES[precision]
        report("verifying against the checkpoint")
        measurements = verify(folder, subject, typed)
        if native_int8:
            report("choosing 8-bit convolutions for the CPU engine")
            choice = choose_int8(subject.unet, subject.cases)
            write_ranges(folder / ranges_name(UNET), choice.ranges)
            measurements = (*measurements, choice.measurement)
            files[ranges_name(UNET)] = describe_int8(choice)
        kept = tuple((part.name, part.reason) for part in parts)
        networks = Networks(NetworkEntry(subject.unet.config, files, kept, verification=measurements))
        if classifier is not None:
            report("exporting the classifier's gradient")
            entry = export_classifier(folder, classifier, subject, typed is not None)
            networks = dataclasses.replace(networks, classifier=entry)
        if make_plans is not None:
            report("building plans")
            networks = _with_plans(networks, folder, precision, make_plans)
        Bundle.write(folder, dataclasses.replace(subject.manifest, networks=networks, versions=_versions(networks)))
    return Bundle.open(out)


def _with_plans(networks: Networks, folder: Path, precision: Precision, make_plans: MakePlans) -> Networks:
    """The same with the plans of every network, built from its ONNX file in a precision.

    A classifier has float16 beside float32 only, and takes it for every precision but FP32.
    """
    unet = _with_plans_of(networks.unet, folder / onnx_name(UNET, precision.value), make_plans)
    if networks.classifier is None:
        return Networks(unet)
    half = "fp32" if precision is Precision.FP32 else "fp16"
    return Networks(unet, _with_plans_of(networks.classifier, folder / onnx_name(CLASSIFIER, half), make_plans))


def _with_plans_of(entry: Entry, onnx: Path, make_plans: MakePlans) -> Entry:
    plans = make_plans(onnx)
    files = {plan.file: f"as {onnx.name}, from which it was built" for plan in plans}
    return dataclasses.replace(entry, plans=plans, files=entry.files | files)


def _versions(networks: Networks) -> dict[str, str]:
    plans = [plan for entry in networks.named().values() for plan in entry.plans]
    return library_versions() | {plan.library: plan.library_version for plan in plans}


def choose_fp32_parts(subject: Subject, precision: Precision) -> tuple[Fp32Part, ...]:
    """What of the network its form in this precision leaves in float32; each decision is logged.

    bf16 has float32's range and eight bits: only its norms and their activations are computed in float32.
    """
    if precision is Precision.BF16:
        return ()
    parts = find_fp32_parts(subject.unet, subject.cases)
    for part in parts:
        logger.info("%s stays in fp32: %s", part.name, part.reason)
    return parts


def write_typed(subject: Subject, precision: Precision, parts: Sequence[Fp32Part], folder: Path) -> Typed:
    """Write the network's ONNX file in a precision other than FP32 into a folder; raises ExportError or OSError."""
    unet = subject.unet
    names = norm_names(unet) if precision is Precision.BF16 else [part.name for part in parts]
    typed = Typed(precision, onnx_name(UNET, precision.value), typed_unet(unet, precision, names))
    export_onnx(typed.unet, folder / typed.file)
    if precision is Precision.INT8:
        quantise(folder / typed.file, unet, subject.cases)
    return typed


def export_onnx(unet: UNet, path: Path) -> None:
    """Write a U-Net as ONNX with a dynamic batch, in the precision of its parameters.

    Inputs x_t [B, C, H, W] float32, and where the network takes them timestep [B] float32, label (as
    engine.networks.config.LabelInput says) and image [B, Cc, H, W] float32; output `out` [B, C', H, W] float32.
    Weights beyond export.onnx.onnx_file.EXTERNAL_DATA_BYTES go to `path`.data.
    Raises ExportError, or OSError where the file cannot be written.
    """
    inputs = _example_inputs(unet.config)
    batch = torch.export.Dim("batch")
    size_bytes = sum(value.numel() * value.element_size() for value in unet.parameters())
    with quiet_exporter():
        try:
            program = torch.onnx.export(
                unet,
                (),
                kwargs=inputs,
                input_names=list(inputs),
                output_names=["out"],
                dynamic_shapes={name: {0: batch} for name in inputs},
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(f"torch {torch.__version__} cannot export this network: {reason}") from error
        assert program is not None
        save_program(program, path, size_bytes)


def library_versions() -> dict[str, str]:
    """Library -> version of what is installed of those that make or run a bundle."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _example_inputs(config: UNetConfig) -> dict[str, Tensor]:
    """Zeros of batch 2; torch.export would take a batch of 0 or 1 as fixed."""
    inputs = {
        "x_t": torch.zeros(2, config.in_channels, *config.image_size),
        "timestep": torch.zeros(2),
    }
    if config.num_classes is not None:
        inputs["label"] = {
            LabelInput.TABLE: lambda: torch.zeros(2, dtype=torch.int64),
            LabelInput.NUMBER: lambda: torch.zeros(2),
            LabelInput.VECTOR: lambda: torch.zeros(2, config.label_channels),
        }[config.label]()
    if config.cond_channels:
        inputs["image"] = torch.zeros(2, config.cond_channels, *config.image_size)
    return inputs


def _check_packages() -> None:
    for package in ("onnx", "onnxscript"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingPackageError(package, "the ONNX export", "onnx") from error


def read_checkpoint(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint of a command line; logs what was assumed. Raises CheckpointError."""
    checkpoint = load_checkpoint(args.checkpoint, **facts_from_arguments(args))
    if checkpoint.is_classifier:
        raise CheckpointError(
            f"{args.checkpoint} is a noise-conditioned classifier; pass the U-Net's checkpoint, and this file with "
            "--classifier"
        )
    for assumption in checkpoint.assumptions:
        logger.info("assumed %s", assumption)
    return checkpoint


def read_classifier(args: argparse.Namespace, checkpoint: Checkpoint) -> Checkpoint | None:
    """The classifier of a command line, None where none is given; raises CheckpointError or RequestError."""
    if args.classifier is None:
        return None
    facts = {"image_size": checkpoint.config.image_size}
    classifier = load_checkpoint(args.classifier, **facts | facts_from_items(args.classifier_fact, "--classifier-fact"))
    for assumption in classifier.assumptions:
        logger.info("classifier: assumed %s", assumption)
    return classifier


EXAMPLES = """examples:
  python -m export.to_onnx assets/digits.pt --image-size 32 --num-head-channels 32 --noise-schedule cosine
  python -m export.to_onnx ema_0.9999_500000.pt --family openai-improved --noise-schedule cosine --out cifar.engine
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = cli.make_parser(
        "export.to_onnx", "Make a verified bundle with fp32 weights and ONNX from a trained checkpoint.", EXAMPLES
    )

    def work(args: argparse.Namespace) -> Bundle:
        checkpoint = read_checkpoint(args)
        classifier = read_classifier(args, checkpoint)
        out = cli.output_folder(args)
        with cli.progress(2 + args.native_int8 + (classifier is not None)) as report:
            return export_bundle(checkpoint, out, classifier=classifier, native_int8=args.native_int8, report=report)

    return cli.run(work, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
