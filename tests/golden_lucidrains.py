"""Golden runs of lucidrains' denoising-diffusion-pytorch, with its class-conditional network and continuous time."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import numpy as np
import torch
from elementwise import guided
from golden_cases import Case, Facts, Run, Runner, flatten, ignore, keep, run_slots, to_facts
from torch import Tensor

from engine.backends.eager.eager_backend import EagerBackend
from engine.checkpoints.families.lucidrains import find_objective
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.reading import read_file
from engine.checkpoints.types import Checkpoint
from engine.diffusion.guidance import ClassifierFreeGuidance
from engine.diffusion.noise import RecordedNoise
from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import NoiseSchedule
from engine.diffusion.solvers import COLUMNS, StepTable, ddim_table, ddpm_table
from engine.sampling.sampler import Sampler

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


def _guidance(run: Run, kw: dict[str, Any], defaults: dict[str, float]) -> ClassifierFreeGuidance:
    settings = defaults | kw
    # 2.0.16 and later remove the parallel component unless told otherwise.
    removes = settings.get("remove_parallel_component", _version(run.case) >= (2, 0, 16))
    parallel = float(settings.get("keep_parallel_frac", 0.0)) if removes else 1.0
    return ClassifierFreeGuidance(
        float(settings["cond_scale"]), float(settings["rescaled_phi"]), parallel, plus_plus=_is_plus_plus(run)
    )


def _is_plus_plus(run: Run) -> bool:
    """CFG++, a form of DDIM alone: without an E column it changes nothing."""
    return bool(run.case.data["config_from_user"].get("cfg_plus_plus"))


def _sampling_guidance(run: Run) -> ClassifierFreeGuidance:
    """The run's, with the sampler's own defaults."""
    is_late = _version(run.case) >= (1, 6, 3)
    defaults = {"cond_scale": 6.0, "rescaled_phi": 0.7} if is_late else {"cond_scale": 3.0, "rescaled_phi": 0.0}
    return _guidance(run, run.parameters.get("kw", {}), defaults)


def _forward(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    results = {}
    for name, kind in {"out": "ema", "out_raw": "raw"}.items():
        if name in a:
            chosen = checkpoint(run.case, kind)
            unet, y, image = chosen.unet(), a.get("y"), a.get("x_self_cond")
            if y is not None and run.parameters.get("cond_drop_prob", 0.0) == 1.0:
                y = torch.full_like(y, unet.config.null_class or 0)
            if unet.config.self_condition and image is None:
                image = torch.zeros_like(a["x"])
            with torch.inference_mode():
                results[name] = unet(a["x"], a["t"].float(), y, image)
    return results


def _forward_cond_scale(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    kw = run.parameters.get("kw", {}) | {"cond_scale": run.parameters["cond_scale"]}
    results = {}
    for name, kind in {"out": "ema", "out_raw": "raw"}.items():
        if name in a:
            unet, guidance = checkpoint(run.case, kind).unet(), _guidance(run, kw, {"rescaled_phi": 0.0})
            null = torch.full_like(a["y"], unet.config.null_class)
            with torch.inference_mode():
                labelled, without = (unet(a["x"], a["t"].float(), y) for y in (a["y"], null))
            results[name] = guided(labelled, without, guidance, a["x"].shape[1])
            results[name.replace("out", "out_null")] = without
    return {name: value for name, value in results.items() if name in a}


def _sample(run: Run, a: dict[str, Tensor], table: StepTable, start: Tensor, z: Tensor) -> dict[str, Tensor]:
    """x after each step, [steps, N, C, H, W], and its last entry."""
    backend = EagerBackend.from_checkpoint(checkpoint(run.case))
    n = len(start)
    options = {"labels": a["y"].tolist(), "guidance_scale": _sampling_guidance(run)} if "y" in a else {}
    requests = Sampler(backend).requests(n, table=table, seeds=range(n), **options)
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
    diffusion = checkpoint(run.case).diffusion
    if _is_plus_plus(run):
        diffusion = dataclasses.replace(diffusion, keeps_eps=True)
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
