"""python -m engine info: what a bundle or a checkpoint is."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

from engine.bundle.bundle_folder import Bundle, manifest_form
from engine.bundle.file_names import UNET
from engine.bundle.manifest import Manifest, Measurement
from engine.checkpoints.facts import facts_from_arguments, flag
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.model_folder import is_model_folder
from engine.checkpoints.types import Checkpoint
from engine.cli.command import table
from engine.diffusion.prediction import Diffusion
from engine.errors import RequestError
from engine.json_form import encode
from engine.networks.config import ClassifierConfig, LabelInput, UNetConfig


def info(args: argparse.Namespace) -> None:
    """Describe a bundle (a folder) or a checkpoint (a file, or a model folder)."""
    if args.path.is_dir() and not is_model_folder(args.path):
        bundle = Bundle.open(args.path)
        if args.verify:
            bundle.verify()
        if args.json:
            print(json.dumps(manifest_form(bundle.manifest) | {"verified": bool(args.verify)}))
        else:
            print(_describe_bundle(bundle, bool(args.verify)))
        return
    if args.verify:
        raise RequestError(f"--verify checks a bundle's files; {args.path} is a checkpoint")
    checkpoint = load_checkpoint(args.path, **facts_from_arguments(args))
    if args.json:
        print(json.dumps(_checkpoint_dict(checkpoint)))
    else:
        print(_describe_checkpoint(checkpoint))


def _checkpoint_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "family": checkpoint.family,
        "kind": "classifier" if checkpoint.is_classifier else "unet",
        "config": encode(checkpoint.config),
        "diffusion": encode(checkpoint.diffusion),
        "assumptions": [[a.name, a.value, a.reason] for a in checkpoint.assumptions],
        "sha256": checkpoint.sha256,
        "parameters": sum(w.numel() for w in checkpoint.weights.values()),
    }


def _describe_checkpoint(checkpoint: Checkpoint) -> str:
    parameters = sum(w.numel() for w in checkpoint.weights.values())
    lines = [f"{checkpoint.family} {'classifier' if checkpoint.is_classifier else 'U-Net'}"]
    lines += [
        *_network_lines(checkpoint.config),
        f"parameters   {parameters:,}",
        *_diffusion_lines(checkpoint.diffusion),
    ]
    lines.append(f"sha256       {checkpoint.sha256}")
    return "\n".join(lines + _assumption_lines([(a.name, a.value, a.reason) for a in checkpoint.assumptions]))


def _describe_bundle(bundle: Bundle, verified: bool) -> str:
    m: Manifest = bundle.manifest
    lines = [f"bundle of {m.family}", *_network_lines(m.unet.config), *_diffusion_lines(m.diffusion)]
    lines.append(f"checkpoint   sha256 {m.checkpoint_sha256}")
    lines += _assumption_lines(m.assumptions)
    if m.classifier is not None:
        lines.append(
            f"classifier   of {m.classifier.config.num_classes} classes, sha256 {m.classifier.checkpoint_sha256}"
        )
        lines += _assumption_lines(m.classifier.assumptions)
    lines.append("files" + (" (all hashes are right)" if verified else ""))
    lines += [f"  {name}  {entry.size_bytes:,} bytes" for name, entry in m.files.items()]
    for name, entry in m.networks.named().items():
        for plan in entry.plans:
            lines.append(f"  {plan.file}: {plan.library} {plan.library_version}, {', '.join(plan.targets)}")
        lines += [f"  {file}: {note}" for file, note in entry.files.items()]
        lines += [f"  {part} stays in fp32: {reason}" for part, reason in entry.fp32_parts]
        if entry.verification:
            what = {UNET: "U-Net"}.get(name, name)
            lines += [f"verification against the fp32 {what}", measurement_table(entry.verification)]
    return "\n".join(lines)


def measurement_table(measurements: tuple[Measurement, ...]) -> str:
    """Verification results as aligned text."""
    header = ("artefact", "run by", "precision", "max error", "rms error", "rms / output rms", "limit", "worst layer")
    rows = [
        (
            m.artefact,
            m.runner,
            m.precision,
            f"{m.max_abs:.2e}",
            f"{m.rms:.2e}",
            f"{m.relative:.2e}",
            f"{m.limit:.0e}",
            f"{m.worst_layer} ({m.worst_layer_error:.1e})" if m.worst_layer_error is not None else "-",
        )
        for m in measurements
    ]
    return table(header, rows)


def _network_lines(config: UNetConfig | ClassifierConfig) -> list[str]:
    height, width = config.image_size
    counts = Counter(type(block).__name__ for block in config.blocks)
    shown = ", ".join(f"{count} {name}" for name, count in counts.items() if name not in ("Push", "Pop"))
    lines = [f"image        {config.in_channels} x {height} x {width}", f"blocks       {shown}"]
    if isinstance(config, UNetConfig):
        lines.append(f"output       {config.out_channels} channels")
        if config.cond_channels:
            place = "in front of" if config.cond_first else "behind"
            lines.append(f"condition    {config.cond_channels} channels, concatenated {place} x_t")
    if isinstance(config, UNetConfig) and config.label is LabelInput.VECTOR:
        lines.append(f"labels       vectors of {config.label_channels} numbers")
    elif config.num_classes is not None:
        null = getattr(config, "null_class", None)
        lines.append(
            f"classes      {config.num_classes}" + (f", of which {null} means none" if null is not None else "")
        )
    return lines


def _diffusion_lines(diffusion: Diffusion) -> list[str]:
    s = diffusion.schedule
    clip = "not limited" if diffusion.clip is None else f"limited to +-{diffusion.clip:g}"
    if diffusion.percentile is not None:
        clip += f" by dynamic thresholding at percentile {diffusion.percentile:g}"
    return [
        f"schedule     {len(s)} steps, beta {s.betas[0]:.3g} to {s.betas[-1]:.3g}, "
        f"last alphas_cumprod {s.alphas_cumprod[-1]:.3g}",
        f"predicts     {diffusion.prediction.value}, variance {diffusion.variance.value}, x0 {clip}, "
        f"timestep scale {diffusion.timestep_scale:g}",
    ]


def _assumption_lines(assumptions: Any) -> list[str]:
    if not assumptions:
        return []
    shown = [f"  {name} = {value}: {reason} ({flag(name)})" for name, value, reason in assumptions]
    return ["assumed, because the file does not say", *shown]
