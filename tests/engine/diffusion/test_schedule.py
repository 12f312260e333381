"""engine.diffusion.schedule beside formulas written a second time, in plain Python, from the papers."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from helpers import FLOAT64_PRODUCT
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule, space_timesteps
from engine.errors import ConfigError, RequestError
from engine.json_form import decode, encode

LENGTHS = [21, 50, 100, 999, 1000, 4000]


def linear_by_hand(steps: int) -> list[float]:
    """DDPM's betas, 1e-4 to 0.02 in 1000 steps, scaled to another length."""
    first, last = 0.1 / steps, 20.0 / steps
    return [first + (last - first) * i / (steps - 1) for i in range(steps)]


def cosine_by_hand(steps: int) -> list[float]:
    """Improved DDPM, eq. 17: f(t) = cos(((t/T + s) / (1 + s)) pi/2)^2 with s = 0.008."""
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return [min(1 - f[i + 1] / f[i], 0.999) for i in range(steps)]


def products(betas: list[float]) -> list[float]:
    """prod_{s <= t} (1 - beta_s) for every t."""
    found, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        found.append(product)
    return found


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize(("make", "by_hand"), [(linear_schedule, linear_by_hand), (cosine_schedule, cosine_by_hand)])
def test_second_opinion_on_betas_and_what_follows(make, by_hand, steps):
    schedule, betas = make(steps), by_hand(steps)
    np.testing.assert_allclose(schedule.betas, betas, rtol=FLOAT64_PRODUCT)
    abar = products(betas)
    np.testing.assert_allclose(schedule.alphas_cumprod, abar, rtol=FLOAT64_PRODUCT)
    np.testing.assert_allclose(schedule.alphas_cumprod_prev, [1.0, *abar[:-1]], rtol=FLOAT64_PRODUCT)
    np.testing.assert_allclose(schedule.alphas_cumprod_next, [*abar[1:], 0.0], rtol=FLOAT64_PRODUCT)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == np.float64
    assert schedule.timesteps.tolist() == list(range(steps))


