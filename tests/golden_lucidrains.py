"""Golden runs of lucidrains' denoising-diffusion-pytorch, with its class-conditional network and continuous time."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import Case, Facts, Run, Runner, flatten, ignore, keep, run_slots, to_facts
from torch import Tensor

from engine.backends import Backend
from engine.backends.eager import EagerBackend
from engine.checkpoint import Checkpoint, load_checkpoint, read_file
from engine.families.lucidrains import find_objective
from engine.noise import RecordedNoise
from engine.prediction import Diffusion, Prediction, Variance
from engine.sampler import Sampler
from engine.schedule import NoiseSchedule
from engine.solvers import COLUMNS, StepTable, ddim_table, ddpm_table

_OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}


def _per_level(one: str, several: str) -> Facts:
    """A number, or a list with one for each level."""
    return lambda value: {several: tuple(value)} if isinstance(value, list) else {one: value}


# key of config_from_user -> facts
FACTS: dict[str, Facts] = {
    "image_size": keep("image_size"),
    "groups": keep("num_groups"),
    "heads": _per_level("num_heads", "level_heads"),
    "dim_head": _per_level("num_head_channels", "level_head_channels"),
    "theta": keep("time_theta"),
    "objective": lambda value: {"prediction": _OBJECTIVES[value]},
    "auto_normalize": keep("auto_normalize"),
    "noise_schedule": keep("noise_schedule"),
    # How a class-conditional sampler is run, not what the checkpoint is.
    "cfg_plus_plus": ignore,
}


def _version(case: Case) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", case.data["original"]["version"]))


@functools.lru_cache(maxsize=8)
def checkpoint(case: Case, weights: str = "ema") -> Checkpoint:
    """The case's checkpoint with averaged ("ema") or raw weights."""
    facts = to_facts(flatten(case.data["config_from_user"]), FACTS)
    if _version(case) < (1, 0):
        # Files have had a version entry since 1.0; before, which release wrote it is for the user to say.
        facts["release"] = case.data["original"]["version"]
    chosen = load_checkpoint(_file(case), weights=weights, **facts)
    if chosen.diffusion.variance is Variance.LEARNED_RANGE:
        # With learned variance the network predicts eps whatever objective the diffusion was given.
        facts.pop("prediction", None)
        chosen = load_checkpoint(_file(case), weights=weights, **facts)
    return chosen


def _file(case: Case) -> Any:
    return case.folder / next(iter(case.data["files"]))


