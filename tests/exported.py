"""Exporting a checkpoint to ONNX and comparing what runs it with the network itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.backends.ort.ort_backend import OrtBackend
from engine.backends.ov.ov_backend import OpenVINOBackend
from engine.bundle.from_checkpoint import checkpoint_manifest
from engine.checkpoints.types import Checkpoint
from engine.networks.config import LabelInput, UNetConfig
from export.to_onnx import export_onnx

# Two fp32 libraries on one network of this size: sums in another order, relative to the largest output.
FP32_OTHER_LIBRARY = 1e-4


def network_inputs(config: UNetConfig, batch: int, steps: int, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs of a network, as a backend takes them: x_t, timestep below steps, y and cond where it has them."""
    rng = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    inputs = {
        "x_t": some(batch, config.in_channels, *config.image_size),
        "timestep": torch.randint(steps, (batch,), generator=rng).float(),
    }
    if config.num_classes is not None:
        inputs["y"] = {
            LabelInput.TABLE: lambda: torch.randint(config.num_classes or 1, (batch,), generator=rng),
            LabelInput.NUMBER: lambda: some(batch),
            LabelInput.VECTOR: lambda: some(batch, config.time_channels),
        }[config.label]()
    if config.cond_channels:
        inputs["cond"] = some(batch, config.cond_channels, *config.image_size)
    return inputs


def assert_exports(checkpoint: Checkpoint, folder: Path) -> None:
    """One ONNX file with a dynamic batch gives the network's results in ort and ov, fp32, for batches of 1, 2 and 5."""
    unet, path, manifest = checkpoint.unet(), folder / "unet.onnx", checkpoint_manifest(checkpoint)
    export_onnx(unet, path)
    backends = [kind(manifest, path, "fp32", 1) for kind in (OrtBackend, OpenVINOBackend)]
    for batch in (1, 2, 5):
        inputs = network_inputs(unet.config, batch, len(checkpoint.diffusion.schedule), seed=batch)
        with torch.inference_mode():
            expected = unet(**inputs)
        for backend in backends:
            worst = float((backend(**inputs) - expected).abs().max() / expected.abs().max())
            assert worst <= FP32_OTHER_LIBRARY, f"{backend.name}, batch {batch}: {worst:.2g}"
