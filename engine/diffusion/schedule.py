"""The noise schedule: betas in float64, what follows from them, and the choice of a shorter set of timesteps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError, RequestError

Float64 = NDArray[np.float64]

LARGEST_BETA = 1 - 2.0**-53
"""In place of a beta of 1, which would end a schedule at alphas_cumprod 0: the next float64 below."""


@dataclass(frozen=True, slots=True, eq=False)
class NoiseSchedule:
    """q(x_t | x_0) = N(sqrt(alphas_cumprod_t) x_0, (1 - alphas_cumprod_t) I) for a list of timesteps.

    betas: [T] float64 in (0, 1), t = 0 the least noise. timesteps: [T] int64, the training timestep of each entry
    (0..T-1 unless the schedule was respaced). Everything else is derived in float64, because
    1 - alphas_cumprod from a float32 product is wrong by up to 1.7e-4.
    Ho et al., DDPM (2020), eq. 2 to 7.
    """

    betas: Float64
    timesteps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas):
            raise ConfigError(f"betas must be one non-empty list, got shape {betas.shape}")
        if not (np.all(betas > 0) and np.all(betas < 1)):
            raise ConfigError(
                f"every beta must lie in (0, 1), got {betas.min():.4g} to {betas.max():.4g}; "
                "a linear schedule scaled to 20 steps or fewer leaves that range: use more steps or another schedule"
            )
        timesteps = np.array(self.timesteps, dtype=np.int64)
        object.__setattr__(self, "betas", betas)
        object.__setattr__(self, "timesteps", timesteps if len(timesteps) else np.arange(len(betas)))
        if self.timesteps.shape != betas.shape:
            raise ConfigError(f"{len(self.timesteps)} timesteps given for {len(betas)} betas")
        self.betas.setflags(write=False)
        self.timesteps.setflags(write=False)

    def __len__(self) -> int:
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> Float64:
        """prod_{s <= t} (1 - beta_s), [T]."""
        product: Float64 = np.cumprod(1.0 - self.betas, dtype=np.float64)
        return product

    @property
    def alphas_cumprod_prev(self) -> Float64:
        """alphas_cumprod of the next cleaner entry; 1 for the first."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @property
    def alphas_cumprod_next(self) -> Float64:
        """alphas_cumprod of the next noisier entry; 0 for the last."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    @property
    def posterior_variance(self) -> Float64:
        """Variance of q(x_{t-1} | x_t, x_0), DDPM eq. 7; 0 at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_log_variance(self) -> Float64:
        """log posterior_variance, its first entry replaced by the second (log 0 is not finite)."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1], variance[1:]) if len(variance) > 1 else self.betas)

    @property
    def fixed_large_variance(self) -> Float64:
        """betas, the first entry replaced by posterior_variance[1], as in OpenAI's code."""
        return np.append(self.posterior_variance[1], self.betas[1:]) if len(self) > 1 else self.betas.copy()

    @property
    def posterior_mean_x0(self) -> Float64:
        """Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @property
    def posterior_mean_xt(self) -> Float64:
        """Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0), DDPM eq. 7."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @property
    def network_times(self) -> Float64:
        """What the network is given as the time of each entry, before Diffusion.timestep_scale."""
        return self.timesteps.astype(np.float64)

    def respaced(self, timesteps: NDArray[np.int64]) -> NoiseSchedule:
        """The schedule that visits only some entries, with betas that keep alphas_cumprod.

        timesteps: indices of those entries, ascending.

        beta'_i = 1 - alphas_cumprod[t_i] / alphas_cumprod[t_{i-1}]; Improved DDPM (2021), eq. 19.
        """
        if np.array_equal(timesteps, np.arange(len(self))):
            return self
        kept = self.alphas_cumprod[timesteps]
        betas = np.minimum(1.0 - kept / np.append(1.0, kept[:-1]), LARGEST_BETA)
        return NoiseSchedule(betas, self.timesteps[timesteps])


