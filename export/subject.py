"""What an export is about, made once: the checkpoint, its network, and what the network does on real inputs.

The fp32 network samples a few images by DDIM; the states x_t on the way, at timesteps spread over the schedule, are the
inputs. They show what float16 cannot hold (export.fp32_parts), calibrate 8-bit forms (export.int8) and judge every
artefact (export.verify).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.bundle.from_checkpoint import checkpoint_manifest
from engine.bundle.manifest import Manifest
from engine.checkpoints.types import Checkpoint
from engine.diffusion.noise import normal
from engine.networks.config import LabelInput, UNetConfig
from engine.networks.inputs import UNCONDITIONED, Conditions, Inputs, join_inputs
from engine.networks.unet import UNet
from engine.sampling.sampler import Sampler

IMAGES, STEPS, VISITED = 4, 10, 5
"""Images sampled, DDIM steps taken, and how many of those steps give inputs."""


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One checkpoint that is exported.

    unet: its fp32 network, on the CPU. manifest: of a bundle in which nothing was built yet. cases: inputs of the
    network as sampling meets them, as real_cases gives them. wanted: the network's result [B, C', H, W] for each case.
    """

    checkpoint: Checkpoint
    unet: UNet
    manifest: Manifest
    cases: tuple[Inputs, ...]
    wanted: tuple[Tensor, ...]


def make_subject(checkpoint: Checkpoint) -> Subject:
    """Run a checkpoint's network on a few trajectories; raises CheckpointError for a classifier."""
    unet, manifest = checkpoint.unet(), checkpoint_manifest(checkpoint)
    cases = real_cases(unet, manifest)
    with torch.no_grad():
        wanted = tuple(unet(**case.tensors()) for case in cases)
    return Subject(checkpoint, unet, manifest, cases, wanted)


def real_cases(unet: UNet, manifest: Manifest) -> tuple[Inputs, ...]:
    """Inputs from DDIM trajectories: VISITED single images, then IMAGES - 1 batches that mix timesteps.

    unet: fp32, on the CPU. manifest: says what the network is and how it is sampled from.
    """
    config = manifest.unet.config
    recorder = _Recorder(unet, manifest)
    Sampler(recorder).sample(
        IMAGES,
        steps=min(STEPS, len(manifest.diffusion.schedule)),
        labels=_labels(config),
        image=_conditions(config) if config.cond_channels and not config.self_condition else None,
        batch_size=IMAGES,
    )
    rows = np.unique(np.linspace(0, len(recorder.calls) - 1, VISITED).round().astype(int))
    calls = [recorder.calls[row] for row in rows]
    singles = tuple(call.rows([0]) for call in calls)
    return singles + tuple(join_inputs([call.rows([i]) for call in calls]) for i in range(1, IMAGES))


class _Recorder:
    """A backend that runs the fp32 U-Net on the CPU and keeps what it was called with."""

    name, precision, device = "torch", "fp32", torch.device("cpu")

    def __init__(self, unet: UNet, manifest: Manifest) -> None:
        self.manifest, self.calls = manifest, list[Inputs]()
        self._unet = unet

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        self.calls.append(Inputs(x_t.clone(), timestep, conditions))
        with torch.no_grad():
            return self._unet(x_t, timestep, **conditions.tensors())

    def close(self) -> None:
        """Nothing is held."""


def _labels(config: UNetConfig) -> list[int] | list[list[float]] | None:
    """IMAGES labels: classes from the first to the last, or vectors of normals."""
    if config.num_classes is None:
        return None
    if config.label is LabelInput.VECTOR:
        vectors = normal([2000 + i for i in range(IMAGES)], [0] * IMAGES, (config.label_channels,))
        return [[float(number) for number in vector] for vector in vectors]
    return [round(y) for y in np.linspace(0, config.num_classes - 1, IMAGES)]


def _conditions(config: UNetConfig) -> Tensor:
    """Smooth random images [IMAGES, Cc, h, w] in [-1, 1], an eighth of the network's size."""
    shape = (config.cond_channels, *(max(1, size // 8) for size in config.image_size))
    noise = normal([1000 + i for i in range(IMAGES)], [0] * IMAGES, shape)
    return torch.from_numpy(noise).mul(0.5).clamp(-1, 1)
