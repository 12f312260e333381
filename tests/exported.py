"""Exporting a checkpoint to ONNX and comparing what runs it with the network itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.backends.ort.ort_backend import OrtBackend
from engine.backends.ov.ov_backend import OpenVINOBackend
from engine.backends.protocol import Backend
from engine.bundle.from_checkpoint import checkpoint_manifest
from engine.checkpoints.types import Checkpoint
from engine.networks.config import LabelInput, UNetConfig
from engine.networks.inputs import Conditions, Inputs
from export.to_onnx import export_onnx

# Two fp32 libraries on one network of this size: sums in another order, relative to the largest output.
FP32_OTHER_LIBRARY = 1e-4


def network_inputs(config: UNetConfig, batch: int, steps: int, seed: int = 0) -> Inputs:
    """Random inputs of a network: timesteps below steps, and what conditions it takes."""
    rng = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    x_t = some(batch, config.in_channels, *config.image_size)
    timestep = torch.randint(steps, (batch,), generator=rng).float()
    label = image = None
    if config.num_classes is not None:
        label = {
            LabelInput.TABLE: lambda: torch.randint(config.num_classes or 1, (batch,), generator=rng),
            LabelInput.NUMBER: lambda: some(batch),
            LabelInput.VECTOR: lambda: some(batch, config.label_channels),
        }[config.label]()
    if config.cond_channels:
        image = some(batch, config.cond_channels, *config.image_size)
    return Inputs(x_t, timestep, Conditions(label, image))


def in_float64(inputs: Inputs) -> Inputs:
    """The same with every number but a class in float64."""

    def wide(value: Tensor) -> Tensor:
        return value.double() if value.is_floating_point() else value

    conditions = {name: wide(value) for name, value in inputs.conditions.tensors().items()}
    return Inputs(wide(inputs.x_t), wide(inputs.timestep), Conditions(**conditions))


def call(backend: Backend, inputs: Inputs) -> Tensor:
    """A backend's result of these inputs."""
    return backend(inputs.x_t, inputs.timestep, inputs.conditions)


def assert_exports(checkpoint: Checkpoint, folder: Path) -> None:
    """One ONNX file with a dynamic batch gives the network's results in ort and ov, fp32, for batches of 1, 2 and 5."""
    unet, path, manifest = checkpoint.unet(), folder / "unet.onnx", checkpoint_manifest(checkpoint)
    export_onnx(unet, path)
    backends = [kind(manifest, path, "fp32", 1) for kind in (OrtBackend, OpenVINOBackend)]
    for batch in (1, 2, 5):
        inputs = network_inputs(unet.config, batch, len(checkpoint.diffusion.schedule), seed=batch)
        with torch.inference_mode():
            expected = unet(**inputs.tensors())
        for backend in backends:
            worst = float((call(backend, inputs) - expected).abs().max() / expected.abs().max())
            assert worst <= FP32_OTHER_LIBRARY, f"{backend.name}, batch {batch}: {worst:.2g}"
