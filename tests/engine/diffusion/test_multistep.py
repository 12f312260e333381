"""engine.diffusion.solvers.dpmpp_table: beside diffusers' scheduler step by step, and on Gaussian data."""

from __future__ import annotations

import math

import diffusers
import numpy as np
import pytest
import torch
from gaussian_data import gaussian_errors, moments
from solver_cases import COUNTS, SCHEDULES, coefficients, diffusion, ideal_eps, linear_map, visited

from engine.diffusion.prediction import Prediction, Spacing
from engine.diffusion.solvers import ddim_table, dpmpp_table
from kernels.reference import solver_update

_NAMES = {Prediction.EPS: "epsilon", Prediction.X0: "sample", Prediction.V: "v_prediction"}


def scheduler_of(kind: str, prediction: Prediction) -> diffusers.DPMSolverMultistepScheduler:
    return diffusers.DPMSolverMultistepScheduler(
        num_train_timesteps=len(SCHEDULES[kind]),
        trained_betas=SCHEDULES[kind].betas.tolist(),
        prediction_type=_NAMES[prediction],
        timestep_spacing="trailing",
    )


# The scheduler hands numpy a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20, 30, 100])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("prediction", _NAMES)
def test_every_step_is_that_of_diffusers(kind, prediction, steps):
    """The same network results, some of them new at each step, and each side's own state of the step before."""
    theirs = scheduler_of(kind, prediction)
    theirs.set_timesteps(steps)
    # The library's own steps on our levels: its float32 product of alphas is off by 1e-4 at the noisy end.
    abar = torch.from_numpy(SCHEDULES[kind].alphas_cumprod)[theirs.timesteps]
    theirs.sigmas = torch.cat([((1 - abar) / abar).sqrt(), torch.zeros(1, dtype=torch.float64)])
    table = dpmpp_table(diffusion(kind, prediction, spacing=Spacing.TRAILING), steps)
    assert table.timestep.tolist() == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(1, 1, 4, 4, generator=generator)
    x0 = torch.zeros_like(x)
    for row, t in enumerate(theirs.timesteps):
        out = torch.randn(x.shape, generator=generator)
        expected = theirs.step(out, t, x).prev_sample
        x, x0 = solver_update(coefficients(table, row), x, out, x0_before=x0)
        # Float32 sums of x0 and x0_before, which may be larger than the result.
        scale = max(1.0, float(x0.abs().max()))
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5 * scale)
        # Rounding is not to grow from step to step: both go on from one x.
        x = expected


@pytest.mark.parametrize("steps", COUNTS)
def test_the_ends_are_of_first_order(steps):
    """The first and the last row are DDIM's, and use no x0 of a step before; no row adds noise."""
    table, ddim = dpmpp_table(diffusion(), steps), ddim_table(diffusion(), steps)
    assert table.R[0] == table.R[-1] == 0
    assert table.R[1:-1].all()
    assert (table.P[-1], table.Q[-1]) == (1.0, 0.0)
    assert not table.S.any()
    assert not table.E.any()
    for ours, theirs in zip(linear_map(table), linear_map(ddim), strict=True):
        np.testing.assert_allclose(ours[[0, -1]], theirs[[0, -1]], rtol=1e-8, atol=1e-10)


def test_gaussian_data_is_reached_at_second_order():
    """Twice the steps divide the error by nearly 4, DDIM's by about 2; from 80 steps on it is the smaller."""
    counts = (20, 40, 80, 160)
    ours, ddim = gaussian_errors(dpmpp_table, counts), gaussian_errors(ddim_table, counts)
    assert all(earlier > 2.5 * later for earlier, later in zip(ours, ours[1:], strict=False)), ours
    assert all(earlier < 2.5 * later for earlier, later in zip(ddim, ddim[1:], strict=False)), ddim
    assert ours[2] < ddim[2], (ours, ddim)
    assert ours[3] < 0.5 * ddim[3], (ours, ddim)
    assert ours[3] < 5e-3, ours


def test_the_update_follows_the_exact_moments():
    of = diffusion("cosine")
    table, abar = dpmpp_table(of, 12), visited(of, 12).alphas_cumprod[::-1]
    x = torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean()) / x.std()
    x0 = torch.zeros_like(x)
    for row in range(len(table)):
        slope, offset = ideal_eps(abar[row], 0.3, 0.5)
        x, x0 = solver_update(coefficients(table, row), x, slope * x + offset, x0_before=x0)
    m, v = moments(table, abar, 0.3, 0.5)
    assert x.mean().item() == pytest.approx(m, abs=1e-4)
    assert x.var().item() == pytest.approx(v, abs=1e-4)


def test_classifier_gradient_moves_eps():
    """As in DDIM, Dhariwal & Nichol (2021), algorithm 2: the same as a network that says eps - sqrt(1 - abar) grad."""
    of = diffusion()
    abar, table = visited(of, 10).alphas_cumprod[::-1], dpmpp_table(of, 10)
    x_t, eps, grad, before = (torch.randn(4, 1, 1, 2, 2, generator=torch.Generator().manual_seed(0))).unbind()
    for row in range(10):
        moved = eps - math.sqrt(1 - abar[row]) * grad
        expected = solver_update(coefficients(table, row), x_t, moved, x0_before=before)
        got = solver_update(coefficients(table, row), x_t, eps, x0_before=before, grad=grad)
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
