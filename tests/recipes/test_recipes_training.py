"""The digits recipe: its coefficients, what its two losses train, and the target of a guided teacher."""

from __future__ import annotations

import pytest
import torch

from engine.diffusion.schedule import cosine_schedule
from engine.networks.unet import UNet
from judging.digits import NULL_CLASS
from recipes.digits_net import digits_unet, init_weights
from recipes.train_digits import Diffusion, Forward, guided_target, learning_rate


@pytest.fixture
def model() -> UNet:
    torch.manual_seed(0)
    net = UNet(digits_unet())
    init_weights(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 1, 32, 32, generator=generator), torch.tensor([900, 3]), torch.tensor([4, NULL_CLASS])


def test_single_steps_are_those_of_the_schedule():
    schedule, t = cosine_schedule(1000), torch.arange(1000)
    wanted = (schedule.posterior_mean_x0, schedule.posterior_mean_xt, schedule.posterior_log_variance)
    got = Diffusion().posterior(t, torch.ones_like(t))
    for values, table in zip(got, wanted, strict=False):
        torch.testing.assert_close(values.flatten().double(), torch.tensor(table), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(got[3].flatten().exp().double(), torch.tensor(schedule.betas), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("t", "stride", "before"), [(500, 20, 480), (12, 20, 0), (4, 4, 0)])
def test_long_steps_are_those_of_two_timesteps(t, stride, before):
    """Bayes' rule for Gaussians, with the precisions of x_t given x at `before` and of that given x0."""
    abar = cosine_schedule(1000).alphas_cumprod
    ratio = abar[t] / abar[before]
    precision = ratio / (1 - ratio) + 1 / (1 - abar[before])
    x0, x_t, lower, upper = Diffusion().posterior(torch.tensor([t]), torch.tensor([stride]))
    assert x0.item() == pytest.approx(abar[before] ** 0.5 / (1 - abar[before]) / precision, rel=1e-5)
    assert x_t.item() == pytest.approx(ratio**0.5 / (1 - ratio) / precision, rel=1e-5)
    assert lower.exp().item() == pytest.approx(1 / precision, rel=1e-5)
    assert upper.exp().item() == pytest.approx(1 - ratio, rel=1e-5)


def test_the_variance_trains_its_own_weights_alone(model):
    x_t, t, y = batch()
    out = Forward(model)(x_t, t, y)
    torch.testing.assert_close(out, model(x_t, t.float(), y))
    x0 = torch.zeros_like(x_t)
    mse, bound = Diffusion().losses(out, x0, x0, x_t, t, torch.tensor([20, 1]))
    bound.backward(retain_graph=True)
    *trunk, weight, bias = model.parameters()
    assert all(p.grad is None or not p.grad.any() for p in trunk)
    assert weight.grad is not None
    assert bias.grad is not None
    assert not weight.grad[0].any()
    assert weight.grad[1].any()
    bias.grad = None
    mse.backward()
    assert bias.grad is not None
    assert bias.grad[0] != 0
    assert bias.grad[1] == 0
    assert all(p.grad is not None and p.grad.any() for p in trunk[-4:])


def test_a_guided_target(model):
    """Unlabelled images have no guidance; a labelled one moves away from its unlabelled prediction."""
    x_t, t, y = batch()
    target = guided_target(model, 0.5, x_t, t, y)
    with torch.no_grad():
        labelled, without = (model(x_t, t.float(), label)[:, :1] for label in (y, torch.full_like(y, NULL_CLASS)))
    torch.testing.assert_close(target[0], without[0] + 1.5 * (labelled[0] - without[0]))
    torch.testing.assert_close(target[1], without[1])


@pytest.mark.parametrize("total", [100, 6000])
def test_learning_rate(total):
    rates = [learning_rate(i, total, 2.0) for i in range(total)]
    assert max(rates) == pytest.approx(2.0)
    assert 0 < rates[0] < 0.3
    assert rates[-1] < 0.01
