"""A network of exact operations, a classifier that counts its calls, and the samplers that every verb is tried with."""

from __future__ import annotations

from typing import Any

import torch
from helpers import adm_classifier, adm_unet, tiny_manifest
from torch import Tensor

from engine.diffusion.guidance import ClassifierFreeGuidance
from engine.diffusion.prediction import Variance
from engine.diffusion.solvers import StepTable
from engine.networks.config import ClassifierConfig, UNetConfig
from engine.networks.inputs import UNCONDITIONED, Conditions
from engine.sampling.requests import Request
from engine.sampling.step import guidance_numbers, guided_out

# mult and attention do not matter to a backend that runs no network.
LABELLED = adm_unet(mult=(1,), size=(4, 4), num_classes=11, null_class=10, learn_sigma=True)


PLAIN = adm_unet(mult=(1,), size=(4, 4))


SUPER = adm_unet(channels=3, mult=(1,), size=(8, 8), super_resolution=True)


class Elementwise:
    """A backend of exactly rounded operations on single elements: no rounding can depend on the batch."""

    name, precision, device = "elementwise", "fp32", torch.device("cpu")

    def __init__(self, config: UNetConfig) -> None:
        self.manifest = tiny_manifest(config)
        self.timesteps: list[list[float]] = []
        self.labels: list[list[int]] = []

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        config, y, image = self.manifest.unet.config, conditions.label, conditions.image
        assert x_t.dtype == timestep.dtype == torch.float32
        assert (y is None) == (config.num_classes is None)
        assert (image is None) == (config.cond_channels == 0)
        self.timesteps.append(timestep.tolist())
        self.labels.append([] if y is None else y.tolist())
        out = x_t * 0.5 + (timestep * 0.01 + (0.0 if y is None else y * 0.03))[:, None, None, None]
        out = out if image is None else out + image * 0.25
        return torch.cat([out, x_t * 0.7], dim=1) if config.out_channels == 2 * config.in_channels else out

    def close(self) -> None:
        pass


class CountingGuide:
    """A guide of single elements that counts its calls."""

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        self.config = config or adm_classifier(mult=(1,), size=(4, 4))
        self.calls: list[tuple[list[int], list[float]]] = []

    def __call__(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append((label.tolist(), scale.tolist()))
        grad = (x_t * 0.125 - label[:, None, None, None] * 0.25) * scale[:, None, None, None]
        return grad, torch.zeros(len(x_t))


SAMPLERS: dict[str, dict[str, Any]] = {
    "ddpm": {"sampler": "ddpm"},
    "ddpm fixed_large": {"sampler": "ddpm", "variance": Variance.FIXED_LARGE},
    "ddim": {"sampler": "ddim"},
    "ddim eta": {"sampler": "ddim", "eta": 0.6},
    "dpmpp": {"sampler": "dpmpp"},
    "plms": {"sampler": "plms"},
}


def labelled_request(
    index: int, table: StepTable, seed: int, label: int, free: ClassifierFreeGuidance | None = None
) -> Request:
    """One image of this class of the LABELLED network."""
    conditions, without = (Conditions(torch.tensor([y])) for y in (label, LABELLED.null_class))
    return Request(index, table, seed, conditions, without, free)


def guided(labelled: Tensor, without: Tensor, free: ClassifierFreeGuidance, channels: int) -> Tensor:
    """step.guided_out of a batch [B, C', H, W], or of one image [C', H, W], with the same guidance for all."""
    if labelled.ndim == 3:
        return guided(labelled[None], without[None], free, channels)[0]
    strength, rescale, removed, _ = torch.tensor(guidance_numbers(free)).expand(len(labelled), 4).unbind(1)
    return guided_out(labelled, without, strength, (rescale, removed), channels)


def finished(steps: Any) -> dict[int, Tensor]:
    return {step.request.index: step.x_prev.clone() for step in steps if step.is_last}
