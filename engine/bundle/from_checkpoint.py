"""The manifest of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

from engine.bundle.manifest import Manifest, NetworkEntry, Networks
from engine.checkpoints.types import Checkpoint
from engine.networks.config import UNetConfig


def checkpoint_manifest(checkpoint: Checkpoint, versions: Mapping[str, str] | None = None) -> Manifest:
    """The manifest of a checkpoint from which nothing was built yet."""
    if not isinstance(checkpoint.config, UNetConfig):
        checkpoint.unet()
        raise AssertionError
    return Manifest(
        family=checkpoint.family,
        networks=Networks(NetworkEntry(checkpoint.config)),
        diffusion=checkpoint.diffusion,
        checkpoint_sha256=checkpoint.sha256,
        assumptions=tuple((a.name, a.value, a.reason) for a in checkpoint.assumptions),
        versions=dict(versions or {}),
    )
