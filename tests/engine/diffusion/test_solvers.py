"""engine.diffusion.solvers: tables beside the papers' formulas, as linear maps, on Gaussian data, and with broken
operands.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import FLOAT64_PRODUCT
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import COUNTS, SCHEDULES, T, coefficients, diffusion, ideal_eps, linear_map, visited

from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import linear_schedule, space_timesteps
from engine.diffusion.solvers import COLUMNS, StepTable, ddim_inversion_table, ddim_table, ddpm_table, dpmpp_table
from engine.errors import ConfigError, RequestError
from engine.json_form import decode, encode
from kernels.reference import Coefficients, limit_x0, solver_update


def noise_std(table: StepTable) -> np.ndarray:
    return table.S * np.exp(0.5 * table.L0)


def test_tables_are_float64_and_descend():
    table = ddpm_table(diffusion(timestep_scale=10.0), 7)
    assert len(table) == 7
    assert table.timestep.tolist() == (10.0 * space_timesteps(T, 7)[::-1]).tolist()
    assert all(getattr(table, name).dtype == np.float64 for name in COLUMNS)
    assert table.to_array().shape == (7, len(COLUMNS))
    for index, name in enumerate(COLUMNS):
        assert table.to_array()[:, index].tolist() == getattr(table, name).tolist()


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("prediction", [Prediction.EPS, Prediction.X0, Prediction.V])
def test_ddim_with_eta_1_is_ddpm_with_the_posterior_variance(kind, prediction, steps):
    of = diffusion(kind, prediction)
    ddim, ddpm = ddim_table(of, steps, eta=1.0), ddpm_table(of, steps, Variance.FIXED_SMALL)
    assert ddim.timestep.tolist() == ddpm.timestep.tolist()
    np.testing.assert_allclose(noise_std(ddim), noise_std(ddpm), rtol=1e-9, atol=1e-14)
    for ours, theirs in zip(linear_map(ddim), linear_map(ddpm), strict=True):
        scale = np.maximum(np.abs(linear_map(ddpm)).max(axis=0), 1)
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-10)


@pytest.mark.parametrize("steps", COUNTS)
def test_eta_0_has_no_noise(steps):
    assert not ddim_table(diffusion(), steps, eta=0.0).S.any()
    assert ddim_table(diffusion(), steps, eta=0.5).S[:-1].all()


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddim_rows_are_the_papers_formula(kind, steps, eta):
    """Song et al. (2021), eq. 12 and 16, in the scalars that the paper uses."""
    of = diffusion(kind)
    abar = [*visited(of, steps).alphas_cumprod]
    table = ddim_table(of, steps, eta)
    x_t, eps = 0.7, -1.3
    for row, t in enumerate(reversed(range(len(abar)))):
        a, a_prev = abar[t], abar[t - 1] if t else 1.0
        sigma = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
        x0 = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
        expected = math.sqrt(a_prev) * x0 + math.sqrt(max(1 - a_prev - sigma**2, 0)) * eps
        to_x, to_out = (column[row] for column in linear_map(table))
        assert to_x * x_t + to_out * eps == pytest.approx(expected, rel=1e-8, abs=1e-8)
        assert table.A[row] * x_t + table.B[row] * eps == pytest.approx(x0, rel=1e-10)
        assert noise_std(table)[row] == pytest.approx(sigma, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("steps", COUNTS)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_ddpm_rows_are_the_papers_formula(kind, steps):
    """Ho et al. (2020), eq. 11: mean = (x_t - beta / sqrt(1 - abar) eps) / sqrt(alpha)."""
    of = diffusion(kind)
    s = visited(of, steps)
    table = ddpm_table(of, steps)
    x_t, eps = 0.7, -1.3
    for row, t in enumerate(reversed(range(len(s)))):
        expected = (x_t - s.betas[t] / math.sqrt(1 - s.alphas_cumprod[t]) * eps) / math.sqrt(1 - s.betas[t])
        to_x, to_out = (column[row] for column in linear_map(table))
        assert to_x * x_t + to_out * eps == pytest.approx(expected, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("variance", [Variance.FIXED_SMALL, Variance.FIXED_LARGE, Variance.LEARNED_RANGE])
def test_ddpm_variances(variance):
    """Fixed: log(posterior variance) or log(beta), once each; learned: both, to interpolate between."""
    of = diffusion(variance=variance)
    s, table = visited(of, 10), ddpm_table(of, 10)
    small = np.log([max(v, s.posterior_variance[1]) if i == 0 else v for i, v in enumerate(s.posterior_variance)])
    large = np.log([s.posterior_variance[1], *s.betas[1:]])
    expected = {
        Variance.FIXED_SMALL: (small, small),
        Variance.FIXED_LARGE: (large, large),
        Variance.LEARNED_RANGE: (small, np.log(s.betas)),
    }[variance]
    np.testing.assert_allclose(table.L0[::-1], expected[0], rtol=1e-12)
    np.testing.assert_allclose(table.L1[::-1], expected[1], rtol=1e-12)
    assert table.S.tolist() == [1.0] * 9 + [0.0]
    assert table.G.tolist() == [1.0] * 9 + [0.0 if variance is Variance.FIXED_SMALL else 1.0]
    assert not table.H.any()


def test_a_learned_range_network_can_use_a_fixed_variance():
    of = diffusion(variance=Variance.LEARNED_RANGE)
    table = ddpm_table(of, 10, Variance.FIXED_LARGE)
    assert table.L0.tolist() == table.L1.tolist() == ddpm_table(diffusion(), 10, Variance.FIXED_LARGE).L0.tolist()


def test_variance_channels_that_are_not_there():
    with pytest.raises(RequestError, match="no variance channels; choose fixed_small or fixed_large"):
        ddpm_table(diffusion(), 10, Variance.LEARNED_RANGE)


@pytest.mark.parametrize("eta", [-0.1, float("nan"), float("inf"), 50.0])
def test_eta_out_of_range(eta):
    with pytest.raises(RequestError, match=f"eta must lie between 0 and 1, got {eta}"):
        ddim_table(diffusion(), 10, eta)


@settings(max_examples=40)
@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.sampled_from(COUNTS),
    st.floats(-1, 1),
    st.floats(-2, 2),
    st.sampled_from(["ddim", "ddim eta", "ddpm", "inversion"]),
)
def test_eps_x0_and_v_of_one_denoiser_give_one_step(kind, steps, x0, eps, sampler):
    """v = sqrt(abar) eps - sqrt(1 - abar) x0; the three outputs say the same of x_t = sqrt(abar) x0 + ... eps."""
    results = []
    abar = visited(diffusion(kind), steps).alphas_cumprod
    order = abar if sampler == "inversion" else abar[::-1]
    x_t = np.sqrt(order) * x0 + np.sqrt(1 - order) * eps
    outputs = {
        Prediction.EPS: np.full_like(order, eps),
        Prediction.X0: np.full_like(order, x0),
        Prediction.V: np.sqrt(order) * eps - np.sqrt(1 - order) * x0,
    }
    for prediction, out in outputs.items():
        of = diffusion(kind, prediction)
        table = {
            "ddim": lambda of=of: ddim_table(of, steps),
            "ddim eta": lambda of=of: ddim_table(of, steps, 0.7),
            "ddpm": lambda of=of: ddpm_table(of, steps),
            "inversion": lambda of=of: ddim_inversion_table(of, steps),
        }[sampler]()
        to_x, to_out = linear_map(table)
        results.append(to_x * x_t + to_out * out)
        # A and B give back x0; 1 / sqrt(abar) is up to 2e4 in the cosine schedule.
        np.testing.assert_allclose(table.A * x_t + table.B * out, x0, atol=1e-10)
    np.testing.assert_allclose(results[0], results[1], atol=1e-9)
    np.testing.assert_allclose(results[0], results[2], atol=1e-9)


def run_moments(table: StepTable, abar: np.ndarray, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance after all rows, from N(0, 1), as the exact recursion of a linear step with noise."""
    m, v = 0.0, 1.0
    to_x, to_out = linear_map(table)
    for row, a in enumerate(abar):
        slope, offset = ideal_eps(a, mean, std)
        gain = to_x[row] + to_out[row] * slope
        m = gain * m + to_out[row] * offset
        v = gain**2 * v + noise_std(table)[row] ** 2
    return m, v