class GuidedBackend:
    """Classifier-free guidance as this project combines its two calls; the sampler sees one network.

    scale, phi: strength, and how much of the result takes the standard deviation of the conditional call. Releases that
    project keep `parallel` of the update's component along the conditional call.
    """

    def __init__(self, backend: EagerBackend, scale: float, phi: float, parallel: float) -> None:
        self.manifest, self.device = backend.manifest, backend.device
        self.name, self.precision = backend.name, backend.precision
        self._backend, self._scale, self._phi, self._parallel = backend, scale, phi, parallel

    def __call__(self, x_t: Tensor, timestep: Tensor, y: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        return self.both(x_t, timestep, y, cond)[0]

    def both(
        self, x_t: Tensor, timestep: Tensor, y: Tensor | None, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The guided result and that of the null class."""
        assert y is not None
        null_class = self.manifest.config.null_class
        assert null_class is not None
        with_class = self._backend(x_t, timestep, y, cond)
        without = self._backend(x_t, timestep, torch.full_like(y, null_class), cond)
        update = with_class - without
        unit = torch.nn.functional.normalize(with_class.flatten(1).double(), dim=1)
        along = (update.flatten(1).double() * unit).sum(1, keepdim=True) * unit
        update = update - (1 - self._parallel) * along.reshape(update.shape).float()
        guided = with_class + (self._scale - 1) * update
        ratio = with_class.flatten(1).std(1) / guided.flatten(1).std(1)
        return guided * (self._phi * ratio + 1 - self._phi)[:, None, None, None], without

    def close(self) -> None:
        self._backend.close()


def _guided(run: Run, chosen: Checkpoint, kw: dict[str, Any], defaults: dict[str, float]) -> GuidedBackend:
    settings = defaults | kw
    # 2.0.16 and later remove the parallel component unless told otherwise.
    removes = settings.get("remove_parallel_component", _version(run.case) >= (2, 0, 16))
    parallel = float(settings.get("keep_parallel_frac", 0.0)) if removes else 1.0
    return GuidedBackend(
        EagerBackend.from_checkpoint(chosen), float(settings["cond_scale"]), float(settings["rescaled_phi"]), parallel
    )


def _backend(run: Run) -> Backend:
    """What a sampler calls: guided where the network has classes, with the sampler's own defaults."""
    chosen = checkpoint(run.case)
    if "y" not in run.arrays():
        return EagerBackend.from_checkpoint(chosen)
    is_late = _version(run.case) >= (1, 6, 3)
    defaults = {"cond_scale": 6.0, "rescaled_phi": 0.7} if is_late else {"cond_scale": 3.0, "rescaled_phi": 0.0}
    return _guided(run, chosen, run.parameters.get("kw", {}), defaults)


def _forward(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    results = {}
    for name, kind in {"out": "ema", "out_raw": "raw"}.items():
        if name in a:
            chosen = checkpoint(run.case, kind)
            unet, y, cond = chosen.unet(), a.get("y"), a.get("x_self_cond")
            if y is not None and run.parameters.get("cond_drop_prob", 0.0) == 1.0:
                y = torch.full_like(y, unet.config.null_class or 0)
            if unet.config.self_condition and cond is None:
                cond = torch.zeros_like(a["x"])
            with torch.inference_mode():
                results[name] = unet(a["x"], a["t"].float(), y, cond)
    return results


def _forward_cond_scale(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    kw = run.parameters.get("kw", {}) | {"cond_scale": run.parameters["cond_scale"]}
    results = {}
    for name, kind in {"out": "ema", "out_raw": "raw"}.items():
        if name in a:
            guided = _guided(run, checkpoint(run.case, kind), kw, {"rescaled_phi": 0.0})
            results[name], results[name.replace("out", "out_null")] = guided.both(a["x"], a["t"].float(), a["y"])
    return {name: value for name, value in results.items() if name in a}


def _sample(run: Run, a: dict[str, Tensor], table: StepTable, start: Tensor, z: Tensor) -> dict[str, Tensor]:
    """x after each step, [steps, N, C, H, W], and its last entry."""
    backend = _backend(run)
    n = len(start)
    requests = Sampler(backend).requests(n, table, a["y"].tolist() if "y" in a else None, seeds=range(n))
    traj, _ = run_slots(backend, requests, RecordedNoise(start.numpy(), z.numpy()))
    return {name: value for name, value in {"traj": traj, "sample": traj[-1]}.items() if name in a}


def _mapped(diffusion: Diffusion, results: dict[str, Tensor]) -> dict[str, Tensor]:
    low, high = diffusion.data_range
    return {name: (value + 1) / 2 * (high - low) + low for name, value in results.items()}


def _noise(a: dict[str, Tensor]) -> Tensor:
    return a["z"] if "z" in a else torch.zeros(0, *a["x_T"].shape)


def _ancestral(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    diffusion = checkpoint(run.case).diffusion
    table = ddpm_table(diffusion, run.parameters["steps"])
    return _mapped(diffusion, _sample(run, a, table, a["x_T"], _noise(a)))


def _continuous(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    diffusion = checkpoint(run.case).diffusion
    results = _sample(run, a, ddpm_table(diffusion, run.parameters["steps"]), a["x_T"], _noise(a))
    return _mapped(diffusion, results | {"sample": results["sample"].clamp(-1, 1)})


def _ddim(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    if run.case.data["config_from_user"].get("cfg_plus_plus"):
        pytest.skip("CFG++ takes the noise of the unguided call beside the guided x0; a row has one network result")
    diffusion = checkpoint(run.case).diffusion
    objective = run.case.data["config_from_user"].get("objective")
    if diffusion.variance is Variance.LEARNED_RANGE and objective:
        # Its DDIM, unlike its ancestral sampler, does go by the objective.
        diffusion = dataclasses.replace(diffusion, prediction=Prediction(_OBJECTIVES[objective]))
    table = ddim_table(diffusion, run.parameters["steps"], run.parameters["eta"])
    return _mapped(diffusion, _sample(run, a, table, a["x_T"], _noise(a)))


def _interpolate(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    """Both images noised to timestep t and mixed, then steps t - 1 to 0; the result stays in [-1, 1]."""
    diffusion, t, lam = checkpoint(run.case).diffusion, run.parameters["t"], run.parameters["lam"]
    abar = diffusion.schedule.alphas_cumprod[t]
    first, second = (np.sqrt(abar) * a[x] + np.sqrt(1 - abar) * a["z"][i] for i, x in enumerate(("x1", "x2")))
    table = ddpm_table(diffusion, len(diffusion.schedule))
    rest = StepTable(**{name: getattr(table, name)[-t:] for name in COLUMNS})
    return _sample(run, a, rest, ((1 - lam) * first + lam * second).float(), a["z"][2:])


def _schedule(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    s: NoiseSchedule = checkpoint(run.case).diffusion.schedule
    abar = s.alphas_cumprod
    known = {
        "betas": s.betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": s.alphas_cumprod_prev,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior_variance": s.posterior_variance,
        "posterior_log_variance_clipped": np.log(np.maximum(s.posterior_variance, 1e-20)),
        "posterior_mean_coef1": s.posterior_mean_x0,
        "posterior_mean_coef2": s.posterior_mean_xt,
        "loss_weight": _loss_weight(run.case, s),
        # Training's: 1 unless gamma was given.
        "p2_loss_weight": np.ones(len(s)),
    }
    return {name: np.array(value) for name, value in known.items() if name in a}


def _loss_weight(case: Case, schedule: NoiseSchedule) -> np.ndarray | None:
    stored = read_file(_file(case))["model"].get("loss_weight")
    found = find_objective(stored, schedule) if stored is not None else None
    if found is None:
        return None
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    factor = {Prediction.EPS: snr, Prediction.X0: np.ones_like(snr), Prediction.V: snr + 1}[found[0]]
    return np.clip(snr, found[1], found[2]) / factor


RUNNERS: dict[str, Runner] = {
    "forward": _forward,
    "forward_cond_scale": _forward_cond_scale,
    "schedule": _schedule,
    "ancestral": _ancestral,
    "ct_ancestral": _continuous,
    "ddim": _ddim,
    "interpolate": _interpolate,
}
