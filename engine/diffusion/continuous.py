"""Diffusion in continuous time: the log-SNR as a function of t in [0, 1], and its slicing into timesteps.

Kingma et al., Variational diffusion models (2021): x_t = alpha x_0 + sigma eps with alpha^2 = sigmoid(log_snr(t)) and
sigma^2 = sigmoid(-log_snr(t)); t = 0 is the clean end. The network is given log_snr(t) as its time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from engine.diffusion.schedule import Float64, NoiseSchedule
from engine.errors import ConfigError

_CLEAN, _NOISY = (-math.log(math.expm1(1e-4 + 10 * t)) for t in (0.0, 1.0))
"""log_snr(0) and log_snr(1) of the linear schedule; a learned one has the same ends."""


@dataclass(frozen=True, slots=True)
class MonotoneNet:
    """n(t) = z + outer . sigmoid(inner z + inner_shift) + outer_shift, z = slope t + shift; no weight is negative.

    Kingma et al. (2021), appendix H. inner, inner_shift, outer: one number for each hidden unit.
    """

    slope: float
    shift: float
    inner: tuple[float, ...]
    inner_shift: tuple[float, ...]
    outer: tuple[float, ...]
    outer_shift: float

    def __call__(self, t: Float64) -> Float64:
        """n(t) for t [N]."""
        z = self.slope * t + self.shift
        hidden = _sigmoid(z[:, None] * np.array(self.inner) + np.array(self.inner_shift))
        value: Float64 = z + hidden @ np.array(self.outer) + self.outer_shift
        return value


@dataclass(frozen=True, slots=True)
class LogSnr:
    """log(alpha^2 / sigma^2) as a function of time, falling. name: linear, cosine or learned (which has a net)."""

    name: str
    net: MonotoneNet | None = None

    def __post_init__(self) -> None:
        if self.name not in ("linear", "cosine", "learned") or (self.name == "learned") != (self.net is not None):
            raise ConfigError(
                f"no log-SNR schedule {self.name!r} {'with' if self.net else 'without'} a network; known: linear, "
                "cosine, and learned with one"
            )

    def __call__(self, t: Float64) -> Float64:
        """log-SNR at t [N] in [0, 1]."""
        if self.net is not None:
            ends = self.net(np.array([0.0, 1.0]))
            return _CLEAN + (_NOISY - _CLEAN) * (self.net(t) - ends[0]) / (ends[1] - ends[0])
        if self.name == "linear":
            return -np.log(np.expm1(1e-4 + 10 * t**2))
        # Improved DDPM (2021), eq. 17. The angle is a float32 as in training: at t = 1 its cosine is then 4e-8 and
        # the log-SNR -34, in float64 it would be -75, a time that the network has never seen.
        angle = (t.astype(np.float32) + np.float32(0.008)) / np.float32(1.008) * np.float32(math.pi) * np.float32(0.5)
        return -np.log(np.maximum(np.cos(angle.astype(np.float64)) ** -2 - 1, 1e-5))


@dataclass(frozen=True, slots=True, eq=False)
class TimeSlices(NoiseSchedule):
    """Continuous time cut into N equal steps: entry i is t = (i + 1) / N. The clean end is t = 0, where abar < 1.

    log_snr: [N]; clean: log-SNR at t = 0. betas follow from them.
    """

    log_snr: Float64 = field(default_factory=lambda: np.zeros(0))
    clean: float = math.inf

    @property
    def alphas_cumprod(self) -> Float64:
        """alpha^2 of each entry, [N]; as exact near 0 as near 1."""
        return _sigmoid(self.log_snr)

    @property
    def alphas_cumprod_prev(self) -> Float64:
        """alpha^2 of the next cleaner entry; of t = 0 for the first."""
        return np.append(_sigmoid(np.array([self.clean])), self.alphas_cumprod[:-1])

    @property
    def network_times(self) -> Float64:
        """The log-SNR itself."""
        return self.log_snr


def time_slices(log_snr: LogSnr, count: int) -> TimeSlices:
    """`count` equal steps from t = 1 to t = 0 as a schedule of that many timesteps."""
    values = log_snr(np.linspace(0.0, 1.0, count + 1))
    abar = _sigmoid(values)
    return TimeSlices(1 - abar[1:] / abar[:-1], log_snr=values[1:], clean=float(values[0]))


def _sigmoid(x: Float64) -> Float64:
    value: Float64 = np.exp(-np.logaddexp(0.0, -x))
    return value