@pytest.mark.parametrize("sampler", ["ddim", "ddim eta 0.5", "ddim eta 1", "ddpm small", "ddpm large"])
def test_gaussian_data_is_reached_with_many_steps(sampler):
    """The ideal eps of N(0.3, 0.5^2) is known: the chain's mean and variance must converge to the data's."""
    of = dataclasses.replace(diffusion(), schedule=linear_schedule(1000))
    make = {
        "ddim": lambda n: ddim_table(of, n),
        "ddim eta 0.5": lambda n: ddim_table(of, n, 0.5),
        "ddim eta 1": lambda n: ddim_table(of, n, 1.0),
        "ddpm small": lambda n: ddpm_table(of, n, Variance.FIXED_SMALL),
        "ddpm large": lambda n: ddpm_table(of, n, Variance.FIXED_LARGE),
    }[sampler]
    errors = []
    for steps in (10, 33, 100, 330, 1000):
        m, v = run_moments(make(steps), visited(of, steps).alphas_cumprod[::-1], 0.3, 0.5)
        errors.append(abs(m - 0.3) + abs(v - 0.25))
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 4e-3, errors


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_the_update_follows_the_exact_moments(kind):
    """solver_update on 40000 samples of one pixel: empirical mean and variance are those of the linear recursion."""
    of = diffusion("cosine")
    table = ddim_table(of, 10) if kind == "ddim" else ddpm_table(of, 10)
    abar = visited(of, 10).alphas_cumprod[::-1]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 200, 200, generator=generator)
    for row in range(len(table)):
        slope, offset = ideal_eps(abar[row], 0.3, 0.5)
        z = torch.randn(x.shape, generator=generator)
        x, _ = solver_update(coefficients(table, row), x, slope * x + offset, noise=z)
    m, v = run_moments(table, abar, 0.3, 0.5)
    n = x.numel()
    # Five standard errors of a mean and of a variance of n normals.
    assert x.mean().item() == pytest.approx(m, abs=5 * math.sqrt(v / n))
    assert x.var().item() == pytest.approx(v, abs=5 * v * math.sqrt(2 / n))


