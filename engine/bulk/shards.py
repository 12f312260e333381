"""One shard of a large set of images as a file or folder, and all shards as one samples.npz.

    npz   shard-00003.npz: arr_0 uint8 [m, H, W, C], arr_1 int64 [m] labels where there are any, seeds uint64 [m]
    png   shard-00003/: one 000768.png an image, and shard.csv with the columns index, seed, label

The same content gives the same bytes on any day: the entries of a zip carry a fixed date.
"""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError
from engine.files import atomic_folder, atomic_path
from engine.images import Bytes, save_images

FORMATS = ("npz", "png")
_TABLE = "shard.csv"
# The earliest date that a zip can hold.
_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Shard:
    """What one shard has to hold: its number, the number of its first image, and a seed and label an image.

    labels: None where nothing is labelled. shape: (H, W, C) of an image.
    """

    number: int
    start: int
    seeds: tuple[int, ...]
    labels: tuple[int, ...] | None
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def images_shape(self) -> tuple[int, int, int, int]:
        """[m, H, W, C]."""
        return (len(self), *self.shape)

    def path(self, folder: Path, file_format: str) -> Path:
        """Where the whole shard lies in the folder of a run."""
        return folder / shard_name(self.number, file_format)


def shard_name(number: int, file_format: str) -> str:
    """The file name of a shard, or its folder's for PNG files."""
    return f"shard-{number:05d}{'.npz' if file_format == 'npz' else ''}"


def write_shard(folder: Path, shard: Shard, images: Bytes, file_format: str) -> Path:
    """Write a shard's images, uint8 [m, H, W, C], under its final name at once; a damaged one there is replaced.

    Returns that path. Raises OutputError if it cannot be written, a full disk say, and RequestError for a PNG of
    other than 1 or 3 channels; then nothing is left behind.
    """
    path = shard.path(folder, file_format)
    if file_format == "npz":
        with atomic_path(path) as temp, _npz(temp) as archive:
            _add(archive, "arr_0", images)
            if shard.labels is not None:
                _add(archive, "arr_1", np.array(shard.labels, dtype=np.int64))
            _add(archive, "seeds", np.array(shard.seeds, dtype=np.uint64))
        return path
    # Only a name that belongs to this run gets here, so whatever bears it is a shard of this run.
    with atomic_folder(path, is_ours=lambda _: True) as temp:
        save_images(temp, images, range(shard.start, shard.start + len(shard)))
        (temp / _TABLE).write_text(_table(shard), encoding="utf-8")
    return path


def read_shard(folder: Path, shard: Shard, file_format: str) -> Bytes | None:
    """The images of a shard, uint8 [m, H, W, C]; None where it is missing, damaged or holds something else.

    Every byte is read: an npz carries a checksum an array, a PNG one a chunk, and seeds and labels are compared.
    """
    path = shard.path(folder, file_format)
    try:
        return _read_npz(path, shard) if file_format == "npz" else _read_png(path, shard)
    except (OSError, ValueError, KeyError, EOFError, SyntaxError, zipfile.BadZipFile, zlib.error):
        # What the readers of zip, npy and PNG raise for bytes that are none.
        return None


def merge_shards(folder: Path, shards: Iterable[Shard], file_format: str) -> Path:
    """Write samples.npz with arr_0 uint8 [n, H, W, C] and arr_1 int64 [n] (where labelled), as guided-diffusion does.

    One shard is in memory at a time. Its evaluator reads the file as it is. Raises RequestError for a shard that is
    missing or damaged, and OutputError if the file cannot be written.
    """
    whole = list(shards)
    path = folder / "samples.npz"
    with atomic_path(path) as temp, _npz(temp) as archive:
        shape = (sum(len(shard) for shard in whole), *whole[0].shape)
        with _entry(archive, "arr_0") as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(entry, header)
            for shard in whole:
                images = read_shard(folder, shard, file_format)
                if images is None:
                    raise RequestError(
                        f"{shard.path(folder, file_format)} is missing or damaged; run the same command again, which "
                        "makes the shard anew"
                    )
                entry.write(images.data)
        labels = [label for shard in whole for label in shard.labels or ()]
        if labels:
            _add(archive, "arr_1", np.array(labels, dtype=np.int64))
    return path


def _table(shard: Shard) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "seed", "label"])
    for i, seed in enumerate(shard.seeds):
        writer.writerow([shard.start + i, seed, "" if shard.labels is None else shard.labels[i]])
    return text.getvalue()


def _read_npz(path: Path, shard: Shard) -> Bytes | None:
    with zipfile.ZipFile(path) as archive:
        expected: dict[str, Any] = {"seeds": np.array(shard.seeds, dtype=np.uint64)}
        if shard.labels is not None:
            expected["arr_1"] = np.array(shard.labels, dtype=np.int64)
        if {f"{name}.npy" for name in ("arr_0", *expected)} != set(archive.namelist()):
            return None
        for name, array in expected.items():
            stored = _read_array(archive, name)
            if stored.dtype != array.dtype or not np.array_equal(stored, array):
                return None
        images = _read_array(archive, "arr_0")
    return images if images.dtype == np.uint8 and images.shape == shard.images_shape else None


def _read_array(archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    # The whole entry, because a zip checks its checksum at the end of one only.
    content = io.BytesIO(archive.read(f"{name}.npy"))
    return np.lib.format.read_array(content, allow_pickle=False)


def _read_png(path: Path, shard: Shard) -> Bytes | None:
    from PIL import Image

    names = [f"{shard.start + i:06d}.png" for i in range(len(shard))]
    if {*names, _TABLE} != {entry.name for entry in path.iterdir()}:
        return None
    if (path / _TABLE).read_text(encoding="utf-8") != _table(shard):
        return None
    images = np.empty(shard.images_shape, dtype=np.uint8)
    for image, name in zip(images, names, strict=True):
        with Image.open(path / name) as picture:
            # Decoding stops at the last pixel; what follows it, verify() reads too, but only on a file not yet read.
            picture.verify()
        with Image.open(path / name) as picture:
            pixels = np.asarray(picture)
        if pixels.size != image.size or pixels.dtype != np.uint8 or pixels.shape[:2] != image.shape[:2]:
            return None
        image[...] = pixels.reshape(image.shape)
    return images


@contextmanager
def _npz(path: Path) -> Iterator[zipfile.ZipFile]:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        yield archive


@contextmanager
def _entry(archive: zipfile.ZipFile, name: str) -> Iterator[IO[bytes]]:
    with archive.open(zipfile.ZipInfo(f"{name}.npy", _DATE), "w", force_zip64=True) as entry:
        yield entry


def _add(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    with _entry(archive, name) as entry:
        np.lib.format.write_array(entry, np.ascontiguousarray(array), allow_pickle=False)
