"""Sets of images that samples are compared with: an .npz, or a folder of PNG files; and forms of their pixels."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.errors import RequestError
from engine.images import Bytes
from judging.metrics import Moments

Labels = npt.NDArray[np.int64]

INCEPTION_FEATURES = 2048


@dataclass(frozen=True, slots=True, eq=False)
class ImageSet:
    """images: uint8 [N, H, W, C], with labels [N] where they are known.

    pooled: moments of InceptionV3's features that the file holds, perhaps of more images than it does, as in
    guided-diffusion's reference batches, or without any image.
    """

    name: str
    images: Bytes | None = None
    labels: Labels | None = None
    pooled: Moments | None = None


def in_turn(images: ImageSet, count: int) -> ImageSet:
    """Up to count images of a set with labels, classes in turn: the first of each class, the second of each, ..."""
    assert images.images is not None
    assert images.labels is not None
    rank = np.zeros(len(images.labels), dtype=np.int64)
    for label in np.unique(images.labels):
        rows = np.flatnonzero(images.labels == label)
        rank[rows] = np.arange(len(rows))
    order = np.lexsort((images.labels, rank))[:count]
    return ImageSet(images.name, images.images[order], images.labels[order])


def read_images(path: Path) -> ImageSet:
    """An .npz in guided-diffusion's layout or a folder of PNG files; raises RequestError for anything else."""
    found = _read_folder(path) if path.is_dir() else _read_npz(path)
    images, labels = found.images, found.labels
    if images is None and found.pooled is None:
        raise RequestError(f"{path} holds neither arr_0 (images) nor mu and sigma (statistics); pass another file")
    if images is not None and (
        images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) < 2
    ):
        raise RequestError(
            f"{path}: arr_0 is {images.dtype} {list(images.shape)}; expected uint8 [n, H, W, C], n 2 or more, C 1 or 3"
        )
    if labels is not None and (images is None or labels.shape != images.shape[:1]):
        raise RequestError(f"{path}: arr_1 has shape {list(labels.shape)}; expected a label for each image")
    return found


def _read_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays: Mapping[str, npt.NDArray[Any]] = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise RequestError(
            f"{path} cannot be read as an .npz ({error}); pass an .npz with arr_0, uint8 [n, H, W, C], or with mu and "
            "sigma, or a folder of PNG files"
        ) from error
    labels = arrays.get("arr_1")
    return ImageSet(
        path.name, arrays.get("arr_0"), None if labels is None else labels.astype(np.int64), _moments(path, arrays)
    )


def _moments(path: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> Moments | None:
    if "mu" not in arrays or "sigma" not in arrays:
        return None
    mean, covariance = arrays["mu"], arrays["sigma"]
    if mean.shape != (INCEPTION_FEATURES,) or covariance.shape != (INCEPTION_FEATURES, INCEPTION_FEATURES):
        raise RequestError(
            f"{path}: mu and sigma have shapes {list(mean.shape)} and {list(covariance.shape)}; expected "
            f"{INCEPTION_FEATURES} means and their covariances, of InceptionV3's features"
        )
    return Moments(torch.from_numpy(mean).double(), torch.from_numpy(covariance).double())


def _read_folder(path: Path) -> ImageSet:
    from PIL import Image, UnidentifiedImageError

    files = sorted(path.glob("*.png"))
    if len(files) < 2:
        raise RequestError(f"{path} holds {len(files)} PNG files; expected 2 or more")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
        except (UnidentifiedImageError, OSError) as error:
            raise RequestError(f"{file} cannot be read as a PNG ({error}); remove it or copy it again") from error
        pictures.append(pixels.reshape(*pixels.shape[:2], -1))
        if pictures[-1].shape != pictures[0].shape:
            raise RequestError(
                f"{file} is {list(pictures[-1].shape)} and {files[0].name} {list(pictures[0].shape)} (height, width, "
                "channels); expected images of one size"
            )
    return ImageSet(path.name, np.stack(pictures))


def as_rgb(images: Bytes) -> Bytes:
    """[N, H, W, 3]: grey images [N, H, W, 1] three times, as readers of RGB want them."""
    return np.broadcast_to(images, (*images.shape[:3], 3)).copy()


def as_floats(images: Bytes) -> Tensor:
    """float32 [N, C, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def as_bytes(images: Tensor) -> Bytes:
    """uint8 [N, H, W, C] of images [N, C, H, W] in [-1, 1] that were made of bytes: the inverse of as_floats()."""
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()