@pytest.mark.parametrize("keeps_eps", [False, True])
@pytest.mark.parametrize("steps", [50, 200, 1000])
def test_inversion_and_back(steps, keeps_eps):
    """Encoded and decoded with the ideal eps of N(0.3, 0.5^2), an image comes back; closer with more steps.

    The last row of the inversion, which goes to pure noise, has no counterpart in sampling and is left out.
    """
    of = dataclasses.replace(diffusion(), schedule=linear_schedule(1000), keeps_eps=keeps_eps)
    abar = visited(of, steps).alphas_cumprod
    up, down = ddim_inversion_table(of, steps), ddim_table(of, steps)
    assert up.E.any() == down.E.any() == keeps_eps
    start = np.linspace(-1, 1, 9)
    x = start.copy()
    for row in range(steps - 1):
        slope, offset = ideal_eps(abar[row], 0.3, 0.5)
        x = linear_map(up)[0][row] * x + linear_map(up)[1][row] * (slope * x + offset)
    # What it encodes to is the noise of the data: standardised pixels.
    np.testing.assert_allclose(x, (start - 0.3) / 0.5, atol=10 / steps)
    for row, a in enumerate(abar[::-1]):
        slope, offset = ideal_eps(a, 0.3, 0.5)
        x = linear_map(down)[0][row] * x + linear_map(down)[1][row] * (slope * x + offset)
    assert np.abs(x - start).max() < 10 / steps


def test_inversion_ascends_and_ends_in_noise():
    of = diffusion()
    table = ddim_inversion_table(of, 10)
    assert table.timestep.tolist() == space_timesteps(T, 10).tolist()
    to_x, to_out = linear_map(table)
    # abar = 0: nothing is left but eps, exactly.
    assert to_x[-1] == pytest.approx(0, abs=1e-12)
    assert to_out[-1] == pytest.approx(1, rel=FLOAT64_PRODUCT)


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


NOTHING = dict.fromkeys((f.name for f in dataclasses.fields(Coefficients)), 0.0) | {"clip": math.inf}


def made_row(**values: float) -> Coefficients:
    return Coefficients(**{k: torch.full((1, 1, 1, 1), float(v)) for k, v in (NOTHING | values).items()})


