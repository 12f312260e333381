"""A bundle's folder: written once, opened and checked from then on.

Opening reads the manifest, checks its hash and that the folder holds the files that it lists and no others; a file's
own hash is checked when the file is asked for. Opening never writes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle.file_names import CLASSIFIER, MANIFEST, UNET, onnx_data_name, onnx_name, ranges_name
from engine.bundle.manifest import FORMAT_VERSION, FileEntry, Manifest
from engine.errors import BundleError, ConfigError
from engine.files import file_sha256
from engine.json_form import decode, encode

_REBUILD = "build it again with: python -m export.to_trt CHECKPOINT"
_VERSION, _DIGEST = "format_version", "manifest_sha256"


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check a bundle's manifest and list of files.

        Raises BundleError, with the remedy, for a folder that is no bundle, is damaged, holds a file that its manifest
        does not list, or was made by another version.
        """
        folder = Path(path)
        bundle = cls(folder, _read_manifest(folder))
        bundle._check_lists()
        return bundle

    @classmethod
    def write(cls, path: Path, manifest: Manifest) -> Bundle:
        """Make a folder with its files a bundle: hash every file, and write the manifest with those hashes.

        Whoever wants it whole or not at all passes a temporary folder and renames it. Raises ConfigError for a number
        that is not finite, and OSError.
        """
        entries = {
            file.name: FileEntry(file_sha256(file), file.stat().st_size)
            for file in sorted(path.iterdir())
            if file.name != MANIFEST
        }
        full = dataclasses.replace(manifest, files=entries)
        data = manifest_form(full)
        text = json.dumps(data | {_DIGEST: _digest(data)}, indent=1, allow_nan=False)
        (path / MANIFEST).write_text(text + "\n", encoding="utf-8")
        return cls(path, full)

    def has(self, name: str) -> bool:
        """Whether the bundle holds a file of this name."""
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """The path of a file of the bundle after its hash was checked; raises BundleError.

        An ONNX file's external weights are checked with it.
        """
        if self.has(onnx_data_name(name)):
            self.file(onnx_data_name(name))
        entry = self.manifest.files.get(name)
        if entry is None:
            raise BundleError(f"{self.path} holds no {name}; {_REBUILD}")
        path = self.path / name
        if not path.is_file() or path.is_symlink():
            raise BundleError(f"{path} is missing although the manifest lists it; {_REBUILD}")
        if path.stat().st_size != entry.size_bytes or file_sha256(path) != entry.sha256:
            raise BundleError(
                f"{path} was changed after it was built (its sha256 differs from the manifest's); {_REBUILD}"
            )
        return path

    def verify(self) -> None:
        """Check every file's hash; raises BundleError at the first that differs."""
        for name in self.manifest.files:
            self.file(name)

    def _check_lists(self) -> None:
        """Raise BundleError unless networks, manifest and folder list the same files; file() tells of a missing one."""
        listed = self.manifest.files
        for name in listed:
            if Path(name).name != name or name in ("", ".", ".."):
                raise BundleError(
                    f"{self.path}: the manifest lists the path {name!r} outside the bundle; do not use it"
                )
        for network, entry in self.manifest.networks.named().items():
            for name in (*entry.files, *(plan.file for plan in entry.plans)):
                if name not in listed:
                    raise BundleError(f"{self.path}: {network} is said to have {name}, which is not listed; {_REBUILD}")
        for path in sorted(self.path.iterdir()):
            if path.name not in listed and path.name != MANIFEST:
                raise BundleError(f"{path} is not listed in the bundle's manifest; remove it, or {_REBUILD}")


def is_bundle(path: Path) -> bool:
    """Whether a folder holds a bundle's manifest."""
    return (path / MANIFEST).is_file()


def manifest_form(manifest: Manifest) -> dict[str, Any]:
    """What manifest.json holds of a manifest, without its own hash."""
    return {_VERSION: FORMAT_VERSION} | encode(manifest)


def manifest_sha256(manifest: Manifest) -> str:
    """The hash that manifest.json holds of itself, in hex."""
    return _digest(manifest_form(manifest))


def _read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; raises BundleError with the remedy."""
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is not a folder; pass a bundle, or make one with: python -m export.to_trt CHECKPOINT"
        )
    if not is_bundle(folder):
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST}; {_REBUILD}")
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, digest = data[_VERSION], data.pop(_DIGEST)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BundleError(f"{folder / MANIFEST} is damaged ({error}); {_REBUILD}") from error
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise BundleError(
            f"{folder} was made by an earlier version (format {version}, this version reads {FORMAT_VERSION}); make it "
            f"anew from the checkpoint of sha256 {data.get('checkpoint_sha256')} with: {_command_anew(folder, data)}"
        )
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise BundleError(
            f"{folder} was made by a newer version (format {version}, this version reads {FORMAT_VERSION}); "
            "upgrade with: pip install -U unet-rt"
        )
    if digest != _digest(data):
        raise BundleError(f"{folder / MANIFEST} was changed after it was written; {_REBUILD}")
    del data[_VERSION]
    try:
        return decode(data, Manifest)
    except ConfigError as error:
        raise BundleError(f"{folder / MANIFEST} is wrong or incomplete: {error}; {_REBUILD}") from error


def _command_anew(folder: Path, data: dict[str, Any]) -> str:
    """The command that makes a bundle of format 1 as it was; what was told of the checkpoint is not in it."""
    files = data.get("files", {})
    is_plain = not data.get("plans") and onnx_name(UNET, "fp16") not in files
    words = ["python -m", "export.to_onnx" if is_plain else "export.to_trt", "CHECKPOINT", "--out", str(folder)]
    words += ["--native-int8"] if ranges_name(UNET) in files else []
    words += ["--classifier FILE"] if onnx_name(CLASSIFIER) in files else []
    return " ".join([*words, "and the options that it was made with"])


def _digest(data: dict[str, Any]) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
