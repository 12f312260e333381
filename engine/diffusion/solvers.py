"""Samplers as tables: one row of coefficients a step, computed in float64.

    x0     = limit(A*x_t + B*out)
    x0     = x0 + H*grad
    var    = exp(L0 + f*(L1 - L0))            f = (v + 1)/2 for a learned-range network, else 0
    x_prev = P*x0 + Q*x_t + E*out + R*x0_before + O1*o1 + O2*o2 + O3*o3 + G*var*grad + S*sqrt(var)*z
    x_prev = m*x_prev + (1 - m)*(K*known + N*z')        where a part of the image is known

o1, o2 and o3 are the outs of earlier rows, newest first: a row with push adds its own. A coefficient of 0 means that
its operand is not used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine.diffusion.ladder import Steps, sliced, visited
from engine.diffusion.prediction import (
    Diffusion,
    Prediction,
    Variance,
    eps_coefficients,
    log_variance_bounds,
    x0_coefficients,
)
from engine.diffusion.schedule import Float64, NoiseSchedule
from engine.errors import RequestError


@dataclass(frozen=True, slots=True, eq=False)
class StepTable:
    """One sampler: columns of [N] float64, row 0 the first step taken.

    timestep: the network's time input. clip: |x0| limit, inf for none. percentile: of dynamic thresholding, whose
    largest limit is then clip; 0 for none. K, N: sqrt(abar) and sqrt(1 - abar) of the level that a row goes to.
    push: 1 where the row's out is kept for later rows, else 0. The other columns are the coefficients in the module's
    formulas.
    """

    timestep: Float64
    A: Float64
    B: Float64
    clip: Float64
    percentile: Float64
    P: Float64
    Q: Float64
    H: Float64
    L0: Float64
    L1: Float64
    E: Float64
    R: Float64
    G: Float64
    S: Float64
    K: Float64
    N: Float64
    O1: Float64
    O2: Float64
    O3: Float64
    push: Float64

    def __len__(self) -> int:
        return len(self.timestep)

    def last(self, count: int) -> StepTable:
        """Its last `count` rows as a table: its first rows no longer have an x0 or outs of rows before.

        What such a row took from before it takes from the oldest that it has.
        """
        kept = {name: getattr(self, name)[len(self) - count :].copy() for name in COLUMNS}
        kept["P"][0] += kept["R"][0]
        kept["R"][0] = 0.0
        pushed = 0
        for row in range(min(count, 4)):
            for age in range(3, pushed, -1):
                kept[f"O{age - 1}" if age > 1 else "E"][row] += kept[f"O{age}"][row]
                kept[f"O{age}"][row] = 0.0
            pushed += int(kept["push"][row])
        return StepTable(**kept)

    def to_array(self) -> Float64:
        """[N, number of columns] in the order of COLUMNS."""
        return np.stack([getattr(self, name) for name in COLUMNS], axis=1)


_LOG_LEAST_VARIANCE = float(np.log(1e-20))
"""Where a variance of 0 has to have a logarithm, as in diffusers and lucidrains."""


COLUMNS = tuple(f.name for f in dataclasses.fields(StepTable))


def _at(
    diffusion: Diffusion,
    schedule: NoiseSchedule,
    coefficients: Callable[[NoiseSchedule, Prediction], tuple[Float64, Float64]],
) -> tuple[Float64, Float64]:
    """Coefficients of the prediction at the timesteps visited: they belong to the schedule of training."""
    visited = np.searchsorted(diffusion.schedule.timesteps, schedule.timesteps)
    a, b = coefficients(diffusion.schedule, diffusion.prediction)
    return a[visited], b[visited]


def _levels(abar: Float64) -> dict[str, Float64]:
    """K and N of rows that go to alphas_cumprod abar."""
    return {"K": np.sqrt(abar), "N": np.sqrt(1 - abar)}


def starting_level(diffusion: Diffusion, table: StepTable) -> float:
    """alphas_cumprod at which the first row of a table takes its x_t."""
    time = float(table.timestep[0])
    if diffusion.log_snr is not None:
        return float(1 / (1 + np.exp(-time)))
    index = np.searchsorted(diffusion.schedule.timesteps, round(time / diffusion.timestep_scale))
    return float(diffusion.schedule.alphas_cumprod[index])


def _common(diffusion: Diffusion, schedule: NoiseSchedule) -> dict[str, Float64]:
    """The columns every table shares, entry t at index t, and zeros for the others."""
    a, b = _at(diffusion, schedule, x0_coefficients)
    columns = {name: np.zeros(len(schedule)) for name in COLUMNS}
    clip = np.inf if diffusion.clip is None else diffusion.clip
    return columns | {
        "timestep": schedule.network_times * diffusion.timestep_scale,
        "A": a,
        "B": b,
        "clip": np.full(len(schedule), clip),
        "percentile": np.full(len(schedule), diffusion.percentile or 0.0),
    }


def _descending(columns: dict[str, Float64]) -> StepTable:
    return StepTable(**{name: values[::-1].copy() for name, values in columns.items()})


def ddpm_table(diffusion: Diffusion, steps: Steps, variance: Variance | None = None) -> StepTable:
    """Ancestral sampling, x_{t-1} ~ N(posterior mean(x0, x_t), var); DDPM (Ho et al., 2020), algorithm 2.

    diffusion: the checkpoint's. steps: a count, a respacing string or ascending timesteps. variance: the checkpoint's
    own unless given. Classifier guidance shifts the mean by var * grad (Dhariwal & Nichol, 2021, algorithm 1).
    """
    diffusion = sliced(diffusion, steps)
    schedule = visited(diffusion, steps)
    chosen = variance or diffusion.variance
    if chosen is Variance.LEARNED_RANGE and diffusion.variance is not Variance.LEARNED_RANGE:
        raise RequestError("this network has no variance channels; choose fixed_small or fixed_large")
    lower, upper = log_variance_bounds(schedule, chosen)
    is_noisy = (np.arange(len(schedule)) > 0).astype(np.float64)
    # The posterior variance of the last step is exactly 0; its clipped logarithm must not scale a gradient.
    shift = is_noisy if chosen is Variance.FIXED_SMALL else np.ones(len(schedule))
    if diffusion.noises_last and schedule.timesteps[0] > 0:
        last = np.log(schedule.betas[0]) if chosen is Variance.FIXED_LARGE else _LOG_LEAST_VARIANCE
        lower, upper, is_noisy = lower.copy(), upper.copy(), np.ones(len(schedule))
        lower[0] = last
        upper[0] = np.log(schedule.betas[0]) if chosen is Variance.LEARNED_RANGE else last
    return _descending(
        _common(diffusion, schedule)
        | {
            "P": schedule.posterior_mean_x0,
            "Q": schedule.posterior_mean_xt,
            "L0": lower,
            "L1": upper,
            "G": shift,
            "S": is_noisy,
        }
        | _levels(schedule.alphas_cumprod_prev)
    )


def ddim_table(diffusion: Diffusion, steps: Steps, eta: float = 0.0) -> StepTable:
    """DDIM (Song et al., 2021), eq. 12 and 16; eta 0 is deterministic, eta 1 is DDPM with the posterior variance.

    diffusion: the checkpoint's. steps: a count, a respacing string or ascending timesteps.

    eps is re-derived from the limited x0, as in guided-diffusion, or the network's own (Diffusion.keeps_eps). A
    classifier's gradient moves eps by -sqrt(1 - abar) grad (Dhariwal & Nichol, 2021, algorithm 2), which is H on x0.
    Raises RequestError for eta < 0 or an eta whose noise would exceed the step's whole variance.
    """
    diffusion = sliced(diffusion, steps)
    schedule = visited(diffusion, steps)
    abar, previous = schedule.alphas_cumprod, _ddim_targets(diffusion, schedule, steps)
    is_finite = bool(np.isfinite(eta))
    variance = (1 - previous) / (1 - abar) * np.maximum(1 - abar / previous, 0.0)
    sigma = (eta if is_finite else 0.0) * np.sqrt(variance)
    if not (is_finite and eta >= 0 and np.all(sigma**2 <= 1 - previous + 1e-12)):
        raise RequestError(f"eta must lie between 0 and 1, got {eta}")
    towards_xt = np.sqrt(np.maximum(1 - previous - sigma**2, 0.0))
    columns = _common(diffusion, schedule) | {"H": (1 - abar) / np.sqrt(abar), "S": sigma} | _levels(previous)
    if diffusion.keeps_eps:
        from_xt, from_out = _at(diffusion, schedule, eps_coefficients)
        columns |= {
            "P": np.sqrt(previous),
            "Q": towards_xt * from_xt,
            "E": towards_xt * from_out,
            "G": -towards_xt * np.sqrt(1 - abar),
        }
    else:
        columns |= {
            "P": np.sqrt(previous) - towards_xt * np.sqrt(abar / (1 - abar)),
            "Q": towards_xt / np.sqrt(1 - abar),
        }
    return _descending(columns)


def _ddim_targets(diffusion: Diffusion, schedule: NoiseSchedule, steps: Steps) -> Float64:
    """alphas_cumprod to which each step goes, [N]."""
    full = diffusion.schedule
    end = full.alphas_cumprod[0] if diffusion.ends_at_first else 1.0
    if not diffusion.strides:
        return np.append(end, schedule.alphas_cumprod[:-1])
    count = int(steps) if isinstance(steps, int | str) and str(steps).strip().isdigit() else len(schedule)
    target = np.searchsorted(full.timesteps, schedule.timesteps) - len(full) // count
    return np.where(target >= 0, full.alphas_cumprod[np.maximum(target, 0)], end)


def ddim_inversion_table(diffusion: Diffusion, steps: Steps) -> StepTable:
    """DDIM run from the clean end upwards, eta 0: encodes an image as the noise that decodes to it.

    x_{t+1} = sqrt(abar_{t+1}) x0 + sqrt(1 - abar_{t+1}) eps; DDIM (Song et al., 2021), section 4.3. The last row
    goes to abar = 0, as in guided-diffusion. Rows ascend in t.
    """
    diffusion = sliced(diffusion, steps)
    schedule = visited(diffusion, steps)
    abar, following = schedule.alphas_cumprod, schedule.alphas_cumprod_next
    towards = np.sqrt(1 - following)
    if diffusion.keeps_eps:
        from_xt, from_out = _at(diffusion, schedule, eps_coefficients)
        columns = {"P": np.sqrt(following), "Q": towards * from_xt, "E": towards * from_out}
    else:
        columns = {
            "P": np.sqrt(following) - towards * np.sqrt(abar / (1 - abar)),
            "Q": towards / np.sqrt(1 - abar),
        }
    return StepTable(**_common(diffusion, schedule) | columns | _levels(following))


def dpmpp_table(diffusion: Diffusion, steps: Steps) -> StepTable:
    """DPM-Solver++(2M), deterministic, second order, one network call a step; Lu et al. (2022), algorithm 2.

    diffusion: the checkpoint's. steps: a count, a respacing string or ascending timesteps.

    With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma) and h = lambda' - lambda, ' being the
    level that a row goes to, and r = h_before / h:

        D      = (1 + 1 / (2 r)) x0 - 1 / (2 r) x0_before
        x_prev = sigma' / sigma x_t + alpha' (1 - exp(-h)) D

    The first row and the last, which goes to sigma 0, are of first order (D = x0), as in diffusers' midpoint solver.
    A classifier's gradient moves x0 as in ddim_table. Raises RequestError for steps that do not fit.
    """
    diffusion = sliced(diffusion, steps)
    schedule = visited(diffusion, steps)
    abar = schedule.alphas_cumprod
    half_log_snr = 0.5 * (np.log(abar) - np.log1p(-abar))
    # Entry t goes from level t to level t - 1. Entry 0 goes to sigma 0, where h is infinite: all of x0, none of x_t.
    towards_xt, towards_x0, before = np.zeros(len(abar)), np.ones(len(abar)), np.zeros(len(abar))
    h = half_log_snr[:-1] - half_log_snr[1:]
    towards_xt[1:] = np.sqrt((1 - abar[:-1]) / (1 - abar[1:]))
    towards_x0[1:] = -np.sqrt(abar[:-1]) * np.expm1(-h)
    before[1:-1] = towards_x0[1:-1] * h[:-1] / (2 * h[1:])
    columns = {"H": (1 - abar) / np.sqrt(abar), "P": towards_x0 + before, "Q": towards_xt, "R": -before}
    return _descending(_common(diffusion, schedule) | columns | _levels(np.append(1.0, abar[:-1])))


_ADAMS_BASHFORTH = np.array([[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55, -59, 37, -9]])
_ADAMS_BASHFORTH[3] /= 24


def plms_table(diffusion: Diffusion, steps: Steps) -> StepTable:
    """PLMS: DDIM with eta 0 on a linear multistep mean of the last four outs; Liu et al., PNDM (2022), eq. 12.

    diffusion: the checkpoint's. steps: a count, a respacing string or ascending timesteps.

        x_prev = Q x_t + c (w0 out + w1 o1 + w2 o2 + w3 o3),    w of Adams and Bashforth, of rising order at the start

    Q and c are those of the DDIM step from its out. The first step is two rows: a trial step, then one that puts the
    mean of both ends' outs in place of the first: x_prev = x_trial + c/2 (out - o1). The weights act on the network's
    own prediction, and x0 is not limited, as in diffusers' PNDM scheduler (skip_prk_steps) and latent-diffusion. N
    steps are N + 1 calls. A classifier's gradient moves a step as it moves that of ddim_table, without a mean. Raises
    RequestError for steps that do not fit.
    """
    diffusion = sliced(diffusion, steps)
    schedule = visited(diffusion, steps)
    abar, previous = schedule.alphas_cumprod, _ddim_targets(diffusion, schedule, steps)
    from_xt, from_out = _at(diffusion, schedule, eps_coefficients)
    from_eps = np.sqrt(1 - previous) - np.sqrt(previous / abar * (1 - abar))
    columns = _common(diffusion, schedule) | _levels(previous)
    columns |= {
        "Q": np.sqrt(previous / abar) + from_eps * from_xt,
        "E": from_eps * from_out,
        "H": (1 - abar) / np.sqrt(abar),
        "G": -from_eps * np.sqrt(1 - abar),
    }
    first = {name: values[::-1] for name, values in columns.items()}
    # Row 1 is evaluated where the trial step arrived: at the second timestep, or at the only one.
    rows = np.insert(np.arange(len(schedule)), 1, min(1, len(schedule) - 1))
    kept = {name: values[rows] for name, values in first.items()}
    step = kept["E"].copy()
    weights = _ADAMS_BASHFORTH[np.clip(np.arange(len(rows)) - 1, 0, 3)]
    for name, weight in zip(("E", "O1", "O2", "O3"), weights.T, strict=True):
        kept[name] = step * weight
    kept |= {"push": np.ones(len(rows))}
    trial = step[0] / 2
    for name, value in {"Q": 1.0, "E": trial, "O1": -trial, "O2": 0.0, "O3": 0.0, "G": 0.0, "push": 0.0}.items():
        kept[name][1] = value
    kept["K"][1], kept["N"][1] = kept["K"][0], kept["N"][0]
    return StepTable(**kept)


@dataclass(frozen=True, slots=True)
class NamedSampler:
    """How the table of a sampler is made, and which options it takes.

    make: called with the diffusion, the steps and the options it takes, by name. options: those of eta, variance and
    plus_plus. noise: where its noise comes from, as a clause of a refusal; None where it adds none.
    """

    make: Callable[..., StepTable]
    options: tuple[str, ...] = ()
    noise: str | None = None


def _ddim_or_plus_plus(diffusion: Diffusion, steps: Steps, eta: float = 0.0, plus_plus: bool = False) -> StepTable:
    return ddim_table(for_plus_plus(diffusion) if plus_plus else diffusion, steps, eta)


def for_plus_plus(diffusion: Diffusion) -> Diffusion:
    """The diffusion for CFG++, whose steps go along an eps that is not the one of their limited x0."""
    return dataclasses.replace(diffusion, keeps_eps=True)


SAMPLERS: dict[str, NamedSampler] = {
    "ddim": NamedSampler(_ddim_or_plus_plus, ("eta", "plus_plus"), "the noise of ddim is set by eta"),
    "ddpm": NamedSampler(ddpm_table, ("variance",), "ddpm has its own variance"),
    "dpmpp": NamedSampler(dpmpp_table),
    "plms": NamedSampler(plms_table),
}
"""The samplers by name, the default first; whatever names a sampler reads this."""


def named_table(
    diffusion: Diffusion,
    sampler: str,
    steps: Steps,
    *,
    eta: float = 0.0,
    variance: Variance | None = None,
    plus_plus: bool = False,
) -> StepTable:
    """The table of a sampler in SAMPLERS.

    plus_plus: for classifier-free guidance in the form of CFG++. Raises RequestError for an unknown name, for steps
    that do not fit the schedule, and for an option that the sampler does not take.
    """
    if sampler not in SAMPLERS:
        raise RequestError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    named = SAMPLERS[sampler]
    given = {
        name: value
        for name, value, default in (("eta", eta, 0.0), ("variance", variance, None), ("plus_plus", plus_plus, False))
        if value != default
    }
    for name in given:
        if name in named.options:
            continue
        takers = ", ".join(other for other, one in SAMPLERS.items() if name in one.options)
        if name == "plus_plus":
            raise RequestError(f"CFG++ goes along the unlabelled eps, which {sampler} does not; use {takers}")
        if named.noise is None:
            raise RequestError(f"{sampler} adds no noise; leave eta and variance out")
        raise RequestError(f"{name} belongs to {takers}; {named.noise}")
    return named.make(diffusion, steps, **given)
