"""engine.diffusion.solvers.plms_table: beside diffusers' scheduler step by step, the formulas, and on Gaussian data."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from elementwise import PLAIN, Elementwise
from gaussian_data import gaussian_errors
from solver_cases import SCHEDULES, coefficients, diffusion, ideal_eps, visited
from torch import Tensor

from engine.diffusion.prediction import Diffusion, Prediction, Spacing
from engine.diffusion.schedule import linear_schedule
from engine.diffusion.solvers import StepTable, ddim_table, plms_table
from engine.sampling.sampler import Sampler
from kernels.reference import solver_update

_NAMES = {Prediction.EPS: "epsilon", Prediction.V: "v_prediction"}


class Rows:
    """Runs a table on one image, with the outs that its rows push."""

    def __init__(self, table: StepTable, shape: tuple[int, ...]) -> None:
        self.table, self.older = table, torch.zeros(3, *shape)

    def step(self, row: int, x: Tensor, out: Tensor) -> Tensor:
        x_prev, _ = solver_update(coefficients(self.table, row), x, out, older=self.older)
        if self.table.push[row]:
            self.older = torch.cat([out[None], self.older[:2]])
        return x_prev


# The scheduler hands numpy a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [2, 3, 4, 5, 20, 50])
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("prediction", _NAMES)
def test_every_step_is_that_of_diffusers(kind, prediction, steps):
    """Outs are new at each step; x goes on from the scheduler's own, but for the trial step, which it redoes."""
    theirs = diffusers.PNDMScheduler(
        num_train_timesteps=len(SCHEDULES[kind]),
        trained_betas=SCHEDULES[kind].betas.tolist(),
        prediction_type=_NAMES[prediction],
        skip_prk_steps=True,
        steps_offset=0,
    )
    theirs.set_timesteps(steps)
    # Its float32 product of alphas is off by 1e-4 at the noisy end.
    theirs.alphas_cumprod = torch.from_numpy(SCHEDULES[kind].alphas_cumprod)
    theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    of = diffusion(kind, prediction, spacing=Spacing.LEADING, spacing_offset=0, strides=True, ends_at_first=True)
    table = plms_table(of, steps)
    assert table.timestep.tolist() == theirs.timesteps.tolist()
    assert len(table) == steps + 1
    generator = torch.Generator().manual_seed(steps)
    x = torch.randn(1, 1, 4, 4, generator=generator)
    rows = Rows(table, x.shape)
    for row, t in enumerate(theirs.timesteps):
        out = torch.randn(x.shape, generator=generator)
        expected = theirs.step(out, t, x).prev_sample.float()
        got = rows.step(row, x, out)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(1.0, float(x.abs().max())))
        x = expected


def direct(of: Diffusion, steps: int, eps: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """Liu et al., PNDM (2022), eq. 9 to 12 with the second-order start of latent-diffusion, straight in float64."""
    abar = np.append(visited(of, steps).alphas_cumprod[::-1], 1.0)

    def transfer(x: np.ndarray, e: np.ndarray, i: int) -> np.ndarray:
        x0 = (x - np.sqrt(1 - abar[i]) * e) / np.sqrt(abar[i])
        return np.sqrt(abar[i + 1]) * x0 + np.sqrt(1 - abar[i + 1]) * e

    calls, kept = iter(eps), list[np.ndarray]()
    for i in range(steps):
        e = next(calls)
        kept.append(e)
        match len(kept):
            case 1:
                mean = (e + next(calls)) / 2
            case 2:
                mean = (3 * kept[-1] - kept[-2]) / 2
            case 3:
                mean = (23 * kept[-1] - 16 * kept[-2] + 5 * kept[-3]) / 12
            case _:
                mean = (55 * kept[-1] - 59 * kept[-2] + 37 * kept[-3] - 9 * kept[-4]) / 24
        x = transfer(x, mean, i)
    return x


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 12])
def test_rows_are_the_papers_lines(steps):
    """The same outs, whatever the rows' x, give the formula's result; in float32 against float64."""
    of = diffusion("cosine")
    generator = np.random.default_rng(steps)
    eps = [generator.standard_normal((1, 1, 3, 3)) for _ in range(steps + 1)]
    start = generator.standard_normal((1, 1, 3, 3))
    rows = Rows(plms_table(of, steps), start.shape)
    x = torch.from_numpy(start).float()
    for row, e in enumerate(eps):
        x = rows.step(row, x, torch.from_numpy(e).float())
    wanted = direct(of, steps, eps, start)
    np.testing.assert_allclose(x.numpy(), wanted, rtol=0, atol=2e-5 * max(1.0, np.abs(wanted).max()))


def test_gaussian_data_is_reached_at_a_higher_order_than_ddim():
    """Closed-form eps of N(0.3, 0.5^2): the error is a small part of DDIM's."""
    of = dataclasses.replace(diffusion(), schedule=linear_schedule(1000))
    errors = []
    for steps in (20, 80):
        table, abar = plms_table(of, steps), visited(of, steps).alphas_cumprod[::-1]
        levels = np.insert(abar, 1, abar[1])
        x, older = np.array([1.0, 0.0]), np.zeros((3, 2))
        for row, a in enumerate(levels):
            slope, offset = ideal_eps(a, 0.3, 0.5)
            out = slope * x + np.array([0.0, offset])
            weights = [getattr(table, name)[row] for name in ("O1", "O2", "O3")]
            x = table.Q[row] * x + table.E[row] * out + sum(w * o for w, o in zip(weights, older, strict=True))
            if table.push[row]:
                older = np.stack([out, older[0], older[1]])
        errors.append(abs(x[1] - 0.3) + abs(abs(x[0]) - 0.5))
    ddim = gaussian_errors(ddim_table, (20, 80))
    # What is left at 80 steps is the start from N(0, 1) instead of the noised data, and the last step's first order.
    assert errors[1] < 0.5 * errors[0], errors
    assert errors[0] < 0.1 * ddim[0], (errors, ddim)
    assert errors[1] < 0.3 * ddim[1], (errors, ddim)


def test_rows_without_their_past_take_the_oldest_out_they_have():
    """Equal outs make every order the same step, so a table cut anywhere must then agree with the whole one."""
    whole = plms_table(diffusion(), 8)
    for count in range(1, len(whole) + 1):
        cut = whole.last(count)
        sums = [sum(getattr(t, name) for name in ("E", "O1", "O2", "O3")) for t in (whole, cut)]
        np.testing.assert_allclose(sums[1], sums[0][len(whole) - count :], rtol=1e-12, atol=1e-15)
        pushed = np.concatenate([[0], np.cumsum(cut.push)[:-1]])
        for age in (1, 2, 3):
            assert not getattr(cut, f"O{age}")[pushed < age].any(), (count, age)


def test_n_steps_are_n_plus_one_calls():
    backend = Elementwise(PLAIN)
    Sampler(backend).sample(2, steps=6, sampler="plms")
    assert len(backend.timesteps) == 7
    assert backend.timesteps[1] == backend.timesteps[2]


def test_classifier_gradient_moves_a_step_as_it_moves_that_of_ddim():
    """Row by row, the first step's second row not at all: x_prev moves by what DDIM's moves by, through x0 and eps."""
    of = diffusion("cosine", keeps_eps=True)
    plms, ddim = plms_table(of, 6), ddim_table(of, 6)
    assert plms.G[1] == 0
    np.testing.assert_allclose(np.delete(plms.G, 1), ddim.P * ddim.H + ddim.G, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(np.delete(plms.H, 1), ddim.H, rtol=1e-12)
    assert not plms.S.any()
    assert np.array_equal(plms.L0, np.zeros(7))