@pytest.mark.parametrize("make", [linear_schedule, cosine_schedule])
@pytest.mark.parametrize("respacing", ["1000", "250", "7", "2"])
def test_posterior_is_the_product_of_two_gaussians(make, respacing):
    """q(x_{t-1} | x_t, x_0) from Bayes' rule: precisions add, and means weighted by them."""
    s = make(1000).respaced(space_timesteps(1000, respacing))
    for t in (1, len(s) // 2, len(s) - 1):
        prior_mean, prior_variance = math.sqrt(s.alphas_cumprod[t - 1]), 1 - s.alphas_cumprod[t - 1]
        gain, noise = math.sqrt(1 - s.betas[t]), s.betas[t]
        precision = 1 / prior_variance + gain**2 / noise
        assert s.posterior_variance[t] == pytest.approx(1 / precision, rel=1e-10)
        assert s.posterior_mean_x0[t] == pytest.approx(prior_mean / prior_variance / precision, rel=1e-10)
        assert s.posterior_mean_xt[t] == pytest.approx(gain / noise / precision, rel=1e-10)
    assert s.posterior_variance[0] == 0
    assert s.posterior_mean_x0[0] == pytest.approx(1)
    assert s.posterior_mean_xt[0] == 0


def test_first_log_variances_are_those_of_the_second_step():
    s = cosine_schedule(100)
    assert s.posterior_log_variance[0] == s.posterior_log_variance[1] == math.log(s.posterior_variance[1])
    assert s.posterior_log_variance[50] == math.log(s.posterior_variance[50])
    assert s.fixed_large_variance[0] == s.posterior_variance[1]
    assert s.fixed_large_variance[1:].tolist() == s.betas[1:].tolist()


def test_one_step_has_finite_variances():
    s = cosine_schedule(100).respaced(space_timesteps(100, 1))
    assert len(s) == 1
    assert s.fixed_large_variance.tolist() == s.betas.tolist()
    assert s.posterior_log_variance.tolist() == np.log(s.betas).tolist()


@settings(max_examples=25)
@given(kind=st.sampled_from([linear_schedule, cosine_schedule]), steps=st.integers(21, 3000))
def test_alphas_cumprod_falls_strictly_in_0_1(kind, steps):
    abar = kind(steps).alphas_cumprod
    assert abar[0] < 1
    assert abar[-1] > 0
    assert np.all(np.diff(abar) < 0)


@settings(max_examples=60)
@given(data=st.data(), total=st.integers(1, 1200))
def test_even_spacing_of_a_count(data, total):
    count = data.draw(st.integers(1, total))
    chosen = space_timesteps(total, data.draw(st.sampled_from([count, str(count), f" {count} "])))
    assert len(chosen) == count
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert chosen[0] == 0
    assert chosen[-1] == (total - 1 if count > 1 else 0)
    # Evenly: no place is further than rounding from its exact position.
    exact = [i * (total - 1) / max(count - 1, 1) for i in range(count)]
    assert np.abs(chosen - np.array(exact)).max() <= 0.5 + 1e-6


@settings(max_examples=60)
@given(data=st.data(), total=st.integers(1, 1200))
def test_sections(data, total):
    parts = data.draw(st.integers(1, min(8, total)))
    sizes = [total // parts + (1 if i < total % parts else 0) for i in range(parts)]
    counts = [data.draw(st.integers(1, size)) for size in sizes]
    chosen = space_timesteps(total, ",".join(map(str, counts))).tolist()
    assert len(chosen) == sum(counts)
    assert chosen == sorted(set(chosen))
    start = 0
    for size, count in zip(sizes, counts, strict=True):
        inside = [t for t in chosen if start <= t < start + size]
        assert len(inside) == count
        assert inside == (space_timesteps(size, count) + start).tolist()
        start += size


@settings(max_examples=60)
@given(total=st.integers(2, 1200), count=st.integers(0, 1300))
def test_ddim_strides_or_a_clear_error(total, count):
    possible = [stride for stride in range(1, total) if math.ceil(total / stride) == count]
    if possible:
        chosen = space_timesteps(total, f"ddim{count}")
        assert chosen.tolist() == list(range(0, total, possible[0]))
        assert len(chosen) == count
        return
    with pytest.raises(RequestError, match=f"no integer stride gives {count} of {total} timesteps") as caught:
        space_timesteps(total, f"ddim{count}")
    remedy = f'use {count} without "ddim"' if 1 <= count <= total else "take fewer, and 2 or more"
    assert remedy in str(caught.value)


def test_published_examples():
    def walk(start: int, count: int) -> list[int]:
        """The original adds the stride up, so that half-way places fall to the side of its rounding errors."""
        places = itertools.accumulate([99 / (count - 1)] * (count - 1), initial=0.0)
        return [start + round(place) for place in places]

    assert space_timesteps(300, "10,15,20").tolist() == walk(0, 10) + walk(100, 15) + walk(200, 20)
    # A section may be left out; here of 34, 33 and 33 timesteps.
    assert space_timesteps(100, "3,0,7").tolist() == [0, 16, 33, 67, 72, 78, 83, 88, 94, 99]
    assert space_timesteps(1000, "ddim25").tolist() == list(range(0, 1000, 40))
    assert space_timesteps(1000, 1000).tolist() == list(range(1000))


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("0", "cannot take 0 steps from a section of 100 timesteps; take 1 to 100"),
        (-3, "cannot take -3 steps"),
        (101, "cannot take 101 steps from a section of 100 timesteps"),
        ("10,51", "cannot take 51 steps from a section of 50 timesteps; take 0 to 50"),
        ("0,0", "'0,0' takes no step of any section"),
        ("ten", 'cannot read \'ten\' as steps; expected a number, sections like "10,10,10" or "ddim50"'),
        ("", "cannot read '' as steps"),
        (2.5, "cannot read 2.5 as steps"),
        ("10,,10", "cannot read '10,,10' as steps"),
        ("ddim", "cannot read 'ddim'; expected \"ddim\" and a number"),
        ("ddim2.5", "cannot read 'ddim2.5'"),
        ("ddim99", 'no integer stride gives 99 of 100 timesteps; use 99 without "ddim" instead'),
    ],
)
def test_steps_that_cannot_be_read(respacing, message):
    with pytest.raises(RequestError) as caught:
        space_timesteps(100, respacing)
    assert message in str(caught.value)


@settings(max_examples=30)
@given(data=st.data(), make=st.sampled_from([linear_schedule, cosine_schedule]), total=st.integers(21, 1200))
def test_respacing_keeps_alphas_cumprod(data, make, total):
    full = make(total)
    chosen = space_timesteps(total, data.draw(st.integers(1, total)))
    short = full.respaced(chosen)
    assert short.timesteps.tolist() == chosen.tolist()
    # The last betas of a short chain are close to 1: 1 - beta is exact to an ulp of 1, not of itself.
    np.testing.assert_allclose(short.alphas_cumprod, full.alphas_cumprod[chosen], rtol=FLOAT64_PRODUCT, atol=1e-15)
    # One step of the short chain is as many of the long one as lie between.
    gaps = zip([-1, *chosen[:-1]], chosen, strict=True)
    kept = [1 - math.prod(1 - full.betas[a + 1 : b + 1]) for a, b in gaps]
    np.testing.assert_allclose(short.betas, kept, rtol=1e-8, atol=1e-14)