def test_update_formula_element_by_element():
    """Every coefficient at once, beside the same lines in Python floats."""
    c = {"A": 1.3, "B": -0.4, "clip": 0.8, "H": 0.3, "L0": -2.0, "L1": -1.0, "P": 0.6}
    c |= {"Q": 0.5, "E": 0.2, "R": -0.7, "G": 1.1, "S": 0.9}
    x_t, before, grad, noise = (some(1, 2, 3, 3, seed=i) for i in range(4))
    out = some(1, 4, 3, 3, seed=9)
    x_prev, x0 = solver_update(made_row(**c), x_t, out, before, grad, noise)
    places = [(ch, i, j) for ch in range(2) for i in range(3) for j in range(3)]
    for ch, i, j in places:
        o, v = out[0, ch, i, j].item(), out[0, 2 + ch, i, j].item()
        xt, b, g, z = (t[0, ch, i, j].item() for t in (x_t, before, grad, noise))
        clean = min(max(c["A"] * xt + c["B"] * o, -c["clip"]), c["clip"]) + c["H"] * g
        var = math.exp(c["L0"] + (v + 1) / 2 * (c["L1"] - c["L0"]))
        expected = c["P"] * clean + c["Q"] * xt + c["E"] * o + c["R"] * b + c["G"] * var * g + c["S"] * var**0.5 * z
        assert x0[0, ch, i, j].item() == pytest.approx(clean, abs=1e-5)
        assert x_prev[0, ch, i, j].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("coefficient", "operand"),
    [("B", "out"), ("E", "out"), ("R", "x0_before"), ("G", "grad"), ("H", "grad"), ("S", "noise"), ("Q", "x_t")],
)
def test_a_coefficient_of_0_shields_its_operand(coefficient, operand, broken):
    """The operand is broken and all coefficients that use it are 0; then the named one is not, and it must show."""
    uses = {"out": ("B", "E"), "grad": ("G", "H"), "x_t": ("A", "Q")}.get(operand, (coefficient,))
    values = dict.fromkeys(("A", "B", "P", "Q", "E", "R", "G", "H", "S"), 0.5) | dict.fromkeys(uses, 0.0)
    operands = {name: some(1, 1, 2, 2, seed=i) for i, name in enumerate(("x_t", "x0_before", "grad", "noise", "out"))}
    good, _ = solver_update(made_row(**values), **operands)
    operands[operand] = torch.full((1, 1, 2, 2), broken)
    x_prev, x0 = solver_update(made_row(**values), **operands)
    assert torch.equal(x_prev, good)
    assert x0.isfinite().all()
    x_prev, _ = solver_update(made_row(**(values | {coefficient: 0.5})), **operands)
    assert not x_prev.isfinite().any()


def test_broken_variance_channels_do_not_reach_a_fixed_variance():
    x_t, z = some(1, 1, 2, 2), some(1, 1, 2, 2, seed=1)
    out = torch.cat([some(1, 1, 2, 2, seed=2), torch.full((1, 1, 2, 2), math.nan)], dim=1)
    row = made_row(A=1, B=1, P=1, S=1, G=1, L0=-1, L1=-1)
    with_channels = solver_update(row, x_t, out, grad=z, noise=z)[0]
    assert torch.equal(with_channels, solver_update(row, x_t, out[:, :1], grad=z, noise=z)[0])


def test_learned_range_interpolates_the_logarithm():
    row = made_row(S=1, L0=math.log(0.25), L1=math.log(4.0))
    out = torch.cat([torch.zeros(1, 3, 1, 1), torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)], dim=1)
    x_prev, _ = solver_update(row, torch.zeros(1, 3, 1, 1), out, noise=torch.ones(1, 3, 1, 1))
    assert x_prev.flatten().tolist() == pytest.approx([0.5, 1.0, 2.0])


def test_limit_acts_before_guidance():
    row = made_row(A=1, clip=1, H=1, P=1)
    x_prev, x0 = solver_update(
        row, torch.tensor([-9.0, 0.5, 9.0]).reshape(1, 1, 1, 3), some(1, 1, 1, 3), grad=torch.full((1, 1, 1, 3), 0.25)
    )
    assert x0.flatten().tolist() == x_prev.flatten().tolist() == [-0.75, 0.75, 1.25]


def imagens_limit(x0: np.ndarray, p: float, largest: float) -> np.ndarray:
    """Saharia et al. (2022), figure A.10, for one image, with diffusers' largest limit."""
    s = min(max(float(np.quantile(np.abs(x0), p)), 1.0), largest)
    return np.clip(x0, -s, s) / s


@pytest.mark.parametrize("p", [0.25, 0.6, 0.995, 1.0])
@pytest.mark.parametrize("largest", [1.0, 1.7, math.inf])
def test_dynamic_thresholding(p, largest):
    """Each image by its own quantile, also one that lies below 1 and is left alone; beside an image that is clipped."""
    x0 = some(4, 2, 5, 3).double() * torch.tensor([0.1, 2.0, 5.0, 5.0]).reshape(4, 1, 1, 1)
    clip = torch.tensor([largest, largest, largest, 0.7], dtype=torch.float64).reshape(4, 1, 1, 1)
    percentile = torch.tensor([p, p, p, 0.0]).reshape(4, 1, 1, 1)
    got = limit_x0(x0, clip, percentile.double())
    for i in range(3):
        np.testing.assert_allclose(got[i], imagens_limit(x0[i].numpy(), p, largest), atol=1e-12)
    assert torch.equal(got[0], x0[0])
    assert torch.equal(got[3], x0[3].clamp(-0.7, 0.7))
    for i in range(4):
        assert torch.equal(limit_x0(x0[i : i + 1], clip[i : i + 1], percentile[i : i + 1]), got[i : i + 1])


