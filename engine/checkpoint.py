"""From a checkpoint file to a Checkpoint: safe reading, the choice of the family's translator, and checks."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.classifier import Classifier
from engine.config import ClassifierConfig, UNetConfig
from engine.errors import CheckpointError, UnknownFamilyError
from engine.facts import Facts, flag, make_facts
from engine.prediction import Diffusion
from engine.safe_pickle import read_torch_file
from engine.unet import UNet

if TYPE_CHECKING:
    from engine.folder import FolderContent


@dataclass(frozen=True, slots=True)
class Assumption:
    """A fact that neither file nor user gave: what was taken instead, and why."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        shown = "x".join(map(str, self.value)) if isinstance(self.value, tuple) else self.value
        return f"{self.name} = {shown} ({self.reason}; change it with {flag(self.name)})"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A trained network in our terms; nothing here depends on the project that trained it.

    weights: float32 tensors under the parameter names of engine.unet.UNet or engine.classifier.Classifier.
    diffusion: schedule, prediction and sampling conventions. assumptions: every default that was taken.
    """

    family: str
    config: UNetConfig | ClassifierConfig
    weights: Mapping[str, Tensor]
    diffusion: Diffusion
    assumptions: tuple[Assumption, ...]
    sha256: str

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.config, ClassifierConfig)

    def unet(self) -> UNet:
        """The fp32 network in evaluation mode, without gradients; raises CheckpointError for a classifier."""
        if not isinstance(self.config, UNetConfig):
            raise CheckpointError("this checkpoint is a classifier; a U-Net checkpoint is needed here")
        return build_unet(self.config, self.weights)

    def classifier(self) -> Classifier:
        """The fp32 classifier in evaluation mode; raises CheckpointError for a U-Net."""
        if not isinstance(self.config, ClassifierConfig):
            raise CheckpointError("this checkpoint is a U-Net; a noise-conditioned classifier is needed here")
        with torch.device("meta"):
            model = Classifier(self.config)
        model.load_state_dict(dict(self.weights), assign=True)
        return model.eval().requires_grad_(False)


def build_unet(config: UNetConfig, weights: Mapping[str, Tensor]) -> UNet:
    """The network with these weights (shared, not copied), in evaluation mode, without gradients."""
    with torch.device("meta"):
        model = UNet(config)
    model.load_state_dict(dict(weights), assign=True)
    return model.eval().requires_grad_(False)


def load_checkpoint(path: str | Path, **facts: Any) -> Checkpoint:
    """Read a training checkpoint of any known family, a file or a folder; its content is never run.

    facts: what the file does not hold, e.g. image_size=(32, 32), noise_schedule="cosine" (engine.facts.Facts lists
    them). Raises CheckpointError for a file that cannot be read or contradicts the facts, and UnknownFamilyError
    with what was found and what each family would have needed.
    """
    from engine.families import FAMILIES

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


@dataclass(frozen=True, slots=True, eq=False)
class Translation:
    """What a family's translator returns: the parts of a Checkpoint that do not come from the file system."""

    family: str
    config: UNetConfig | ClassifierConfig
    weights: dict[str, Tensor]
    diffusion: Diffusion
    assumptions: tuple[Assumption, ...]


class Assumptions:
    """Collects the defaults that a translator takes."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._made: list[Assumption] = []

    def take(self, name: str, default: Any, reason: str) -> Any:
        """The user's fact, or the default, which is then recorded with its reason."""
        given = getattr(self._facts, name)
        if given is not None:
            return given
        self._made.append(Assumption(name, default, reason))
        return default

    def given(self, name: str) -> Any:
        """The user's fact, or None."""
        return getattr(self._facts, name)

    def made(self) -> tuple[Assumption, ...]:
        return tuple(self._made)


def _read_folder(folder: Path, weights: str | None) -> FolderContent:
    from engine.folder import read_folder

    try:
        return read_folder(folder, weights)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror or error}") from error


def read_file(path: Path) -> Any:
    """The content of a checkpoint file as plain data and CPU tensors; raises CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; pass the path of a checkpoint file")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; a file is needed here")
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); copy the checkpoint again")
    try:
        if is_safetensors(path):
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                return load_file(path)
            except SafetensorError as error:
                raise CheckpointError(f"{path} is damaged ({error}); copy the checkpoint again") from error
        return read_torch_file(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def without_wrappers(raw: Any) -> Any:
    """A file's content without the names that torch.compile and DataParallel put before those of the tensors.

    Looks at the dictionary and at the dictionaries in it.
    """
    if not isinstance(raw, Mapping):
        return raw
    return _bare_names({key: _bare_names(value) if isinstance(value, Mapping) else value for key, value in raw.items()})


def _bare_names(content: Mapping[Any, Any]) -> dict[Any, Any]:
    bare = {k.replace("_orig_mod.", "") if isinstance(k, str) else k: v for k, v in content.items()}
    tensors = [str(key) for key, value in bare.items() if isinstance(value, Tensor)]
    while tensors and all(name.startswith("module.") for name in tensors):
        bare = {k.removeprefix("module.") if isinstance(k, str) else k: v for k, v in bare.items()}
        tensors = [name.removeprefix("module.") for name in tensors]
    return bare


def is_safetensors(path: Path) -> bool:
    """Whether a file starts with a safetensors header: a length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
