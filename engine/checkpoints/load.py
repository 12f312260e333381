"""From a checkpoint file to a Checkpoint: safe reading, the choice of the family's translator, and checks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.facts import make_facts
from engine.checkpoints.families.translators import FAMILIES
from engine.checkpoints.model_folder import FolderContent, read_folder
from engine.checkpoints.reading import read_file
from engine.checkpoints.types import Checkpoint
from engine.checkpoints.unwrapping import without_wrappers
from engine.errors import CheckpointError, UnknownFamilyError
from engine.files import file_sha256
from engine.networks.classifier import Classifier
from engine.networks.config import ClassifierConfig, UNetConfig
from engine.networks.unet import UNet


def load_checkpoint(path: str | Path, **facts: Any) -> Checkpoint:
    """Read a training checkpoint of any known family, a file or a folder; its content is never run.

    path: of the file or folder. facts: what it does not hold, e.g. image_size=(32, 32), noise_schedule="cosine"
    (engine.checkpoints.facts.Facts lists them). Raises CheckpointError for a file that cannot be read or contradicts
    the facts, and UnknownFamilyError with what was found and what each family would have needed.
    """
    source = Path(path)
    said = make_facts(facts)
    raw = _read_folder(source, said.weights) if source.is_dir() else without_wrappers(read_file(source))
    known = ", ".join(name for family in FAMILIES for name in family.NAMES)
    if said.family is not None and all(said.family not in family.NAMES for family in FAMILIES):
        raise CheckpointError(f"unknown family {said.family!r}; known: {known}")
    for family in FAMILIES:
        if (said.family is None or said.family in family.NAMES) and family.matches(raw):
            translation = family.translate(raw, said)
            _check_weights(translation.config, translation.weights)
            return Checkpoint(
                family=translation.family,
                config=translation.config,
                weights=translation.weights,
                diffusion=translation.diffusion,
                assumptions=translation.assumptions,
                sha256=raw.sha256 if source.is_dir() else file_sha256(source),
            )
    needed = "\n".join(f"  {'/'.join(family.NAMES)}: {family.NEEDS}" for family in FAMILIES)
    raise UnknownFamilyError(
        f"{source} is no checkpoint of a known family.\nfound: {_describe(raw)}\nneeded:\n{needed}"
    )


def _read_folder(folder: Path, weights: str | None) -> FolderContent:
    try:
        return read_folder(folder, weights)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error


def _check_weights(config: UNetConfig | ClassifierConfig, weights: Mapping[str, Tensor]) -> None:
    with torch.device("meta"):
        model = UNet(config) if isinstance(config, UNetConfig) else Classifier(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights or tuple(weights[name].shape) != shape:
            got = tuple(weights[name].shape) if name in weights else "nothing"
            raise CheckpointError(f"weights do not fit the network: {name} needs shape {shape}, got {got}")
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            count = int((~torch.isfinite(value)).sum())
            raise CheckpointError(
                f"{name} holds {count} NaN or infinite values of {value.numel()}; the training diverged or the file is "
                "damaged: use an earlier checkpoint"
            )


def _describe(raw: Any) -> str:
    if hasattr(raw, "unet_config"):
        return f"a folder with config.json of a {raw.unet_config.get('_class_name', 'network without a class name')}"
    if not isinstance(raw, Mapping):
        return f"an object of type {type(raw).__name__}, not a dictionary"
    keys = [str(key) for key in raw]
    shown = ", ".join(keys[:8])
    return f"{len(keys)} keys: {shown}{', ...' if len(keys) > 8 else ''}" if keys else "an empty dictionary"
