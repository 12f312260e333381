"""Golden runs of OpenAI's improved-diffusion and guided-diffusion."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import Case, Facts, Run, Runner, flatten, ignore, keep, run_slots, to_facts
from helpers import FP32_FORWARD_ROUNDING
from torch import Tensor

from engine.backends.eager.eager_backend import EagerBackend
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.guidance import ClassifierGuidance
from engine.diffusion.noise import RecordedNoise
from engine.diffusion.prediction import Diffusion, Prediction, Variance, log_variance_bounds, x0_coefficients
from engine.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule, space_timesteps
from engine.diffusion.solvers import StepTable, ddim_inversion_table, ddim_table, ddpm_table
from engine.networks.classifier import AutogradGuide
from engine.networks.inputs import Conditions
from engine.sampling.likelihood import variational_bound
from engine.sampling.requests import resize_condition
from engine.sampling.sampler import Sampler


def _order(value: bool) -> dict[str, Any]:
    return {"attention_order": "new" if value else "legacy"}


# key of config_from_user (nested with a dot) -> facts
OPENAI_FACTS: dict[str, Facts] = {
    "image_size": keep("image_size"),
    "num_heads": keep("num_heads"),
    "num_head_channels": keep("num_head_channels"),
    "num_heads_upsample": keep("num_heads_upsample"),
    "use_new_attention_order": _order,
    "diffusion.steps": keep("num_train_timesteps"),
    "diffusion.noise_schedule": keep("noise_schedule"),
    "diffusion.rescale_timesteps": keep("rescale_timesteps"),
    "diffusion.predict_xstart": lambda value: {"prediction": "x0" if value else "eps"},
    # Both are properties of training or of the weights: learned channels show in the file.
    "diffusion.learn_sigma": ignore,
    "diffusion.rescale_learned_sigmas": ignore,
}
OPENAI_CLASSIFIER_FACTS: dict[str, Facts] = {
    "num_head_channels": keep("num_head_channels"),
    "use_new_attention_order": _order,
    "pool": ignore,
}


@functools.lru_cache(maxsize=8)
def checkpoint(case: Case) -> Checkpoint:
    """The case's U-Net checkpoint."""
    config = {k: v for k, v in flatten(case.data["config_from_user"]).items() if not k.startswith("classifier.")}
    facts = to_facts(config, OPENAI_FACTS)
    name = next(n for n in case.data["files"] if n != "classifier.pt")
    return load_checkpoint(case.folder / name, family=case.family, **facts)


@functools.lru_cache(maxsize=8)
def classifier(case: Case) -> Checkpoint:
    """The case's noise-conditioned classifier."""
    user = case.data["config_from_user"]
    facts = to_facts(flatten(user.get("classifier", {})), OPENAI_CLASSIFIER_FACTS)
    return load_checkpoint(case.folder / "classifier.pt", image_size=user["image_size"], **facts)


def rounding_floor(run: Run, name: str) -> float:
    """What the rounding of one fp32 forward call becomes in x0 = A x_t + B out (helpers.FP32_FORWARD_ROUNDING).

    The recorded tolerance of a run of one image does not hold it: the original was re-run with the same kernels.
    """
    if name != "pred_xstart":
        return 0.0
    diffusion = _diffusion(run)
    schedule = diffusion.schedule.respaced(space_timesteps(len(diffusion.schedule), _respacing(run, diffusion)))
    return float(np.abs(x0_coefficients(schedule, diffusion.prediction)[1]).max()) * FP32_FORWARD_ROUNDING


def _diffusion(run: Run) -> Diffusion:
    """The checkpoint's conventions with what this run overrides; an unknown override fails by name."""
    diffusion = checkpoint(run.case).diffusion
    if "clip_denoised" in run.parameters:
        diffusion = dataclasses.replace(diffusion, clip=1.0 if run.parameters["clip_denoised"] else None)
    for key, value in run.parameters.get("override", {}).items():
        if key == "sigma_small":
            variance = Variance.FIXED_SMALL if value else Variance.FIXED_LARGE
            diffusion = dataclasses.replace(diffusion, variance=variance)
        elif key == "predict_xstart":
            diffusion = dataclasses.replace(diffusion, prediction=Prediction.X0 if value else Prediction.EPS)
        elif key == "rescale_timesteps":
            scale = 1000.0 / len(diffusion.schedule) if value else 1.0
            diffusion = dataclasses.replace(diffusion, timestep_scale=scale)
        else:
            pytest.fail(f"override {key} is not known")
    return diffusion


def _respacing(run: Run, diffusion: Diffusion) -> int | str:
    return run.parameters.get("respacing") or len(diffusion.schedule)


def _forward(run: Run, a: dict[str, Tensor]) -> dict[str, Tensor]:
    unet = checkpoint(run.case).unet()
    cond = resize_condition(a["low_res"], unet.config.image_size) if "low_res" in a else None
    with torch.inference_mode():
        return {"out": unet(a["x"], a["t"].float(), a.get("y"), cond)}


def _classifier(run: Run, a: dict[str, Tensor]) -> dict[str, Tensor]:
    model = classifier(run.case).classifier()
    scale = torch.full((len(a["x"]),), float(run.parameters["scale"]))
    grad, _ = AutogradGuide(model)(a["x"], a["t"].float(), a["y"], scale)
    with torch.inference_mode():
        return {"logits": model(a["x"], a["t"].float()), "grad": grad}


