"""A bundle's folder: opened, checked, and given its manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle.manifest import FORMAT_VERSION, MANIFEST_NAME, FileEntry, Manifest
from engine.errors import BundleError, ConfigError
from engine.files import file_sha256

_REBUILD = "build it again with: python -m export.to_trt CHECKPOINT"


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """An opened bundle: its folder and its manifest."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read and check the manifest; raises BundleError for a folder that is none, damaged or too new."""
        folder = Path(path)
        return cls(folder, read_manifest(folder))

    def has(self, name: str) -> bool:
        return name in self.manifest.files

    def file(self, name: str) -> Path:
        """The path of a file of the bundle after its hash was checked; raises BundleError.

        An ONNX file's external weights, in the file NAME.data beside it, are checked with it.
        """
        if self.has(f"{name}.data"):
            self.file(f"{name}.data")
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


def is_bundle(path: Path) -> bool:
    """Whether a folder holds a bundle's manifest."""
    return (path / MANIFEST_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; raises BundleError with the remedy."""
    if not folder.is_dir():
        raise BundleError(
            f"{folder} is not a folder; pass a bundle, or make one with: python -m export.to_trt CHECKPOINT"
        )
    if not is_bundle(folder):
        raise BundleError(f"{folder} is no bundle: it has no {MANIFEST_NAME}; {_REBUILD}")
    try:
        data = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
        version, digest = data["format_version"], data.pop("manifest_sha256")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise BundleError(f"{folder / MANIFEST_NAME} is damaged ({error}); {_REBUILD}") from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise BundleError(
            f"{folder} was made by a newer version (format {version}, this version reads up to {FORMAT_VERSION}); "
            "upgrade with: pip install -U unet-rt"
        )
    if digest != _manifest_digest(data):
        raise BundleError(f"{folder / MANIFEST_NAME} was changed after it was written; {_REBUILD}")
    try:
        manifest = Manifest.from_dict(data)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ConfigError) as error:
        raise BundleError(f"{folder / MANIFEST_NAME} is incomplete ({error!r}); {_REBUILD}") from error
    for name in manifest.files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise BundleError(f"{folder}: the manifest lists the path {name!r} outside the bundle; do not use it")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash every file in the folder, write manifest.json, and return the manifest with those hashes.

    The caller writes into a temporary folder and renames it when whole.
    """
    entries = {
        path.name: FileEntry(file_sha256(path), path.stat().st_size)
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME
    }
    full = dataclasses.replace(manifest, files=entries)
    data = full.to_dict()
    text = json.dumps(data | {"manifest_sha256": _manifest_digest(data)}, indent=1, allow_nan=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8")
    return full


def _manifest_digest(data: dict[str, Any]) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
