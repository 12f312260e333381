"""A sampling loop as a user writes it around any network: DDIM with eta 0, with a classifier's gradient or without.

It shares nothing with engine.diffusion.solvers: schedule arrays, then the paper's formulas, one step after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.diffusion.prediction import Diffusion, Prediction, Spacing
from engine.errors import RequestError
from engine.networks.config import LabelInput, UNetConfig

SCALE = 4.0
"""Of classifier guidance."""

NetworkCall = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [B, C, H, W], timestep [B] float32, labels [B] int64 or None) -> [B, C', H, W] float32."""

Gradient = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], timestep [B]) -> SCALE * d log p(y | x_t, t) / d x_t of fixed labels y, [B, C, H, W]."""


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What every contender is to make: a batch of images in `steps` steps of DDIM, guided by a classifier or not.

    classes: [B], what network and classifier are given as labels. seed: of the noise that all of them start from.
    """

    steps: int
    guided: bool
    classes: tuple[int, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        """For a reader."""
        return f"{self.steps} steps{', guided' if self.guided else ''}"

    def generator(self, device: torch.device) -> torch.Generator:
        """Its first draw is x_T, for whoever draws from it in the shape of the batch."""
        return torch.Generator(device).manual_seed(self.seed)

    def start(self, config: UNetConfig, device: torch.device) -> Tensor:
        """x_T [B, C, H, W] float32, the same for every contender."""
        shape = (len(self.classes), config.in_channels, *config.image_size)
        return torch.randn(shape, generator=self.generator(device), device=device)

    def labels(self, config: UNetConfig, device: torch.device) -> Tensor | None:
        """What the network is given, int64 [B]; None for one without labels."""
        return None if config.num_classes is None else torch.tensor(self.classes, device=device)


def reason_against(config: UNetConfig, diffusion: Diffusion) -> str | None:
    """Why such a network is not compared, or None."""
    if diffusion.log_snr is not None or diffusion.percentile is not None or diffusion.prediction is Prediction.X_PREV:
        return "only discrete time, clipped or unlimited x0, and networks of eps, x0 or v are compared"
    if config.cond_channels or (config.num_classes is not None and config.label is not LabelInput.TABLE):
        return "networks that take images or label vectors as conditions are not compared"
    return None


def timesteps(diffusion: Diffusion, steps: int) -> NDArray[np.int64]:
    """The training timesteps that DDIM in so many steps visits, ascending; raises RequestError where there are fewer.

    The checkpoint's own spacing; where that holds both ends (Improved DDPM) an even stride from 0 on instead, which
    is the "ddim50" of guided-diffusion.
    """
    total = len(diffusion.schedule)
    if steps > total:
        raise RequestError(f"{steps} steps asked for and the schedule has {total} timesteps; choose fewer")
    match diffusion.spacing:
        case Spacing.EVEN:
            chosen = np.arange(steps) * (total // steps)
        case Spacing.LEADING:
            chosen = np.arange(steps) * (total // steps) + diffusion.spacing_offset
        case Spacing.TRAILING:
            chosen = np.round(np.arange(total, 0, -total / steps))[::-1][-steps:] - 1
        case Spacing.TRUNCATED:
            chosen = torch.linspace(-1, total - 1, steps + 1)[1:].int().numpy()
        case Spacing.LINSPACE:
            chosen = np.round(np.linspace(0, total - 1, steps))
    return np.minimum(chosen.astype(np.int64), total - 1)


def classifier_gradient(classifier: nn.Module, task: Task, device: torch.device) -> Gradient:
    """By torch autograd; Dhariwal & Nichol, Diffusion Models Beat GANs (2021), section 4.1."""
    y = torch.tensor(task.classes, device=device)

    def gradient(x_t: Tensor, timestep: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            log_p = F.log_softmax(classifier(x, timestep), dim=1)
            chosen = log_p[torch.arange(len(y), device=device), y].sum()
            return torch.autograd.grad(chosen, x)[0] * SCALE

    return gradient


@torch.no_grad()
def sample(
    network: NetworkCall,
    config: UNetConfig,
    diffusion: Diffusion,
    task: Task,
    device: torch.device,
    gradient: Gradient | None = None,
) -> Tensor:
    """Images [B, C, H, W] in [-1, 1], on the CPU."""
    x, labels = task.start(config, device), task.labels(config, device)
    visited = timesteps(diffusion, task.steps)
    abar = np.cumprod(1 - diffusion.schedule.betas, dtype=np.float64)
    before = visited - len(abar) // task.steps if diffusion.strides else np.append(-1, visited[:-1])
    end = float(abar[0]) if diffusion.ends_at_first else 1.0
    for now, then in zip(visited[::-1].tolist(), before[::-1].tolist(), strict=True):
        t = torch.full((len(x),), now * diffusion.timestep_scale, device=device)
        out = network(x, t, labels)[:, : x.shape[1]]
        grad = None if gradient is None else gradient(x, t)
        x = ddim_step(diffusion, float(abar[now]), float(abar[then]) if then >= 0 else end, x, out, grad)
    return x.clamp(-1, 1).cpu()


def ddim_step(
    diffusion: Diffusion, abar: float, abar_prev: float, x: Tensor, out: Tensor, grad: Tensor | None
) -> Tensor:
    """DDIM (2021), eq. 12 with eta 0; with a gradient algorithm 2 of Dhariwal & Nichol (2021).

    abar, abar_prev: alphas_cumprod at the step's timestep and where it goes to. out: the network's result
    [B, C, H, W] without a variance.
    """
    match diffusion.prediction:
        case Prediction.EPS:
            free = (x - (1 - abar) ** 0.5 * out) / abar**0.5
        case Prediction.V:
            free = abar**0.5 * x - (1 - abar) ** 0.5 * out
        case _:
            free = out
    x0 = free if diffusion.clip is None else free.clamp(-diffusion.clip, diffusion.clip)
    eps = (x - abar**0.5 * (free if diffusion.keeps_eps else x0)) / (1 - abar) ** 0.5
    if grad is not None:
        eps = eps - (1 - abar) ** 0.5 * grad
        x0 = x0 + (1 - abar) / abar**0.5 * grad
    return abar_prev**0.5 * x0 + (1 - abar_prev) ** 0.5 * eps
