"""Finished images: [-1, 1] floats to bytes, grids, PNG files and the .npz that evaluators read.

Byte images are uint8 [n, H, W, C] with C = 1 (grey) or C = 3 (RGB); every file is written whole or not at
all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.errors import RequestError
from engine.files import atomic_path, make_folder

Bytes = npt.NDArray[np.uint8]


def to_uint8(images: Tensor | npt.NDArray[np.floating]) -> Bytes:
    """Byte images [n, H, W, C] of images [n, C, H, W] in [-1, 1]; what lies outside is clipped.

    trunc(clip((x + 1) * 127.5, 0, 255)) in float32: it truncates and does not round, exactly as
    image_sample.py of guided-diffusion, so that its evaluator sees the bytes it would have written itself.
    Raises RequestError for another number of axes, an integer dtype and NaN.
    """
    array = images.detach().float().cpu().numpy() if isinstance(images, Tensor) else images
    if array.ndim != 4 or not np.issubdtype(array.dtype, np.floating):
        raise RequestError(f"images are {array.dtype} {list(array.shape)}; expected floats [n, C, H, W]")
    broken = np.isnan(array).any(axis=(1, 2, 3))
    if broken.any():
        raise RequestError(
            f"{broken.sum()} of {len(array)} images hold NaN, the first is image {broken.argmax()}; "
            "the network overflowed: sample with precision fp32"
        )
    scaled = (array.astype(np.float32) + np.float32(1)) * np.float32(127.5)
    return np.ascontiguousarray(scaled.clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def grid(images: Bytes, columns: int, enlarge: int = 1) -> Bytes:
    """One image [rows*H*enlarge, columns*W*enlarge, C]; image i is in row i // columns, column i % columns.

    images: uint8 [n, H, W, C]. No gaps; each pixel becomes enlarge x enlarge pixels; places without an image
    are 0. Raises RequestError for no images, another layout, and columns or enlarge below 1.
    """
    _check_bytes(images, "[n, H, W, C]")
    for name, value in (("columns", columns), ("enlarge", enlarge), ("number of images", len(images))):
        if value < 1:
            raise RequestError(f"a grid's {name} is {value}; expected at least 1")
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    cells[:n] = images
    table = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    whole = table.reshape(rows * height, columns * width, channels)
    return whole.repeat(enlarge, axis=0).repeat(enlarge, axis=1)


def check_png_channels(channels: int) -> None:
    """Raises RequestError for images that no PNG can hold."""
    if channels not in (1, 3):
        raise RequestError(
            f"a PNG cannot hold an image of {channels} channels; expected 1 or 3: save the images as .npz"
        )


def save_png(path: Path, image: Bytes) -> None:
    """Write one image, uint8 [H, W, C], as a PNG: grey for C = 1, RGB for C = 3.

    Raises RequestError for other channel counts and OutputError if path cannot be written.
    """
    from PIL import Image

    _check_bytes(image, "[H, W, C]")
    channels = image.shape[-1]
    check_png_channels(channels)
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if channels == 1 else image))
    with atomic_path(path) as temp:
        picture.save(temp, format="PNG")


def save_images(folder: Path, images: Bytes, numbers: Sequence[int] | None = None) -> list[Path]:
    """Write images, uint8 [n, H, W, C], as folder/000000.png and so on, and return their paths.

    numbers: n numbers for the file names (seeds, say), default 0 to n - 1; at least six digits each. The
    folder is made if it is missing. Files are written in order, so an interruption leaves a prefix of whole
    images. Raises what save_png raises, and RequestError for other than n numbers.
    """
    _check_bytes(images, "[n, H, W, C]")
    names = range(len(images)) if numbers is None else numbers
    if len(names) != len(images):
        raise RequestError(f"{len(names)} file numbers for {len(images)} images; expected one for each")
    make_folder(folder)
    paths = [folder / f"{number:06d}.png" for number in names]
    for path, image in zip(paths, images, strict=True):
        save_png(path, image)
    return paths


def save_npz(path: Path, images: Bytes, labels: npt.ArrayLike | None = None) -> None:
    """Write images, uint8 [n, H, W, C], and labels [n], in the layout of guided-diffusion's image_sample.py.

    arr_0 is the images and arr_1, only where there are labels, the labels as int64. Any number of channels
    fits. Raises RequestError for another layout and OutputError if path cannot be written.
    """
    _check_bytes(images, "[n, H, W, C]")
    arrays: list[npt.NDArray[np.generic]] = [images]
    if labels is not None:
        classes = np.asarray(labels)
        if classes.shape != images.shape[:1] or not np.issubdtype(classes.dtype, np.integer):
            raise RequestError(f"labels are {classes.dtype} {list(classes.shape)}; expected integers [{len(images)}]")
        arrays.append(classes.astype(np.int64))
    with atomic_path(path) as temp, temp.open("wb") as file:
        np.savez(file, *arrays)


def _check_bytes(images: Bytes, axes: str) -> None:
    if images.ndim != axes.count(",") + 1 or images.dtype != np.uint8:
        raise RequestError(f"images are {images.dtype} {list(images.shape)}; expected uint8 {axes}")
