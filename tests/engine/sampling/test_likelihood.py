"""engine.sampling.likelihood: its pieces beside torch.distributions, and the whole bound where it is known."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import adm_unet, tiny_manifest
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import cosine_schedule, linear_schedule
from engine.networks.config import UNetConfig
from engine.networks.inputs import UNCONDITIONED, Conditions
from engine.sampling.likelihood import discretised_log_likelihood, gaussian_kl, variational_bound

BINS = torch.linspace(-1, 1, 256, dtype=torch.float64)


def test_gaussian_kl():
    g = torch.Generator().manual_seed(0)
    mean1, log_var1, mean2, log_var2 = (torch.randn(50, generator=g, dtype=torch.float64) for _ in range(4))
    p, q = Normal(mean1, (0.5 * log_var1).exp()), Normal(mean2, (0.5 * log_var2).exp())
    torch.testing.assert_close(gaussian_kl(mean1, log_var1, mean2, log_var2), kl_divergence(p, q))
    assert gaussian_kl(mean1, log_var1, mean1, log_var1).abs().max() < 1e-12


@pytest.mark.parametrize("mean", [-1.5, -1.0, -0.3, 0.0, 0.999, 1.0])
@pytest.mark.parametrize("log_std", [-5.0, -3.0, -1.0, 0.5])
def test_the_256_bins_share_out_all_the_mass(mean, log_std):
    log_p = discretised_log_likelihood(BINS, torch.tensor(mean).double(), torch.tensor(log_std).double())
    # Bins whose mass rounds to nothing count 1e-12.
    assert log_p.exp().sum().item() == pytest.approx(1, abs=256e-12)


@pytest.mark.parametrize(("mean", "log_std"), [(0.1, -1.0), (-0.9, -3.0), (0.0, 0.0)])
def test_each_bin_holds_the_gaussians_mass(mean, log_std):
    """Against the exact distribution function; the tanh approximation is off by up to 2e-4 in each."""
    exact = Normal(torch.tensor(mean).double(), math.exp(log_std))
    edges = torch.cat([torch.tensor([-torch.inf]), (BINS[1:] + BINS[:-1]) / 2, torch.tensor([torch.inf])])
    mass = exact.cdf(edges[1:]) - exact.cdf(edges[:-1])
    log_p = discretised_log_likelihood(BINS, torch.tensor(mean).double(), torch.tensor(log_std).double())
    assert (log_p.exp() - mass).abs().max() < 4e-4
    assert log_p.argmax() == mass.argmax()


class Oracle:
    """A backend that knows x0: the ideal eps, x0 or v of every x_t."""

    name, precision, device = "oracle", "fp32", torch.device("cpu")

    def __init__(self, config: UNetConfig, diffusion: Diffusion, x0: Tensor) -> None:
        self.manifest, self._diffusion, self._x0 = tiny_manifest(config), diffusion, x0

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        abar = float(self._diffusion.schedule.alphas_cumprod[round(timestep[0].item())])
        if self._diffusion.prediction is Prediction.X0:
            return self._x0
        eps = (x_t - math.sqrt(abar) * self._x0) / math.sqrt(1 - abar)
        if self._diffusion.prediction is Prediction.V:
            return math.sqrt(abar) * eps - math.sqrt(1 - abar) * self._x0
        return eps

    def close(self) -> None:
        pass


@pytest.mark.parametrize("prediction", [Prediction.EPS, Prediction.X0, Prediction.V])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_a_perfect_network_pays_for_the_last_step_and_the_prior_only(prediction, steps):
    diffusion = Diffusion(linear_schedule(100), prediction, Variance.FIXED_SMALL, clip=None)
    x0 = (torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0)) / 127.5) - 1
    backend = Oracle(adm_unet(mult=(1,), size=(4, 4)), diffusion, x0)
    terms = variational_bound(backend, x0, steps, diffusion=diffusion)
    assert terms.vb.shape == terms.x0_mse.shape == terms.eps_mse.shape == (2, steps)
    assert terms.vb[:, :-1].abs().sum() < 1e-3
    assert terms.x0_mse.max() < 1e-6
    assert terms.eps_mse.max() < 1e-3
    torch.testing.assert_close(terms.total, terms.vb.sum(dim=1) + terms.prior)
    abar = float(diffusion.schedule.alphas_cumprod[99 if steps > 1 else 0])
    prior = kl_divergence(Normal(math.sqrt(abar) * x0, math.sqrt(1 - abar)), Normal(0.0, 1.0))
    torch.testing.assert_close(terms.prior, prior.flatten(1).mean(dim=1) / math.log(2), atol=1e-5, rtol=1e-4)


def test_a_wrong_mean_costs_its_distance_over_the_variance():
    """A step's KL is (difference of means)^2 / (2 variance) where both variances are the posterior's."""
    schedule = cosine_schedule(50)
    diffusion = Diffusion(schedule, Prediction.X0, Variance.FIXED_SMALL, clip=None)
    x0 = torch.full((1, 1, 4, 4), 0.2)
    off = Oracle(adm_unet(mult=(1,), size=(4, 4)), diffusion, x0 + 0.1)
    vb = variational_bound(off, x0, 50, diffusion=diffusion).vb[0].flip(0).double()
    distance = 0.1 * torch.from_numpy(schedule.posterior_mean_x0)[1:]
    expected = distance**2 / (2 * torch.from_numpy(schedule.posterior_variance)[1:]) / math.log(2)
    torch.testing.assert_close(vb[1:], expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("variance", [Variance.FIXED_SMALL, Variance.FIXED_LARGE])
def test_the_last_step_is_the_likelihood_of_the_image(variance):
    """-log2 p(x0 | x_1), whose mean is the predicted x0 and whose variance is that of DDPM's last step."""
    schedule = cosine_schedule(50)
    diffusion = Diffusion(schedule, Prediction.X0, variance, clip=None)
    x0 = torch.full((1, 1, 4, 4), 51 / 127.5 - 1)
    off = Oracle(adm_unet(mult=(1,), size=(4, 4)), diffusion, x0 + 0.01)
    vb = variational_bound(off, x0, 50, diffusion=diffusion).vb[0, -1].item()
    # Both fixed variances are the posterior's of t = 1 at t = 0.
    log_std = torch.tensor(0.5 * math.log(schedule.posterior_variance[1]))
    expected = -discretised_log_likelihood(x0, x0 + 0.01, log_std).mean().item() / math.log(2)
    assert vb == pytest.approx(expected, rel=1e-4)


def test_a_learned_variance_is_interpolated_between_its_bounds():
    """A network that is right about x0 pays for its variance alone: 5/8 of the way from log posterior to log beta."""
    schedule = cosine_schedule(50)
    diffusion = Diffusion(schedule, Prediction.X0, Variance.LEARNED_RANGE, clip=None)
    x0 = torch.full((1, 1, 4, 4), 0.2)
    channels = torch.cat([x0, torch.full_like(x0, 0.25)], dim=1)
    vb = variational_bound(
        Oracle(adm_unet(mult=(1,), size=(4, 4)), diffusion, channels), x0, 50, diffusion=diffusion
    ).vb
    small, large = (torch.tensor(v[1:]).log() for v in (schedule.posterior_variance, schedule.betas))
    mean = torch.zeros(49, dtype=torch.float64)
    ours = Normal(mean, (0.5 * (small + 0.625 * (large - small))).exp())
    expected = kl_divergence(Normal(mean, (0.5 * small).exp()), ours) / math.log(2)
    torch.testing.assert_close(vb[0].flip(0)[1:].double(), expected, atol=1e-5, rtol=1e-3)