def test_dynamic_thresholding_in_the_update():
    """The limit takes the place of the clip, before guidance."""
    x_t, grad = 4 * some(1, 1, 4, 4), some(1, 1, 4, 4, seed=1)
    row = made_row(A=1, P=1, H=0.5, percentile=0.8)
    _, x0 = solver_update(row, x_t, torch.zeros_like(x_t), grad=grad)
    expected = imagens_limit(x_t[0].numpy(), 0.8, math.inf) + 0.5 * grad[0].numpy()
    np.testing.assert_allclose(x0[0], expected, atol=1e-6)


@pytest.mark.parametrize("make", [lambda d: ddim_table(d, 5), lambda d: ddpm_table(d, 5), lambda d: dpmpp_table(d, 5)])
def test_the_checkpoints_percentile_is_a_column(make):
    assert make(diffusion()).percentile.tolist() == [0.0] * 5
    assert make(diffusion(clip=1.5, percentile=0.9)).percentile.tolist() == [0.9] * 5
    assert make(diffusion(clip=1.5, percentile=0.9)).clip.tolist() == [1.5] * 5
    again = decode(encode(diffusion(clip=1.5, percentile=0.9)), Diffusion)
    assert (again.clip, again.percentile) == (1.5, 0.9)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"percentile": 0.0}, "the percentile of dynamic thresholding is 0.0; expected 0 < p <= 1"),
        ({"percentile": 1.5}, "the percentile of dynamic thresholding is 1.5"),
        ({"percentile": 0.9, "clip": 0.5}, "dynamic thresholding has a largest limit of 0.5; expected 1 or more"),
    ],
)
def test_thresholds_out_of_range(values, message):
    with pytest.raises(ConfigError, match=message):
        diffusion(**values)


def test_missing_operands_are_those_with_coefficients_of_0():
    row = made_row(A=0.5, B=0.5, P=0.9, Q=0.1, clip=1)
    x_t, out = some(2, 1, 2, 2), some(2, 1, 2, 2, seed=1)
    zeros = torch.zeros_like(x_t)
    assert torch.equal(solver_update(row, x_t, out)[0], solver_update(row, x_t, out, zeros, zeros, zeros)[0])


@pytest.mark.parametrize("make", [lambda d: ddim_table(d, 5), lambda d: ddpm_table(d, 5)])
def test_the_checkpoints_limit_is_a_column(make):
    assert make(diffusion(clip=0.7)).clip.tolist() == [0.7] * 5
    assert make(diffusion(clip=None)).clip.tolist() == [math.inf] * 5


def test_classifier_gradient_moves_eps_in_ddim():
    """Dhariwal & Nichol (2021), algorithm 2: eps - sqrt(1 - abar) grad gives x0 and the direction of the step."""
    of = diffusion()
    abar = visited(of, 10).alphas_cumprod[::-1]
    table = ddim_table(of, 10)
    x_t, eps, grad = (some(1, 1, 2, 2, seed=i) for i in range(3))
    for row in range(10):
        moved = eps - math.sqrt(1 - abar[row]) * grad
        expected, expected_x0 = solver_update(coefficients(table, row), x_t, moved)
        x_prev, x0 = solver_update(coefficients(table, row), x_t, eps, grad=grad)
        torch.testing.assert_close(x_prev, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(x0, expected_x0, atol=1e-5, rtol=1e-5)


def test_classifier_gradient_moves_the_mean_in_ddpm():
    """Algorithm 1: the mean plus variance times gradient; not in the last step of fixed_small, whose variance is 0."""
    of = diffusion()
    s, table = visited(of, 10), ddpm_table(of, 10)
    x_t, eps, grad = (some(1, 1, 2, 2, seed=i) for i in range(3))
    for row, t in enumerate(reversed(range(10))):
        plain, guided = (solver_update(coefficients(table, row), x_t, eps, grad=g)[0] for g in (None, grad))
        torch.testing.assert_close(guided - plain, float(s.posterior_variance[t]) * grad, atol=1e-6, rtol=1e-4)
