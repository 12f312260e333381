"""A noise-conditioned classifier, as guided-diffusion trains it, and its input gradient by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.networks import config as c
from engine.networks.unet import TimeEmbedding, run_blocks


class Classifier(nn.Module):
    """log p(y | x_t, t) up to a constant: logits of a ClassifierConfig's block list."""

    def __init__(self, config: c.ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(config)
        self.blocks = nn.ModuleList(block.module() for block in config.blocks)

    def forward(self, x_t: Tensor, timestep: Tensor) -> Tensor:
        """x_t [B, C, H, W], timestep [B] float32 -> logits [B, num_classes]."""
        return run_blocks(self.config.blocks, self.blocks, x_t, iter(self.time(timestep, None)))


class AutogradGuide:
    """The classifier protocol by torch autograd: (x_t, timestep, label, scale) -> (grad, log_p)."""

    def __init__(self, classifier: Classifier) -> None:
        self._classifier = classifier.eval().requires_grad_(False)

    @property
    def config(self) -> c.ClassifierConfig:
        return self._classifier.config

    def __call__(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """grad [B, C, H, W] = scale * d log p(y | x_t, t) / d x_t, and log_p [B], both float32.

        y [B] int64, scale [B] float32; a scale of 0 gives a gradient of exactly 0 for that image.
        Dhariwal & Nichol, Diffusion Models Beat GANs (2021), section 4.1.
        """
        # A tensor made under the caller's inference_mode cannot take part in autograd; its copy can.
        with torch.inference_mode(False), torch.enable_grad():
            x_t, timestep, label, scale = (value.detach().clone() for value in (x_t, timestep, label, scale))
            x = x_t.requires_grad_(True)
            log_p = F.log_softmax(self._classifier(x, timestep).float(), dim=1)
            chosen = log_p.gather(1, label[:, None])[:, 0]
            (grad,) = torch.autograd.grad((chosen * scale).sum(), x)
        return grad, chosen.detach()