def _sample(run: Run, a: dict[str, Tensor], table: StepTable) -> dict[str, Tensor]:
    """Run a table on the slots with the recorded noise and keep every step."""
    backend = EagerBackend.from_checkpoint(checkpoint(run.case))
    start = a["x0"] if "x0" in a else a["x_T"]
    n, guidance = len(start), None
    if run.parameters.get("classifier_scale"):
        guide = AutogradGuide(classifier(run.case).classifier())
        guidance = ClassifierGuidance(guide, float(run.parameters["classifier_scale"]))
    z = a["z"] if "z" in a else torch.zeros(0, *start.shape)
    conds = resize_condition(a["low_res"], backend.manifest.unet.config.image_size) if "low_res" in a else None
    requests = Sampler(backend).requests(
        n,
        table=table,
        labels=a["y"].tolist() if "y" in a else None,
        seeds=range(n),
        guidance=guidance,
        image=conds,
    )
    traj, x0 = run_slots(backend, requests, RecordedNoise(start.numpy(), z.numpy()), guidance and guidance.guide)
    kept = {"traj": traj, "pred_xstart": x0, "sample": traj[-1]}
    return {name: value for name, value in kept.items() if name in a}


def _ddpm(run: Run, a: dict[str, Tensor]) -> dict[str, Tensor]:
    diffusion = _diffusion(run)
    return _sample(run, a, ddpm_table(diffusion, _respacing(run, diffusion)))


def _ddim(run: Run, a: dict[str, Tensor]) -> dict[str, Tensor]:
    diffusion = _diffusion(run)
    return _sample(run, a, ddim_table(diffusion, _respacing(run, diffusion), run.parameters["eta"]))


def _ddim_reverse(run: Run, a: dict[str, Tensor]) -> dict[str, Tensor]:
    diffusion = _diffusion(run)
    return _sample(run, a, ddim_inversion_table(diffusion, _respacing(run, diffusion)))


def _bpd(run: Run, a: dict[str, Tensor]) -> dict[str, Tensor]:
    diffusion = _diffusion(run)
    backend = EagerBackend.from_checkpoint(checkpoint(run.case))
    noise = RecordedNoise(a["x0"].numpy(), a["z"].numpy())
    terms = variational_bound(
        backend,
        a["x0"],
        _respacing(run, diffusion),
        diffusion=diffusion,
        conditions=Conditions(a.get("y")),
        noise=noise,
    )
    return {
        "vb": terms.vb,
        "xstart_mse": terms.x0_mse,
        "mse": terms.eps_mse,
        "prior_bpd": terms.prior,
        "total_bpd": terms.total,
    }


def _pmv(run: Run, a: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean and variance of one step; t is an index into the respaced steps."""
    diffusion = _diffusion(run)
    schedule = diffusion.schedule.respaced(space_timesteps(len(diffusion.schedule), _respacing(run, diffusion)))

    def at(column: np.ndarray) -> Tensor:
        return torch.from_numpy(column)[a["t"]].float()[:, None, None, None]

    time = torch.from_numpy(schedule.timesteps * diffusion.timestep_scale)[a["t"]].float()
    out = EagerBackend.from_checkpoint(checkpoint(run.case))(a["x"], time, Conditions(a.get("y")))
    channels = a["x"].shape[1]
    c_x, c_out = x0_coefficients(schedule, diffusion.prediction)
    x0 = at(c_x) * a["x"] + at(c_out) * out[:, :channels]
    x0 = x0.clamp(-1, 1) if diffusion.clip is not None else x0
    lower, upper = log_variance_bounds(schedule, diffusion.variance)
    fraction = (out[:, channels:] + 1) / 2 if out.shape[1] > channels else torch.zeros_like(x0)
    log_variance = at(lower) + fraction * at(upper - lower)
    variance = log_variance.exp()
    if diffusion.variance is Variance.FIXED_SMALL:
        variance = at(schedule.posterior_variance).expand_as(x0)
    mean = at(schedule.posterior_mean_x0) * x0 + at(schedule.posterior_mean_xt) * a["x"]
    return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}


def _schedule(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    p = run.parameters
    if "noise_schedule" in p:
        full = cosine_schedule(p["steps"]) if p["noise_schedule"] == "cosine" else linear_schedule(p["steps"])
    else:
        full = checkpoint(run.case).diffusion.schedule
    s: NoiseSchedule = full.respaced(space_timesteps(len(full), p["respacing"] or len(full)))
    abar = s.alphas_cumprod
    known = {
        "betas": s.betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": s.alphas_cumprod_prev,
        "alphas_cumprod_next": s.alphas_cumprod_next,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "log_one_minus_alphas_cumprod": np.log(1 - abar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / abar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / abar - 1),
        "posterior_variance": s.posterior_variance,
        "posterior_log_variance_clipped": s.posterior_log_variance,
        "posterior_mean_coef1": s.posterior_mean_x0,
        "posterior_mean_coef2": s.posterior_mean_xt,
        "timestep_map": s.timesteps,
        "fixed_large_variance": s.fixed_large_variance,
    }
    return {name: np.array(value) for name, value in known.items() if name in a}


RUNNERS: dict[str, Runner] = {
    "forward": _forward,
    "classifier": _classifier,
    "ddpm": _ddpm,
    "ddim": _ddim,
    "ddim_reverse": _ddim_reverse,
    "bpd": _bpd,
    "pmv": _pmv,
    "schedule": _schedule,
}
