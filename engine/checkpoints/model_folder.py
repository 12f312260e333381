"""A model folder as diffusers' save_pretrained writes it, read as plain data.

Only files with fixed names inside the folder are opened: no path that a file names is followed out of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.checkpoints.reading import read_file
from engine.checkpoints.unwrapping import without_wrappers
from engine.errors import CheckpointError
from engine.files import file_sha256

_WHOLE = re.compile(r"diffusion_pytorch_model(?:\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)")
_INDEX = re.compile(r"diffusion_pytorch_model\.(?P<kind>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")
_SHARD = re.compile(r"diffusion_pytorch_model[\w.-]*\.(?:safetensors|bin)")

_MOST_JSON_BYTES = 16 * 2**20
"""A schedule of 4000 betas is 0.1 MB, an index of the largest networks 1 MB."""

RAW_VARIANT = "non_ema"
"""The name under which diffusers' users keep raw weights beside averaged ones."""


@dataclass(frozen=True, slots=True, eq=False)
class FolderContent:
    """JSON objects and tensors of a model folder.

    unet_config: config.json of the network. scheduler_config, pipeline: scheduler_config.json and model_index.json,
    None where there is none. tensors: all weights. sha256: over the names and contents of the files that were read.
    """

    unet_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any] | None
    pipeline: Mapping[str, Any] | None
    tensors: Mapping[str, Tensor]
    sha256: str


def is_model_folder(folder: Path) -> bool:
    """Whether a folder has the config of a network and is no bundle."""
    has_config = any((folder / name / "config.json").is_file() for name in ("", "unet", "unet_ema"))
    return has_config and not (folder / "manifest.json").exists()


def read_folder(folder: Path, weights: str | None = None) -> FolderContent:
    """The content of a model or pipeline folder; weights: "raw" takes those that were not averaged.

    The network is in unet_ema/ (not for raw), in unet/ or in the folder itself. Raises CheckpointError.
    """
    reader = _Reader(folder)
    names = ("unet/", "") if weights == "raw" else ("unet_ema/", "unet/", "")
    place = next((name for name in names if reader.has(f"{name}config.json")), None)
    if place is None:
        raise CheckpointError(_no_model(folder))
    files = reader.weight_files(place, weights)
    has_choice = RAW_VARIANT in files[0].name or (place == "unet/" and reader.has("unet_ema/config.json"))
    if weights == "raw" and not has_choice:
        raise CheckpointError(f"{folder} holds one set of weights, not averaged and raw ones; leave --weights out")
    tensors: dict[str, Tensor] = {}
    for path in files:
        tensors |= _tensors(path)
    schedule = next((name for name in ("scheduler/", "") if reader.has(f"{name}scheduler_config.json")), None)
    return FolderContent(
        unet_config=reader.json(f"{place}config.json"),
        scheduler_config=None if schedule is None else reader.json(f"{schedule}scheduler_config.json"),
        pipeline=reader.json("model_index.json") if reader.has("model_index.json") else None,
        tensors=tensors,
        sha256=reader.sha256(),
    )


class _Reader:
    """Opens files of one folder by fixed names and remembers them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._opened = folder, set[str]()

    def has(self, name: str) -> bool:
        return (self._folder / name).is_file()

    def path(self, name: str) -> Path:
        """Where a file lies; raises CheckpointError for a missing one or a link that leaves the folder."""
        path = self._folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; copy the folder again")
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, outside the folder; copy the folder with its links resolved "
                "(cp -rL)"
            )
        self._opened.add(name)
        return path

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object; raises CheckpointError."""
        path = self.path(name)
        if path.stat().st_size > _MOST_JSON_BYTES:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes; a configuration has far fewer")
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} is no valid JSON ({error}); copy the folder again") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds a {type(content).__name__}, not a JSON object; copy the folder again")
        return content

    def weight_files(self, place: str, weights: str | None) -> tuple[Path, ...]:
        """The file or the shards under `place`: safetensors before bin, plain names before the only variant."""
        found = list(self._weight_names(place))
        variants = {variant for variant, _, _ in found}
        if not found:
            raise CheckpointError(
                f"{self._folder / place} holds no diffusion_pytorch_model.safetensors or .bin; copy the weights as well"
            )
        others = sorted(v for v in variants if v not in (None, RAW_VARIANT))
        if weights == "raw" and RAW_VARIANT in variants:
            chosen: str | None = RAW_VARIANT
        elif None in variants:
            chosen = None
        elif len(others) > 1:
            raise CheckpointError(
                f"{self._folder / place} holds the variants {', '.join(others)} and no plain "
                "diffusion_pytorch_model.safetensors; pass a folder with one of them"
            )
        else:
            chosen = others[0] if others else RAW_VARIANT
        order = {"safetensors": 0, "bin": 2}
        name = min((order[kind] + name.endswith(".json"), name) for v, kind, name in found if v == chosen)[1]
        if not name.endswith(".json"):
            return (self.path(place + name),)
        return tuple(self.path(place + shard) for shard in self._shards(place + name))

    def _weight_names(self, place: str) -> Iterator[tuple[str | None, str, str]]:
        """(variant, kind, name) of every whole weight file and every index of shards."""
        for path in sorted((self._folder / place).iterdir()):
            match = _WHOLE.fullmatch(path.name) or _INDEX.fullmatch(path.name)
            if match:
                yield match["variant"], match["kind"], path.name

    def _shards(self, index: str) -> list[str]:
        listed = self.json(index).get("weight_map")
        names = set(listed.values()) if isinstance(listed, dict) else set()
        wrong = [name for name in names if not isinstance(name, str) or not _SHARD.fullmatch(name)]
        if not names or wrong:
            got = repr(wrong[0]) if wrong else "none"
            raise CheckpointError(
                f"{self._folder / index} must list files named diffusion_pytorch_model-....safetensors or .bin beside "
                f"it in weight_map, got {got}"
            )
        return sorted(names)

    def sha256(self) -> str:
        """Hex sha256 over name and content of each file that was opened, in the order of names."""
        lines = (f"{name}\0{file_sha256(self._folder / name)}\n" for name in sorted(self._opened))
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def _tensors(path: Path) -> dict[str, Tensor]:
    content = without_wrappers(read_file(path))
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} is no dictionary of tensors; it is not what save_pretrained writes")
    return {str(name): value for name, value in content.items()}


def _no_model(folder: Path) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    if "manifest.json" in names:
        return (
            f"{folder} is a bundle, which was already made from a checkpoint; pass the checkpoint itself, or use the "
            "bundle with python -m engine sample"
        )
    found = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "") if names else "nothing"
    return (
        f"{folder} is a folder without config.json or unet/config.json (found: {found}); pass a checkpoint file, or a "
        "folder that diffusers' save_pretrained wrote"
    )
