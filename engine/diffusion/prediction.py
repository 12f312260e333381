"""What a network predicts, with which variance, and the conventions its original sampled with."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from engine.diffusion.continuous import LogSnr
from engine.diffusion.schedule import Float64, NoiseSchedule
from engine.errors import ConfigError, RequestError


class Prediction(Enum):
    """The quantity in the first C output channels; X_PREV is the mean of x_{t-1}, t - 1 being the training's."""

    EPS = "eps"
    X0 = "x0"
    V = "v"
    X_PREV = "x_prev"


class Variance(Enum):
    """The variance of a DDPM step: the posterior's, beta, or interpolated by C further output channels."""

    FIXED_SMALL = "fixed_small"
    FIXED_LARGE = "fixed_large"
    LEARNED_RANGE = "learned_range"


class Spacing(Enum):
    """Which N of T timesteps a sampler visits when it is given a count.

    EVEN: as improved-diffusion, both ends included. LEADING, TRAILING, LINSPACE: as diffusers, leading with its
    offset. TRUNCATED: linspace(-1, T - 1, N + 1) without its first entry, cut to integers, as lucidrains.
    """

    EVEN = "even"
    LEADING = "leading"
    TRAILING = "trailing"
    LINSPACE = "linspace"
    TRUNCATED = "truncated"


@dataclass(frozen=True, slots=True)
class Diffusion:
    """How a checkpoint's network is to be sampled.

    clip: |x0| limit of the original's sampler, or None. percentile: in (0, 1], of dynamic thresholding (Imagen), whose
    limit then lies between 1 and clip; or None. timestep_scale: factor from training timestep to the
    network's input (1000 / T with rescale_timesteps). data_range: the original's image values; ours are [-1, 1].
    spacing, spacing_offset: the timesteps of a shorter run (the offset is added to LEADING ones). keeps_eps: DDIM
    takes the network's own eps beside a limited x0, rather than the eps that the limited x0 implies. strides: DDIM in
    N steps goes from t to t - T // N, visited next or not. ends_at_first: its last step goes to alphas_cumprod[0], not
    to 1. noises_last: DDPM adds the last step's noise as well, unless that step is timestep 0.
    log_snr: of continuous time; the network is then given the log-SNR as its time, tables slice time, and schedule is
    one such slicing.
    """

    schedule: NoiseSchedule
    prediction: Prediction = Prediction.EPS
    variance: Variance = Variance.FIXED_LARGE
    clip: float | None = 1.0
    timestep_scale: float = 1.0
    data_range: tuple[float, float] = (-1.0, 1.0)
    spacing: Spacing = Spacing.EVEN
    spacing_offset: int = 0
    keeps_eps: bool = False
    strides: bool = False
    ends_at_first: bool = False
    noises_last: bool = False
    log_snr: LogSnr | None = None
    percentile: float | None = None

    def __post_init__(self) -> None:
        if self.percentile is not None and not 0 < self.percentile <= 1:
            raise ConfigError(f"the percentile of dynamic thresholding is {self.percentile}; expected 0 < p <= 1")
        if self.percentile is not None and self.clip is not None and self.clip < 1:
            raise ConfigError(f"dynamic thresholding has a largest limit of {self.clip}; expected 1 or more")


def x0_coefficients(schedule: NoiseSchedule, prediction: Prediction) -> tuple[Float64, Float64]:
    """(A, B), each [T], with x0 = A x_t + B out.

    eps: x0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar), DDPM (2020), eq. 15; v: x0 = sqrt(abar) x_t - sqrt(1 - abar) v,
    Salimans & Ho (2022), appendix D; x_prev: DDPM eq. 7 solved for x_0.
    Raises RequestError for x_prev on a schedule that leaves timesteps out.
    """
    abar = schedule.alphas_cumprod
    match prediction:
        case Prediction.EPS:
            return np.sqrt(1 / abar), -np.sqrt(1 / abar - 1)
        case Prediction.X0:
            return np.zeros_like(abar), np.ones_like(abar)
        case Prediction.V:
            return np.sqrt(abar), -np.sqrt(1 - abar)
        case Prediction.X_PREV:
            if not np.array_equal(schedule.timesteps, np.arange(len(schedule))):
                raise RequestError(
                    f"this network predicts x_(t-1) of each training timestep, and {len(schedule)} chosen ones do not "
                    "say what that is; use all training timesteps here"
                )
            return -schedule.posterior_mean_xt / schedule.posterior_mean_x0, 1 / schedule.posterior_mean_x0


def eps_coefficients(schedule: NoiseSchedule, prediction: Prediction) -> tuple[Float64, Float64]:
    """(a, b), each [T], with eps = a x_t + b out: the noise that an unlimited prediction implies."""
    abar = schedule.alphas_cumprod
    match prediction:
        case Prediction.EPS:
            return np.zeros_like(abar), np.ones_like(abar)
        case Prediction.X0:
            return 1 / np.sqrt(1 - abar), -np.sqrt(abar / (1 - abar))
        case Prediction.V:
            return np.sqrt(1 - abar), np.sqrt(abar)
        case Prediction.X_PREV:
            a, b = x0_coefficients(schedule, prediction)
            return (1 - np.sqrt(abar) * a) / np.sqrt(1 - abar), -np.sqrt(abar / (1 - abar)) * b


def log_variance_bounds(schedule: NoiseSchedule, variance: Variance) -> tuple[Float64, Float64]:
    """(L0, L1), each [T]: log variance at f = 0 and f = 1 of a DDPM step; equal for a fixed variance.

    Learned range: posterior and beta, Improved DDPM (2021), eq. 15.
    """
    match variance:
        case Variance.FIXED_SMALL:
            small = schedule.posterior_log_variance
            return small, small
        case Variance.FIXED_LARGE:
            large = np.log(schedule.fixed_large_variance)
            return large, large
        case Variance.LEARNED_RANGE:
            return schedule.posterior_log_variance, np.log(schedule.betas)
