"""Packed weights of the CPU engine in the user's cache folder, so that opening a bundle again reads nothing else.

A file is

    magic     8 bytes
    numbers   format version, length of the header, crc32 of the header: uint32, little-endian
    header    JSON: the key, the time embedding's tensors, the packed weights, each with place, size and crc32
    tensors   float32, one behind the other
    weights   at a multiple of 4096 bytes, up to the file's end

It is named by its key, and what does not fit is refused: the caller packs again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import BackendError, OutputError
from engine.files import atomic_path, make_folder, user_cache_folder

logger = logging.getLogger(__name__)

MAGIC = b"unetrt\x00\x9f"
VERSION = 1
PAGE_BYTES = 4096
_NUMBERS = struct.Struct("<III")
_HEADER_AT = len(MAGIC) + _NUMBERS.size


@dataclass(frozen=True, slots=True)
class Key:
    """What packed weights were made from, hashes in hex, and the instruction set that reads them."""

    weights_sha256: str
    program_sha256: str
    isa: str
    format: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """time: tensors of engine.networks.unet.TimeEmbedding by name, float32. packed: uint8 [n], aligned as an engine
    needs it.
    """

    time: dict[str, Tensor]
    packed: NDArray[np.uint8]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/unet-rt/native, by default in ~/.cache."""
    return user_cache_folder("native")


def load_or_pack(key: Key, packed_bytes: int, pack: Callable[[], Content]) -> Content:
    """The content of a key: from its file, or packed and written for the next time.

    A file that is refused is replaced, and a folder that cannot be written leaves the content in memory; both are
    logged. Two processes at once write the same file, whole each.
    """
    path = cache_folder() / f"{key.digest}.weights"
    if path.exists():
        try:
            return read(path, key, packed_bytes)
        except BackendError as error:
            logger.warning("%s; it is made again", error)
    content = pack()
    try:
        make_folder(path.parent)
        with atomic_path(path) as temp:
            write(temp, key, content)
        return read(path, key, packed_bytes)
    except (OutputError, BackendError) as error:
        logger.warning("the packed weights are not kept for the next time: %s", error)
        return content


def write(path: Path, key: Key, content: Content) -> None:
    """Fill a file; the caller renames it when whole."""
    tensors, offset, blobs = [], 0, []
    for name, value in content.time.items():
        blob = value.contiguous().float().numpy().tobytes()
        tensors.append({"name": name, "shape": list(value.shape), "offset": offset, "crc32": zlib.crc32(blob)})
        blobs.append(blob)
        offset += len(blob)
    packed = {"bytes": content.packed.nbytes, "crc32": zlib.crc32(content.packed.data)}
    header = json.dumps({"key": dataclasses.asdict(key), "tensors": tensors, "packed": packed}).encode()
    numbers = _NUMBERS.pack(VERSION, len(header), zlib.crc32(header))
    with path.open("wb") as file:
        for part in (MAGIC, numbers, header, *blobs):
            file.write(part)
        file.write(bytes(-file.tell() % PAGE_BYTES))
        file.write(content.packed.data)


def read(path: Path, key: Key, packed_bytes: int) -> Content:
    """The content of a file, its packed weights mapped read-only; raises BackendError where anything differs."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else b""
    except OSError as error:
        raise BackendError(f"{path} cannot be read: {error.strerror or error}") from error
    header, end = _read_header(path, data)
    if header.get("key") != dataclasses.asdict(key):
        raise BackendError(f"{path} holds the weights of another network or processor: {header.get('key')}")
    try:
        time, end = _read_tensors(path, data, header["tensors"], end)
        packed_at = end + -end % PAGE_BYTES
        count, crc = int(header["packed"]["bytes"]), header["packed"]["crc32"]
    except (KeyError, TypeError, ValueError) as error:
        raise BackendError(f"{path} is damaged: its header lacks or misstates {error}") from error
    if count != packed_bytes:
        raise BackendError(f"{path} holds {count} bytes of packed weights; this library needs {packed_bytes}")
    if len(data) != packed_at + count:
        raise BackendError(f"{path} has {len(data)} bytes; its header says {packed_at + count}")
    packed = np.frombuffer(data, np.uint8, count, packed_at)
    _check_crc(path, "the packed weights", packed.data, crc)
    return Content(time, packed)


def _read_header(path: Path, data: bytes | mmap.mmap) -> tuple[dict[str, Any], int]:
    """The header and the first byte behind it."""
    if data[: len(MAGIC)] != MAGIC:
        raise BackendError(f"{path} holds no packed weights: it does not begin with their magic bytes")
    if len(data) < _HEADER_AT:
        raise BackendError(f"{path} is cut off: it has {len(data)} bytes")
    version, length, crc = _NUMBERS.unpack(data[len(MAGIC) : _HEADER_AT])
    if version != VERSION:
        raise BackendError(f"{path} has format {version}; this version reads {VERSION}")
    text = data[_HEADER_AT : _HEADER_AT + length]
    if len(text) < length:
        raise BackendError(f"{path} is cut off: it has {len(data)} bytes")
    _check_crc(path, "the header", text, crc)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise BackendError(f"{path} is damaged: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise BackendError(f"{path} is damaged: its header is no JSON object")
    return header, _HEADER_AT + length


def _read_tensors(
    path: Path, data: bytes | mmap.mmap, entries: list[Mapping[str, Any]], first: int
) -> tuple[dict[str, Tensor], int]:
    """The tensors, and the first byte behind them."""
    tensors, end = {}, first
    for entry in entries:
        shape = tuple(entry["shape"])
        begin, end = first + entry["offset"], first + entry["offset"] + 4 * prod(shape)
        blob = data[begin:end]
        _check_crc(path, entry["name"], blob, entry["crc32"])
        tensors[entry["name"]] = torch.from_numpy(np.frombuffer(blob, np.float32).reshape(shape).copy())
    return tensors, end


def _check_crc(path: Path, what: str, data: bytes | memoryview, crc: int) -> None:
    if zlib.crc32(data) != crc:
        raise BackendError(f"{path} is damaged: the crc32 of {what} differs from what was written")
