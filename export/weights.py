"""Weights as a file of a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors; raises OSError."""
    from safetensors.torch import save

    # Through Python's own write: safetensors' gives the file a private mode and hides the error of a full disk.
    path.write_bytes(save({name: value.contiguous() for name, value in weights.items()}))
