"""Checkpoint files as plain data and CPU tensors; nothing in a file is imported or run."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from engine.checkpoints.safe_pickle import read_torch_file
from engine.errors import CheckpointError


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


def is_safetensors(path: Path) -> bool:
    """Whether a file starts with a safetensors header: a length, then a JSON object."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] < path.stat().st_size
