"""Sampling loops as a user writes them around any network: DDIM and DDPM, with a classifier's gradient or without.

They share nothing with engine.diffusion.solvers: schedule arrays, then the papers' formulas, one step after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.peer_turns import LEAST_STEPS, Gate
from benchmarks.timing import Float64
from engine.diffusion.prediction import Diffusion, Prediction, Spacing, Variance
from engine.errors import RequestError
from engine.networks.config import LabelInput, UNetConfig

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_t [B, C, H, W], timestep [B] float32, y [B] int64 or None) -> [B, C', H, W] float32."""

Gradient = Callable[[Tensor, Tensor], Tensor]
"""(x_t [B, C, H, W], timestep [B]) -> scale * d log p(y | x_t, t) / d x_t of fixed labels y, [B, C, H, W]."""

Noise = Callable[[Tensor], Tensor]
"""Standard normals like a tensor."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A sampler and how many steps it takes, "ddim50" for one."""

    sampler: str
    steps: int

    @property
    def name(self) -> str:
        return f"{self.sampler}{self.steps}"

    def timesteps(self, diffusion: Diffusion) -> NDArray[np.int64]:
        """The training timesteps visited, ascending; raises RequestError where there are fewer.

        The checkpoint's own spacing. Where that holds both ends (Improved DDPM), DDIM takes an even stride from 0 on
        instead, which is the "ddim50" of guided-diffusion.
        """
        total, count = len(diffusion.schedule), self.steps
        if count > total:
            raise RequestError(f"{self.name} takes {count} steps and the schedule has {total}; choose fewer")
        spacing = diffusion.spacing
        if spacing is Spacing.EVEN and self.sampler == "ddim":
            return np.arange(count) * (total // count)
        match spacing:
            case Spacing.LEADING:
                chosen = np.arange(count) * (total // count) + diffusion.spacing_offset
            case Spacing.TRAILING:
                chosen = np.round(np.arange(total, 0, -total / count))[::-1][-count:] - 1
            case Spacing.TRUNCATED:
                chosen = torch.linspace(-1, total - 1, count + 1)[1:].int().numpy()
            case _:
                chosen = np.round(np.linspace(0, total - 1, count))
        return np.minimum(chosen.astype(np.int64), total - 1)


def parse_settings(text: str) -> tuple[Setting, ...]:
    """Settings from "ddim50,ddpm250"; raises RequestError."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"(ddim|ddpm)([1-9]\d*)", part.strip())
        if match is None or int(match[2]) < LEAST_STEPS:
            raise RequestError(
                f"setting {part!r} given; expected ddim or ddpm and a number from {LEAST_STEPS} on, for example "
                "ddim50,ddpm250: with fewer steps ratios have no interval"
            )
        found.append(Setting(match[1], int(match[2])))
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """What every contender is to make: a batch of images. classes: [B], what they are to show. scale: of guidance.

    seed: of the noise. Where guided, a network that has a label for none is given that one.
    """

    setting: Setting
    guided: bool
    classes: tuple[int, ...]
    seed: int
    scale: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.setting.name}{' guided' if self.guided else ''}"

    @property
    def batch(self) -> int:
        return len(self.classes)

    def labels(self, config: UNetConfig) -> list[int] | None:
        """What the network is given, None for one without labels."""
        if config.num_classes is None:
            return None
        if self.guided and config.null_class is not None:
            return [config.null_class] * self.batch
        return list(self.classes)

    def generator(self, device: torch.device) -> torch.Generator:
        """Its first draw is x_T, for whoever draws from it in the shape of the batch."""
        return torch.Generator(device).manual_seed(self.seed)

    def start(self, config: UNetConfig, device: torch.device) -> Tensor:
        """x_T [B, C, H, W], the same for every contender."""
        shape = (self.batch, config.in_channels, *config.image_size)
        return torch.randn(shape, generator=self.generator(device), device=device)


def reason_against_loop(config: UNetConfig, diffusion: Diffusion) -> str | None:
    """Why such a network is not sampled here, or None."""
    if diffusion.log_snr is not None or diffusion.percentile is not None or diffusion.prediction is Prediction.X_PREV:
        return "only discrete time, clipped or unlimited x0, and networks of eps, x0 or v are compared"
    if config.cond_channels or (config.num_classes is not None and config.label is not LabelInput.TABLE):
        return "networks that take images or label vectors as conditions are not compared"
    return None


def reason_against_steps(diffusion: Diffusion, setting: Setting) -> str | None:
    """Why the loop does not take a setting's steps as the checkpoint's own sampler does, or None."""
    ends_early = diffusion.noises_last and int(setting.timesteps(diffusion)[0]) > 0
    if setting.sampler == "ddpm" and ends_early:
        return "the checkpoint's DDPM adds noise after a last step that is not timestep 0, which no usual loop does"
    return None


def classifier_gradient(classifier: nn.Module, task: Task, device: torch.device) -> Gradient:
    """By torch autograd; Dhariwal & Nichol, Diffusion Models Beat GANs (2021), section 4.1."""
    y = torch.tensor(task.classes, device=device)

    def gradient(x_t: Tensor, timestep: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            log_p = F.log_softmax(classifier(x, timestep), dim=1)
            chosen = log_p[torch.arange(len(y), device=device), y].sum()
            return torch.autograd.grad(chosen, x)[0] * task.scale

    return gradient


@torch.no_grad()
def run_loop(
    network: Network,
    config: UNetConfig,
    diffusion: Diffusion,
    task: Task,
    gate: Gate,
    gradient: Gradient | None = None,
    noise: Noise = torch.randn_like,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Tensor:
    """Images [B, C, H, W] in [-1, 1], on the CPU."""
    x, labels = task.start(config, device), task.labels(config)
    y = None if labels is None else torch.tensor(labels, device=device)
    schedule = Visited.of(diffusion, task.setting)
    for index in reversed(range(len(schedule.timesteps))):
        t = torch.full((len(x),), float(schedule.timesteps[index]) * diffusion.timestep_scale, device=device)
        out, grad = gate(partial(_both, network, gradient, x, t, y))
        if task.setting.sampler == "ddim":
            x = ddim_step(diffusion, schedule, index, x, out, grad)
        else:
            x = ddpm_step(diffusion, schedule, index, x, out, grad, noise)
    return x.clamp(-1, 1).cpu()


def _both(
    network: Network, gradient: Gradient | None, x: Tensor, t: Tensor, y: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    return network(x, t, y), None if gradient is None else gradient(x, t)


@dataclass(frozen=True, slots=True, eq=False)
class Visited:
    """The schedule at the timesteps of a setting, ascending, each [N]: abar and the abar that a step goes to."""

    timesteps: NDArray[np.int64]
    abar: Float64
    abar_prev: Float64

    @classmethod
    def of(cls, diffusion: Diffusion, setting: Setting) -> Visited:
        timesteps = setting.timesteps(diffusion)
        abar: Float64 = np.cumprod(1 - diffusion.schedule.betas, dtype=np.float64)
        before = np.append(-1, timesteps[:-1])
        if setting.sampler == "ddim" and diffusion.strides:
            before = timesteps - len(abar) // setting.steps
        end = abar[0] if setting.sampler == "ddim" and diffusion.ends_at_first else 1.0
        previous: Float64 = np.where(before >= 0, abar[np.maximum(before, 0)], end)
        return cls(timesteps, abar[timesteps], previous)

    @property
    def betas(self) -> Float64:
        """Improved DDPM (2021), eq. 19."""
        return 1 - self.abar / self.abar_prev

    @property
    def posterior_variance(self) -> Float64:
        """DDPM (2020), eq. 7."""
        return self.betas * (1 - self.abar_prev) / (1 - self.abar)


def predicted_x0(diffusion: Diffusion, abar: float, x: Tensor, out: Tensor) -> Tensor:
    """x0 of a network's result [B, C, H, W], without a limit."""
    match diffusion.prediction:
        case Prediction.EPS:
            return (x - (1 - abar) ** 0.5 * out) / abar**0.5
        case Prediction.V:
            return abar**0.5 * x - (1 - abar) ** 0.5 * out
        case _:
            return out


def ddim_step(
    diffusion: Diffusion, schedule: Visited, index: int, x: Tensor, out: Tensor, grad: Tensor | None
) -> Tensor:
    """DDIM (2021), eq. 12 with eta 0; with a gradient algorithm 2 of Dhariwal & Nichol (2021)."""
    abar, target = float(schedule.abar[index]), float(schedule.abar_prev[index])
    free = predicted_x0(diffusion, abar, x, out[:, : x.shape[1]])
    x0 = free if diffusion.clip is None else free.clamp(-diffusion.clip, diffusion.clip)
    eps = (x - abar**0.5 * (free if diffusion.keeps_eps else x0)) / (1 - abar) ** 0.5
    if grad is not None:
        eps = eps - (1 - abar) ** 0.5 * grad
        x0 = x0 + (1 - abar) / abar**0.5 * grad
    return target**0.5 * x0 + (1 - target) ** 0.5 * eps


def ddpm_step(
    diffusion: Diffusion, schedule: Visited, index: int, x: Tensor, out: Tensor, grad: Tensor | None, noise: Noise
) -> Tensor:
    """DDPM (2020), algorithm 2; with a gradient algorithm 1 of Dhariwal & Nichol (2021), its mean shifted."""
    channels = x.shape[1]
    abar, before = float(schedule.abar[index]), float(schedule.abar_prev[index])
    beta = float(schedule.betas[index])
    x0 = predicted_x0(diffusion, abar, x, out[:, :channels])
    if diffusion.clip is not None:
        x0 = x0.clamp(-diffusion.clip, diffusion.clip)
    mean = beta * before**0.5 / (1 - abar) * x0 + (1 - before) * (1 - beta) ** 0.5 / (1 - abar) * x
    # The posterior variance of the last step is 0, and OpenAI's code takes the one of the step before.
    posterior = float(schedule.posterior_variance[max(index, 1)])
    match diffusion.variance:
        case Variance.LEARNED_RANGE:
            share = (out[:, channels:] + 1) / 2
            log_variance = share * float(np.log(beta)) + (1 - share) * float(np.log(posterior))
        case Variance.FIXED_LARGE:
            log_variance = torch.full_like(x, float(np.log(beta if index else posterior)))
        case _:
            log_variance = torch.full_like(x, float(np.log(posterior)))
    if grad is not None and not (index == 0 and diffusion.variance is Variance.FIXED_SMALL):
        mean = mean + log_variance.exp() * grad
    return mean + (0.5 * log_variance).exp() * noise(x) if index else mean
