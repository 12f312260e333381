"""w86763777/pytorch-ddpm: its U-Net against a reference forward pass, its conventions, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain_reference import W86, Arguments, angles, make_network, run_network
from exported import assert_exports
from golden_cases import sample_table
from helpers import FP32_OTHER_ORDER, adm_unet
from torch import Tensor

from engine.checkpoints.facts import make_facts
from engine.checkpoints.families import w86763777
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.prediction import Prediction, Variance, x0_coefficients
from engine.diffusion.solvers import ddim_table, ddpm_table
from engine.errors import CheckpointError, RequestError

PLAIN = Arguments(W86, base=32, time_dim=128, groups=32)
T, SIZE = 12, (16, 8)


# The rounding of each of T steps, passed on by the network to the next.
FP32_TRAJECTORY = 1e-4


def time_table(steps: int, channels: int) -> Tensor:
    """[T, channels] float32: sin and cos of each angle side by side."""
    angle = angles(torch.arange(steps), channels)
    return torch.stack([angle.sin(), angle.cos()], 2).flatten(1).float()


def network(arguments: Arguments, seed: int, steps: int = T, device: str = "cpu") -> dict[str, Tensor]:
    table = {"time_embedding.timembedding.0.weight": time_table(steps, arguments.base).to(device)}
    return make_network(arguments, seed, device) | table


def content(arguments: Arguments = PLAIN, steps: int = T) -> dict[str, Any]:
    """A training checkpoint: raw weights of seed 1, averaged ones of seed 2; the two share one tensor."""
    raw, averaged = network(arguments, 1, steps), network(arguments, 2, steps)
    averaged["tail.0.bias"] = raw["tail.0.bias"]
    return {
        "net_model": raw,
        "ema_model": averaged,
        "sched": {"last_epoch": 5, "lr_lambdas": [None]},
        "optim": {"state": {}, "param_groups": [{"lr": 2e-4, "betas": (0.9, 0.999)}]},
        "step": 5,
        "x_T": torch.zeros(4, 3, *SIZE),
    }


def load(folder: Path, state: dict[str, Any], **facts: Any) -> Checkpoint:
    torch.save(state, folder / "ckpt.pt")
    return load_checkpoint(folder / "ckpt.pt", **facts)


def reference(state: dict[str, Any], x: Tensor, t: Tensor, arguments: Arguments = PLAIN) -> Tensor:
    return run_network(state, arguments, state["time_embedding.timembedding.0.weight"][t], x)


@pytest.mark.parametrize(
    ("arguments", "weights"),
    [
        (PLAIN, "ema"),
        (PLAIN, "raw"),
        (replace(PLAIN, mults=(1, 2, 1), depth=2, attention=(0, 2)), "ema"),
        (replace(PLAIN, attention=()), "ema"),
    ],
)
def test_network(tmp_path: Path, arguments: Arguments, weights: str) -> None:
    state = content(arguments)
    checkpoint = load(tmp_path, state, weights=weights)
    assert checkpoint.config.image_size == SIZE
    x, t = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, T - 1])
    expected = reference(state["ema_model" if weights == "ema" else "net_model"], x, t, arguments)
    with torch.inference_mode():
        got = checkpoint.unet()(x, t.float())
    torch.testing.assert_close(got, expected, rtol=FP32_OTHER_ORDER, atol=FP32_OTHER_ORDER)


# Published DDPM networks (Ho et al., 2020, appendix B): image size, multipliers, levels with attention, parameters.
PUBLISHED = {
    "CIFAR-10": (32, (1, 2, 2, 2), (1,), 35_746_307),
    "LSUN 256": (256, (1, 1, 2, 2, 4, 4), (4,), 113_673_219),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_network_is_inferred_from_shapes(name: str) -> None:
    side, mults, attention, parameters = PUBLISHED[name]
    arguments = Arguments(W86, base=128, mults=mults, depth=2, attention=attention, time_dim=512, groups=32)
    raw = {"ema_model": network(arguments, 0, 1000, "meta"), "x_T": torch.empty(64, 3, side, side, device="meta")}
    translation = w86763777.translate(raw, make_facts({}))
    config = translation.config
    expected = adm_unet(
        channels=3, size=(side, side), width=128, mult=mults, depth=2, attention=attention, heads=1, scale_shift=False
    )
    assert config.blocks == expected.blocks
    assert (config.image_size, config.in_channels, config.out_channels) == ((side, side), 3, 3)
    assert (config.time.embed_channels, config.time.channels) == (128, 512)
    assert len(translation.diffusion.schedule) == 1000
    assert sum(value.numel() for value in translation.weights.values()) == parameters
    assert {a.name for a in translation.assumptions} == {
        "beta_start", "beta_end", "prediction", "variance", "clip_denoised"
    }  # fmt: skip


def test_conventions(tmp_path: Path) -> None:
    diffusion = load(tmp_path, content()).diffusion
    np.testing.assert_array_equal(diffusion.schedule.betas, np.linspace(1e-4, 0.02, T))
    assert (diffusion.clip, diffusion.variance, diffusion.prediction) == (None, Variance.FIXED_LARGE, Prediction.EPS)
    said = load(tmp_path, content(), beta_start=1e-3, beta_end=0.2, variance="fixed_small", prediction="x0").diffusion
    np.testing.assert_array_equal(said.schedule.betas, np.linspace(1e-3, 0.2, T))
    assert (said.variance, said.prediction) == (Variance.FIXED_SMALL, Prediction.X0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "x_prev"])
def test_sampler(tmp_path: Path, prediction: str) -> None:
    """The project's sampler, in float32 as it runs there, for each of its mean types."""
    state = content(replace(PLAIN, mults=(1,), attention=()))
    checkpoint = load(tmp_path, state, prediction=prediction, beta_start=1e-3, beta_end=0.2)
    rng = torch.Generator().manual_seed(3)
    a = {"x_T": torch.randn(2, 3, *SIZE, generator=rng), "z": torch.randn(T - 1, 2, 3, *SIZE, generator=rng)}
    betas = np.linspace(1e-3, 0.2, T)
    abar = np.cumprod(1 - betas)
    before = np.append(1.0, abar[:-1])
    x = a["x_T"]
    for draw, t in enumerate(reversed(range(T))):
        out = reference(state["ema_model"], x, torch.tensor([t, t]), replace(PLAIN, mults=(1,), attention=()))
        x0 = x / abar[t] ** 0.5 - out * (1 / abar[t] - 1) ** 0.5 if prediction == "eps" else out
        mean = before[t] ** 0.5 * betas[t] / (1 - abar[t]) * x0
        mean = mean + (1 - betas[t]) ** 0.5 * (1 - before[t]) / (1 - abar[t]) * x
        x = out if prediction == "x_prev" else mean
        x = x + betas[t] ** 0.5 * a["z"][draw] if t else x
    got = sample_table(checkpoint, ddpm_table(checkpoint.diffusion, T), a | {"sample": x})["sample"]
    assert float((got - x).abs().max() / x.abs().max()) <= FP32_TRAJECTORY


