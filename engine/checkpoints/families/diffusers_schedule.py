"""A diffusers scheduler_config.json (DDPM or DDIM) as schedule, prediction and sampling conventions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from engine.checkpoints.families.diffusers_options import Options, is_count, is_number
from engine.checkpoints.types import Assumptions
from engine.diffusion.prediction import Diffusion, Prediction, Spacing, Variance
from engine.diffusion.schedule import LARGEST_BETA, Float64, NoiseSchedule, cosine_schedule
from engine.errors import CheckpointError

_CLASSES = ("DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler")
_PREDICTIONS = {"epsilon": Prediction.EPS, "sample": Prediction.X0, "v_prediction": Prediction.V}
# The square root of the exponential of the logarithm is the square root: the _log forms mean the same variance.
_VARIANCES = {
    "fixed_small": Variance.FIXED_SMALL,
    "fixed_small_log": Variance.FIXED_SMALL,
    "fixed_large": Variance.FIXED_LARGE,
    "fixed_large_log": Variance.FIXED_LARGE,
    "learned_range": Variance.LEARNED_RANGE,
}
_SPACINGS = {"leading": Spacing.LEADING, "trailing": Spacing.TRAILING, "linspace": Spacing.LINSPACE}


def read_scheduler(options: Options, assume: Assumptions, has_range: bool) -> Diffusion:
    """What a scheduler_config.json says; has_range: the network has variance channels.

    Raises CheckpointError for another scheduler, an unsupported value or a fact of the user that contradicts the file.
    """
    options.choice("_class_name", "DDPMScheduler", _CLASSES)
    name = options.choice("variance_type", "learned_range" if has_range else "fixed_small", _VARIANCES)
    if (name == "learned_range") is not has_range:
        wanted = "learned_range" if has_range else "another value"
        raise options.wrong("variance_type", f"{wanted}: the network has {'' if has_range else 'no '}variance channels")
    limit, percentile = _limit(options)
    schedule = NoiseSchedule(_betas(options))
    prediction = _prediction(options)
    said = {
        "num_train_timesteps": len(schedule),
        "prediction": prediction.value,
        "variance": _VARIANCES[name].value,
        "clip_denoised": limit is not None,
    }
    for fact, stored in said.items():
        given = assume.given(fact)
        if given is not None and given != stored:
            raise CheckpointError(
                f"{fact} is given as {given!r}, but scheduler_config.json says {stored!r}; leave the flag out, or edit "
                "the file"
            )
    return Diffusion(
        schedule,
        prediction,
        _VARIANCES[name],
        clip=limit,
        percentile=percentile,
        spacing=_SPACINGS[options.choice("timestep_spacing", "leading", _SPACINGS)],
        spacing_offset=options.take("steps_offset", 0, lambda v: v == 0 or is_count(v), "a whole number from 0 up"),
        keeps_eps=True,
        strides=True,
        ends_at_first=not options.flag("set_alpha_to_one", True),
        noises_last=True,
    )


def _limit(options: Options) -> tuple[float | None, float | None]:
    """(clip, percentile) of Diffusion; with thresholding the clipping entries are not read, as in diffusers."""
    clips, fixed = options.flag("clip_sample", True), options.number("clip_sample_range", 1.0)
    if not options.flag("thresholding", False):
        return (fixed if clips else None), None
    ratio, largest = options.number("dynamic_thresholding_ratio", 0.995), options.number("sample_max_value", 1.0)
    if not 0 < ratio <= 1:
        raise options.wrong("dynamic_thresholding_ratio", "a number above 0, at most 1")
    if largest < 1:
        raise options.wrong("sample_max_value", "a number of at least 1")
    return largest, ratio


def assumed_scheduler(assume: Assumptions, has_range: bool) -> Diffusion:
    """A folder without a scheduler: the defaults of DDPMScheduler, each an assumption."""
    why = "the default of DDPMScheduler; the folder has no scheduler_config.json"
    steps: int = assume.take("num_train_timesteps", 1000, why)
    kind = assume.take("noise_schedule", "linear", why)
    if kind == "linear":
        first, last = assume.take("beta_start", 1e-4, why), assume.take("beta_end", 0.02, why)
        schedule = NoiseSchedule(np.linspace(first, last, steps))
    elif kind == "cosine":
        schedule = cosine_schedule(steps)
    else:
        raise CheckpointError(f"noise_schedule is {kind!r}; diffusers has linear and cosine without a scheduler's file")
    variance = Variance.LEARNED_RANGE if has_range else Variance(assume.take("variance", "fixed_small", why))
    prediction = Prediction(assume.take("prediction", "eps", why))
    clips = assume.take("clip_denoised", True, why)
    return Diffusion(
        schedule,
        prediction,
        variance,
        clip=1.0 if clips else None,
        spacing=Spacing.LEADING,
        keeps_eps=True,
        strides=True,
        noises_last=True,
    )


def _prediction(options: Options) -> Prediction:
    """prediction_type, or predict_epsilon of releases before 0.10."""
    default = "epsilon" if options.flag("predict_epsilon", True) else "sample"
    return _PREDICTIONS[options.choice("prediction_type", default, _PREDICTIONS)]


def _betas(options: Options) -> Float64:
    """The betas that a scheduler of diffusers computes in float32, here in float64."""
    steps: int = options.take("num_train_timesteps", 1000, is_count, "a whole number")
    first, last = options.number("beta_start", 1e-4), options.number("beta_end", 0.02)
    kind = options.choice(
        "beta_schedule", "linear", ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
    )
    trained = options.take("trained_betas", None, _is_optional_numbers, "null or a list of numbers")
    if trained is not None:
        if len(trained) != steps:
            raise CheckpointError(f"trained_betas holds {len(trained)} numbers and num_train_timesteps is {steps}")
        betas = np.array(trained, dtype=np.float64)
    elif kind == "linear":
        betas = np.linspace(first, last, steps)
    elif kind == "scaled_linear":
        betas = np.linspace(math.sqrt(first), math.sqrt(last), steps) ** 2
    elif kind == "sigmoid":
        betas = (last - first) / (1 + np.exp(-np.linspace(-6, 6, steps))) + first
    else:
        betas = cosine_schedule(steps).betas if kind == "squaredcos_cap_v2" else _from_abar(_laplace, steps)
    return _with_zero_snr(betas) if options.flag("rescale_betas_zero_snr", False) else betas


def _from_abar(abar: Callable[[float], float], steps: int) -> Float64:
    """betas at most 0.999 of a continuous alphas_cumprod(t), 0 <= t <= 1."""
    return np.array([min(1 - abar((i + 1) / steps) / abar(i / steps), 0.999) for i in range(steps)])


def _laplace(t: float) -> float:
    """Hang et al., Improved Noise Schedule for Diffusion Training (2024), as diffusers writes it."""
    log_snr = -0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def _with_zero_snr(betas: Float64) -> Float64:
    """Betas whose last alphas_cumprod is 0 in float32 and whose first stays; Lin et al. (2023), algorithm 1."""
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    abar = root**2
    alphas = np.append(abar[0], abar[1:] / abar[:-1])
    rescaled: Float64 = np.minimum(1 - alphas, LARGEST_BETA)
    return rescaled


def _is_optional_numbers(value: Any) -> bool:
    return value is None or (isinstance(value, list) and len(value) > 0 and all(is_number(v) for v in value))
