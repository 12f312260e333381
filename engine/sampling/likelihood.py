"""The variational bound of a diffusion model on given images, in bits per dimension, as OpenAI's code computes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.backends.protocol import Backend
from engine.diffusion.ladder import Steps, visited_timesteps
from engine.diffusion.noise import NOISE, NoiseSource, normal
from engine.diffusion.prediction import Diffusion, log_variance_bounds, x0_coefficients
from engine.errors import RequestError
from engine.networks.inputs import UNCONDITIONED, Conditions, Inputs
from kernels.reference import limit_x0

_BITS = 1.0 / math.log(2.0)


@dataclass(frozen=True, slots=True, eq=False)
class BoundTerms:
    """vb, x0_mse, eps_mse: [B, N], columns from the noisiest step to the cleanest; prior, total: [B]. vb, prior and
    total are in bits per dimension."""

    vb: Tensor
    x0_mse: Tensor
    eps_mse: Tensor
    prior: Tensor
    total: Tensor


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def gaussian_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """KL(N(mean1, var1) || N(mean2, var2)) per element, in nats."""
    ratio = (log_var1 - log_var2).exp()
    return 0.5 * (log_var2 - log_var1 - 1.0 + ratio + (mean1 - mean2).square() * (-log_var2).exp())


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log probability of the 8-bit value x in [-1, 1] under a Gaussian, per element, in nats.

    The Gaussian's mass in a bin of half-width 1/255, open towards the ends; DDPM (Ho et al., 2020), eq. 13. The normal
    distribution function is the tanh approximation of OpenAI's code, whose figures this reproduces.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (z + 0.044715 * z**3)))

    scale = (-log_std).exp()
    upper = cdf(scale * (x - mean + 1.0 / 255.0))
    lower = cdf(scale * (x - mean - 1.0 / 255.0))
    mass = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1.0 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def variational_bound(
    backend: Backend,
    x0: Tensor,
    steps: Steps,
    *,
    diffusion: Diffusion | None = None,
    conditions: Conditions = UNCONDITIONED,
    seeds: list[int] | None = None,
    noise: NoiseSource = normal,
) -> BoundTerms:
    """Terms of the bound L_0 + ... + L_T on x0 [B, C, H, W] in [-1, 1]; Improved DDPM (2021), eq. 4 to 7.

    steps: a count or respacing string. diffusion: the backend's own unless given. conditions: those of
    the network. The k-th step
    takes its noise from draw k + 1 of each image's seed (0..B-1 unless given).
    """
    process = diffusion or backend.manifest.diffusion
    if process.log_snr is not None:
        raise RequestError("the bound is defined for discrete timesteps; this network was trained in continuous time")
    schedule = process.schedule.respaced(visited_timesteps(process, steps))
    batch, shape = x0.shape[0], tuple(x0.shape[1:])
    own_seeds = seeds if seeds is not None else list(range(batch))
    abar = schedule.alphas_cumprod
    a, b = x0_coefficients(schedule, process.prediction)
    lower, upper = log_variance_bounds(schedule, process.variance)
    clip = torch.full((batch, 1, 1, 1), process.clip if process.clip is not None else math.inf)
    percentile = None if process.percentile is None else torch.full((batch, 1, 1, 1), process.percentile)
    vb, x0_mse, eps_mse = [], [], []
    for k, t in enumerate(reversed(range(len(schedule)))):
        z = torch.from_numpy(noise(own_seeds, [k + 1] * batch, shape, NOISE))
        x_t = math.sqrt(abar[t]) * x0 + math.sqrt(1 - abar[t]) * z
        time = torch.full((batch,), float(schedule.timesteps[t] * process.timestep_scale))
        sent = Inputs(x_t, time, conditions).to(backend.device)
        out = backend(sent.x_t, sent.timestep, sent.conditions).to(x0.device)
        mean_out, rest = out[:, : shape[0]], out[:, shape[0] :]
        x0_hat = limit_x0(a[t] * x_t + b[t] * mean_out, clip, percentile)
        fraction = (rest + 1) / 2 if rest.shape[1] and lower[t] != upper[t] else torch.zeros_like(x0)
        log_var = lower[t] + fraction * (upper[t] - lower[t])
        p_x0, p_xt = schedule.posterior_mean_x0[t], schedule.posterior_mean_xt[t]
        mean = p_x0 * x0_hat + p_xt * x_t
        if t == 0:
            term = -discretised_log_likelihood(x0, mean, 0.5 * log_var)
        else:
            true_log_var = torch.full_like(x0, float(schedule.posterior_log_variance[t]))
            term = gaussian_kl(p_x0 * x0 + p_xt * x_t, true_log_var, mean, log_var)
        eps_hat = (x_t / math.sqrt(abar[t]) - x0_hat) / math.sqrt(1 / abar[t] - 1)
        vb.append(_mean(term) * _BITS)
        x0_mse.append(_mean((x0_hat - x0).square()))
        eps_mse.append(_mean((eps_hat - z).square()))
    last_log_var = torch.full_like(x0, float(np.log(1 - abar[-1])))
    prior = _mean(gaussian_kl(math.sqrt(abar[-1]) * x0, last_log_var, torch.zeros(()), torch.zeros(()))) * _BITS
    stacked = torch.stack(vb, dim=1)
    return BoundTerms(stacked, torch.stack(x0_mse, 1), torch.stack(eps_mse, 1), prior, stacked.sum(1) + prior)