def linear_schedule(num_train_timesteps: int) -> NoiseSchedule:
    """DDPM's betas from 1e-4 to 0.02, scaled by 1000 / T for other lengths as in OpenAI's code."""
    scale = 1000.0 / num_train_timesteps
    return NoiseSchedule(np.linspace(scale * 1e-4, scale * 0.02, num_train_timesteps, dtype=np.float64))


def cosine_schedule(num_train_timesteps: int) -> NoiseSchedule:
    """Improved DDPM (Nichol & Dhariwal, 2021), eq. 17, betas at most 0.999."""

    def abar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = num_train_timesteps
    return NoiseSchedule(np.array([min(1 - abar((i + 1) / steps) / abar(i / steps), 0.999) for i in range(steps)]))


def sigmoid_schedule(num_train_timesteps: int) -> NoiseSchedule:
    """Jabri et al., Scalable adaptive computation (2022), figure 8 with start -3, end 3, tau 1; betas at most 0.999.

    abar(u) falls as (s(3) - s(6 u - 3)) / (s(3) - s(-3)), s the logistic function. s(3) and s(-3) are rounded to
    float32, as where this schedule is trained with: it moves the last betas, whose abar is all but 0.
    """
    u = np.arange(num_train_timesteps + 1, dtype=np.float64) / num_train_timesteps
    first, last = (float(np.float32(1 / (1 + math.exp(-v)))) for v in (-3.0, 3.0))
    abar = (last - 1 / (1 + np.exp(3 - 6 * u))) / (last - first)
    return NoiseSchedule(np.minimum(1 - abar[1:] / abar[:-1], 0.999))


def named_schedule(name: str, num_train_timesteps: int) -> NoiseSchedule:
    """The schedule of a name: linear, cosine or sigmoid; raises ConfigError for another."""
    known = {"linear": linear_schedule, "cosine": cosine_schedule, "sigmoid": sigmoid_schedule}
    if name not in known:
        raise ConfigError(f"there is no discrete schedule named {name!r}; known: {', '.join(known)}")
    return known[name](num_train_timesteps)


def space_timesteps(num_train_timesteps: int, respacing: int | str) -> NDArray[np.int64]:
    """Ascending training timesteps to visit, as improved-diffusion defines its respacing strings.

    "250" or 250: that many, evenly spread over all of [0, T). "10,0,10": T split into as many equal sections, each
    with its own count, which may be 0. "ddim25": the smallest integer stride that gives exactly that many, starting
    at 0.
    Raises RequestError for a count that does not fit.
    """
    text = str(respacing).strip()
    if text.startswith("ddim"):
        return _strided(num_train_timesteps, text)
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise RequestError(
            f'cannot read {respacing!r} as steps; expected a number, sections like "10,10,10" or "ddim50"'
        ) from error
    size, extra = divmod(num_train_timesteps, len(counts))
    least = 1 if len(counts) == 1 else 0
    chosen: list[int] = []
    start = 0
    for index, count in enumerate(counts):
        section = size + (index < extra)
        if not least <= count <= section:
            raise RequestError(
                f"cannot take {count} steps from a section of {section} timesteps; take {least} to {section}"
            )
        stride = (section - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += stride
        start += section
    if not chosen:
        raise RequestError(f"{respacing!r} takes no step of any section; give one of them a count of 1 or more")
    return np.array(chosen, dtype=np.int64)


def _strided(num_train_timesteps: int, text: str) -> NDArray[np.int64]:
    try:
        count = int(text.removeprefix("ddim"))
    except ValueError as error:
        raise RequestError(f'cannot read {text!r}; expected "ddim" and a number, like "ddim50"') from error
    for stride in range(1, num_train_timesteps):
        if len(range(0, num_train_timesteps, stride)) == count:
            return np.arange(0, num_train_timesteps, stride, dtype=np.int64)
    remedy = f'use {count} without "ddim" instead' if 1 <= count <= num_train_timesteps else "take fewer, and 2 or more"
    raise RequestError(f"no integer stride gives {count} of {num_train_timesteps} timesteps; {remedy}")
