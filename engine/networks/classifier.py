"""A noise-conditioned classifier, as guided-diffusion trains it, and its input gradient by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.networks import config as c
from engine.networks.layers import make_block
from engine.networks.unet import TimeEmbedding, run_blocks
from kernels import reference as ops


class AttentionPool(nn.Module):
    """One attention layer over [mean token, pixels] with learned positions; the mean's token is read out.

    Radford et al., CLIP (2021), section 2.4, in the form of guided-diffusion's AttentionPool2d.
    """

    def __init__(self, block: c.AttentionPool) -> None:
        super().__init__()
        inner = block.heads * block.head_dim
        self.block = block
        self.position = nn.Parameter(torch.randn(block.channels, block.tokens + 1) / block.channels**0.5)
        self.qkv = nn.Linear(block.channels, 3 * inner)
        self.out = nn.Linear(inner, block.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] with H W = tokens -> [B, out_features]."""
        batch, heads, dim = x.shape[0], self.block.heads, self.block.head_dim
        pixels = x.flatten(2)
        tokens = torch.cat([pixels.mean(dim=2, keepdim=True), pixels], dim=2) + self.position
        qkv = self.qkv(tokens.transpose(1, 2)).reshape(batch, -1, 3, heads, dim).permute(2, 0, 3, 1, 4)
        h = ops.attention(qkv[0][:, :, :1], qkv[1], qkv[2])
        return self.out(h.reshape(batch, heads * dim))


class AveragePool(nn.Module):
    """Mean over pixels, then a linear layer."""

    def __init__(self, block: c.AveragePool) -> None:
        super().__init__()
        self.linear = nn.Linear(block.channels, block.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, out_features]."""
        return self.linear(x.mean(dim=(2, 3)))


def _make_module(block: c.Block) -> nn.Module:
    match block:
        case c.AttentionPool():
            return AttentionPool(block)
        case c.AveragePool():
            return AveragePool(block)
        case _:
            return make_block(block)


class Classifier(nn.Module):
    """log p(y | x_t, t) up to a constant: logits of a ClassifierConfig's block list."""

    def __init__(self, config: c.ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.time = TimeEmbedding(config)
        self.blocks = nn.ModuleList(_make_module(block) for block in config.blocks)

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