def test_all_timesteps_leave_the_schedule_as_it_is():
    full = linear_schedule(100)
    assert full.respaced(space_timesteps(100, 100)) is full


@pytest.mark.parametrize("steps", [2, 5, 19, 20])
def test_short_linear_schedules_are_refused(steps):
    with pytest.raises(
        ConfigError, match=r"every beta must lie in \(0, 1\), got .* to .*; .* 20 steps or fewer .*: use"
    ):
        linear_schedule(steps)


@pytest.mark.parametrize("betas", [[0.0], [0.1, 1.0], [0.1, -0.1], [0.1, float("nan")], [2.0], [float("inf")]])
def test_betas_out_of_range(betas):
    with pytest.raises(ConfigError, match=r"every beta must lie in \(0, 1\)"):
        NoiseSchedule(np.array(betas))


@pytest.mark.parametrize("shape", [(0,), (2, 2), ()])
def test_betas_of_another_shape(shape):
    with pytest.raises(ConfigError, match="betas must be one non-empty list, got shape"):
        NoiseSchedule(np.full(shape, 0.1))


def test_timesteps_of_another_length():
    with pytest.raises(ConfigError, match="2 timesteps given for 3 betas"):
        NoiseSchedule(np.full(3, 0.1), np.array([0, 1]))


def test_a_schedule_cannot_be_changed():
    betas = np.full(3, 0.1)
    schedule = NoiseSchedule(betas)
    betas[0] = 0.5
    assert schedule.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.5


def test_float32_betas_are_multiplied_in_float64():
    betas = linear_schedule(1000).betas.astype(np.float32)
    expected = np.cumprod(1.0 - betas.astype(np.float64))
    assert NoiseSchedule(betas).alphas_cumprod.tolist() == expected.tolist()


@settings(max_examples=30)
@given(st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), min_size=1, max_size=20))
def test_json_gives_the_same_bits(betas):
    schedule = NoiseSchedule(np.array(betas))
    again = decode(json.loads(json.dumps(encode(schedule))), NoiseSchedule)
    assert again.betas.tobytes() == schedule.betas.tobytes()
    assert again.timesteps.tobytes() == schedule.timesteps.tobytes()


def test_json_of_a_respaced_schedule_keeps_its_timesteps():
    schedule = linear_schedule(1000).respaced(space_timesteps(1000, 7))
    again = decode(json.loads(json.dumps(encode(schedule))), NoiseSchedule)
    assert again.betas.tobytes() == schedule.betas.tobytes()
    assert again.timesteps.tolist() == schedule.timesteps.tolist() != list(range(7))


@settings(max_examples=20)
@given(
    prediction=st.sampled_from(Prediction),
    variance=st.sampled_from(Variance),
    clip=st.sampled_from([None, 1.0, 0.3]),
    scale=st.floats(0.01, 10),
    low=st.floats(-3, 0),
)
def test_json_of_a_diffusion(prediction, variance, clip, scale, low):
    diffusion = Diffusion(cosine_schedule(30), prediction, variance, clip, scale, (low, 1.0))
    again = decode(json.loads(json.dumps(encode(diffusion))), Diffusion)
    assert encode(again) == encode(diffusion)
    assert again.schedule.betas.tobytes() == diffusion.schedule.betas.tobytes()
    assert (again.prediction, again.variance, again.data_range) == (prediction, variance, (low, 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prediction": "noise"}, r"Invalid enum value 'noise' - at `\$.prediction`"),
        ({"variance": 3}, r"at `\$.variance`"),
        ({"data_range": [0]}, r"length 2, got 1 - at `\$.data_range`"),
        ({"schedule": {}}, r"missing required field `betas` - at `\$.schedule`"),
        ({"timestep_scale": "x"}, r"Expected `float`, got `str` - at `\$.timestep_scale`"),
    ],
)
def test_json_of_a_diffusion_that_is_wrong(change, message):
    data = encode(Diffusion(cosine_schedule(30))) | change
    with pytest.raises(ConfigError, match=f"this is no Diffusion: .*{message}"):
        decode(data, Diffusion)