def test_predicted_mean_of_the_training_step_serves_fewer_steps(tmp_path: Path) -> None:
    """x0 and eps that an x_prev network implies, at timesteps whose neighbours are not visited."""
    diffusion = load(tmp_path, content(), prediction="x_prev").diffusion
    schedule, (x0, eps) = diffusion.schedule, (0.3, -1.2)

    def noisy(abar: float) -> float:
        return abar**0.5 * x0 + (1 - abar) ** 0.5 * eps

    for convention in (diffusion, replace(diffusion, keeps_eps=True)):
        table = ddim_table(convention, [1, 5, 9])
        for row, (t, before) in enumerate(((9, 5), (5, 1), (1, None))):
            x_t = noisy(schedule.alphas_cumprod[t])
            out = schedule.posterior_mean_x0[t] * x0 + schedule.posterior_mean_xt[t] * x_t
            got = table.A[row] * x_t + table.B[row] * out
            np.testing.assert_allclose(got, x0, rtol=1e-9)
            after = table.P[row] * got + table.Q[row] * x_t + table.E[row] * out
            np.testing.assert_allclose(after, x0 if before is None else noisy(schedule.alphas_cumprod[before]), 1e-9)
    with pytest.raises(RequestError, match="use all training timesteps here"):
        x0_coefficients(schedule.respaced(np.array([1, 5])), Prediction.X_PREV)


def test_file_without_x_t_or_one_of_the_networks(tmp_path: Path) -> None:
    state = content()
    checkpoint = load(tmp_path, {"net_model": state["net_model"]})
    assert checkpoint.config.image_size == (32, 32)
    assert {"weights", "image_size"} <= {a.name for a in checkpoint.assumptions}
    alone = load(tmp_path, state["net_model"])
    assert all(torch.equal(value, alone.weights[name]) for name, value in checkpoint.weights.items())
    with pytest.raises(CheckpointError, match="no raw weights; give --weights ema"):
        load(tmp_path, {"ema_model": state["ema_model"]}, weights="raw")


def test_compiled_data_parallel_half_precision_file(tmp_path: Path) -> None:
    state = content()
    for key in ("net_model", "ema_model"):
        state[key] = {f"module._orig_mod.{name}": value.half() for name, value in state[key].items()}
    checkpoint = load(tmp_path, state)
    plain = load(tmp_path, content())
    for name, value in plain.weights.items():
        torch.testing.assert_close(checkpoint.weights[name], value, rtol=1e-3, atol=1e-3)


def refused(state: dict[str, Any], **facts: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        w86763777.translate(state, make_facts(facts))
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    state = content()
    assert "x_T of the file is 16x8, and --image-size says 16x16" in refused(state, image_size=16)
    assert "12 rows, and --num-train-timesteps says 1000" in refused(state, num_train_timesteps=1000)
    assert "linear schedule only" in refused(state, noise_schedule="cosine")
    assert "cannot have 24 groups; give the training's number with --num-groups" in refused(state, num_groups=24)
    for wrong in (0, -1e-4, float("nan"), True, "much"):
        assert "expected a number above 0" in refused(state, beta_start=wrong)
    state["ema_model"]["extra.weight"] = torch.zeros(2)
    assert "extra.weight" in refused(state)
    other = content()
    other["ema_model"]["time_embedding.timembedding.0.weight"][3, 5] += 0.02
    assert "differs by 0.02 from the sinusoidal embedding of 12 timesteps" in refused(other)


def test_export(tmp_path: Path) -> None:
    assert_exports(load(tmp_path, content()), tmp_path)
