"""Sampler's verbs: stream, progressive, interpolate, encode, decode, img2img, inpaint, nll."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from elementwise import LABELLED, PLAIN, SAMPLERS, Elementwise
from helpers import adm_unet, tiny_manifest
from solver_cases import ideal_eps
from torch import Tensor

from engine.diffusion.noise import INPAINTING, NOISE, normal
from engine.diffusion.prediction import Diffusion, Variance
from engine.diffusion.schedule import cosine_schedule, linear_schedule, space_timesteps
from engine.errors import RequestError
from engine.networks.config import UNetConfig
from engine.networks.inputs import UNCONDITIONED, Conditions
from engine.sampling.likelihood import variational_bound
from engine.sampling.requests import Request
from engine.sampling.sampler import Sampler
from engine.sampling.slots import Slots
from engine.sampling.starts import great_circle

ABAR = cosine_schedule(100).alphas_cumprod


def pictures(n: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class Gaussian(Elementwise):
    """The ideal eps of pixels from N(0.1, 0.3^2), on 1000 steps."""

    def __init__(self, config: UNetConfig = PLAIN) -> None:
        super().__init__(config)
        of = Diffusion(linear_schedule(1000), variance=Variance.FIXED_SMALL, clip=None)
        self.manifest = dataclasses.replace(tiny_manifest(config), diffusion=of)

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        abar = self.manifest.diffusion.schedule.alphas_cumprod
        lines = [ideal_eps(float(abar[round(t)]), 0.1, 0.3) for t in timestep.tolist()]
        slope, offset = (torch.tensor(v, dtype=torch.float32)[:, None, None, None] for v in zip(*lines, strict=True))
        return slope * x_t + offset


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_stream_is_sample_step_by_step(options):
    sampler = Sampler(Elementwise(LABELLED))
    images = sampler.sample(3, steps=4, seed=7, **options)
    rows = len(sampler.table(steps=4, **options))
    seen: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for preview in sampler.stream(3, steps=4, seed=7, batch_size=2, **options):
        seen[preview.index].append(preview.step)
        assert preview.steps == rows
        assert preview.x0.abs().max() <= 1
        assert (preview.image is None) == (preview.step < rows)
        if preview.image is not None:
            assert torch.equal(preview.image, images[preview.index])
    assert seen == {i: list(range(1, rows + 1)) for i in range(3)}


def test_stream_works_step_by_step():
    """One network call for the first preview of each image, and no more until the next is asked for."""
    backend = Elementwise(PLAIN)
    stream = Sampler(backend).stream(2, steps=5)
    assert not backend.timesteps
    assert [next(stream).index, next(stream).index] == [0, 1]
    assert len(backend.timesteps) == 1
    with pytest.raises(RequestError, match="batch_size is 0"):
        Sampler(backend).stream(2, batch_size=0)


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_progressive_ends_in_sample(options):
    sampler = Sampler(Elementwise(LABELLED))
    progress = sampler.progressive(3, steps=4, seed=7, batch_size=2, **options)
    assert progress.x.shape == progress.x0.shape == (3, len(sampler.table(steps=4, **options)), 1, 4, 4)
    assert torch.equal(progress.x[:, -1].clamp(-1, 1), sampler.sample(3, steps=4, seed=7, **options))
    for preview in sampler.stream(3, steps=4, seed=7, **options):
        assert torch.equal(progress.x0[preview.index, preview.step - 1].clamp(-1, 1), preview.x0)


def test_interpolation_goes_from_image_to_image():
    sampler = Sampler(Elementwise(LABELLED))
    frames = sampler.interpolate(5, 9, 4, steps=3, labels=2)
    ends = sampler.sample(2, steps=3, labels=2, seeds=[5, 9])
    assert torch.equal(frames[[0, -1]], ends)
    assert len({frame.numpy().tobytes() for frame in frames}) == 4
    drawn = sampler.interpolate(5, 9, 2, steps=3)
    assert torch.equal(drawn[0], sampler.sample(1, steps=3, seed=5)[0])


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_a_great_circle(weight):
    """Between orthogonal noises of one length the length stays, and the angle is shared out."""
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])
    expected = [3 * math.cos(weight * math.pi / 2), 3 * math.sin(weight * math.pi / 2)]
    assert great_circle(a, b, weight).tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.equal(great_circle(a, a, weight), a)


def test_decode_returns_what_was_encoded():
    """On the ideal network of Gaussian pixels; the noise is that of the standardised pixels."""
    sampler, images = Sampler(Gaussian()), 0.5 * pictures()
    errors = []
    for steps in (50, 200):
        noise = sampler.encode(images, steps=steps)
        torch.testing.assert_close(noise, (images - 0.1) / 0.3, atol=10 / steps, rtol=0)
        errors.append(float((sampler.decode(noise, steps=steps) - images).abs().max()))
    assert errors[1] < 0.5 * errors[0], errors
    # Of a range of 2: the worst pixel is off by less than 1/64 of it.
    assert errors[1] < 2 / 64, errors


def test_decode_is_sample_from_that_noise():
    sampler = Sampler(Elementwise(PLAIN))
    x_T = torch.from_numpy(normal([3, 4], [0, 0], (1, 4, 4)))
    assert torch.equal(sampler.decode(x_T, steps=5), sampler.sample(2, steps=5, seeds=[3, 4]))


def test_encoding_without_a_label_is_that_of_the_null_class():
    backend = Elementwise(LABELLED)
    sampler, images = Sampler(backend), pictures(2)
    noise = sampler.encode(images, steps=3)
    assert backend.labels == [[10, 10]] * 3
    assert backend.timesteps == [[t, t] for t in (0.0, 50.0, 99.0)]
    assert torch.equal(noise, sampler.encode(images, steps=3, labels=10))
    assert not torch.equal(noise, sampler.encode(images, steps=3, labels=1))
    sampler.decode(noise, steps=3)
    assert backend.labels[-1] == [10, 10]


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_img2img_starts_part_way(scale):
    """strength 0.4 of 10 steps are the last 4, from the image noised to the fourth's level with draw 0."""
    backend = Elementwise(LABELLED)
    of = dataclasses.replace(backend.manifest.diffusion, timestep_scale=scale)
    backend.manifest = dataclasses.replace(backend.manifest, diffusion=of)
    starts: list[Tensor] = []

    def spy(x_t: Tensor, *rest: Any) -> Tensor:
        starts.append(x_t.clone())
        return backend(x_t, *rest)

    spy.manifest, spy.device, spy.name = backend.manifest, backend.device, "spy"  # type: ignore[attr-defined]
    sampler, images = Sampler(spy), pictures(2)  # type: ignore[arg-type]
    result = sampler.img2img(images, 0.4, steps=10, labels=1, seeds=[8, 3])
    assert [t[0] for t in backend.timesteps] == [33 * scale, 22 * scale, 11 * scale, 0]
    z = normal([8, 3], [0, 0], (1, 4, 4))
    expected = math.sqrt(ABAR[33]) * images.numpy() + math.sqrt(1 - ABAR[33]) * z
    np.testing.assert_allclose(starts[0], expected, atol=1e-6)
    assert result.abs().max() <= 1
    alone = sampler.img2img(images[1:], 0.4, steps=10, labels=1, seeds=[3])
    assert torch.equal(alone[0], result[1])


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_img2img_on_gaussian_data(options):
    """The closer to the end it starts, the closer the result stays to the image; a multistep table loses its memory."""
    sampler, images = Sampler(Gaussian()), 0.5 * pictures()
    distances = []
    for strength in (0.02, 0.2, 1.0):
        result = sampler.img2img(images, strength, steps=50, seed=1, **options)
        distances.append(float((result - images).square().mean().sqrt()))
    # A DDPM of large variance forgets the image in a fifth of the steps.
    assert distances[0] < 0.05 < min(distances[1:]), distances
    table = sampler.table(steps=50, sampler=options["sampler"]).last(7)
    assert len(table) == 7
    assert table.R[0] == 0


def test_inpainting_keeps_what_is_known():
    """Exactly, at the end; and the rest comes out of a picture that holds it at every step."""
    backend = Elementwise(LABELLED)
    sampler, images = Sampler(backend), pictures(2)
    mask = torch.zeros(4, 4)
    mask[:, 2:] = 1
    for options in SAMPLERS.values():
        result = sampler.inpaint(images, mask, steps=6, labels=1, **options)
        assert torch.equal(result[..., :2], images[..., :2])
        plain = sampler.sample(2, steps=6, labels=1, **options)
        # These elements take nothing of their neighbours, so what is made is what sample() makes.
        assert torch.equal(result[..., 2:], plain[..., 2:])
        assert torch.equal(sampler.inpaint(images, torch.ones(1, 4, 4), steps=6, labels=1, **options), plain)
        for batch in (1, 3):
            assert torch.equal(sampler.inpaint(images, mask, steps=6, labels=1, batch_size=batch, **options), result)


def test_the_known_part_is_noised_to_the_level_of_each_step():
    """sqrt(abar) known + sqrt(1 - abar) z', z' of stream 1 and the step's draw; half a mask mixes the two."""
    sampler, images = Sampler(Elementwise(PLAIN)), pictures(1)
    plan = sampler.requests(1, table=sampler.table(steps=5, sampler="ddim"), seed=4)
    mask = torch.zeros(1, 4, 4)
    mask[:, 0] = 0.5
    request = dataclasses.replace(plan[0], known=images[0], mask=mask)
    before = [step.x_prev for step in sampler.run(plan)]
    abar = [*ABAR[space_timesteps(100, 5)][:4][::-1], 1.0]
    start = None
    for k, step in enumerate(sampler.run([request])):
        z = normal([4], [k + 1], (1, 4, 4), INPAINTING)[0]
        there = math.sqrt(abar[k]) * images[0].numpy() + math.sqrt(1 - abar[k]) * z
        np.testing.assert_allclose(step.x_prev[0, 1:], there[0, 1:], atol=1e-6)
        if start is None:
            mixed = 0.5 * (before[0][0, 0].numpy() + there[0, 0])
            np.testing.assert_allclose(step.x_prev[0, 0], mixed, atol=1e-6)
        start = step.x_prev
    assert not np.array_equal(normal([4], [1], (1, 4, 4), INPAINTING), normal([4], [1], (1, 4, 4), NOISE))


def test_a_known_image_changes_no_batch_mate():
    sampler, images = Sampler(Elementwise(PLAIN)), pictures(2)
    requests = sampler.requests(2, table=sampler.table(steps=4, sampler="ddpm"))
    known = dataclasses.replace(requests[0], known=images[0], mask=torch.zeros(1, 4, 4))
    alone = [s.x_prev for s in sampler.run([requests[1]])]
    together = [s.x_prev for s in sampler.run([known, requests[1]]) if s.request.index == 1]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_nll_is_the_bound():
    config = adm_unet(mult=(1,), size=(4, 4))
    sampler, images = Sampler(Gaussian(config)), 0.5 * pictures(5)
    bits = sampler.nll(images, steps=20, seed=3, batch_size=2)
    expected = variational_bound(sampler.backend, images, 20, seeds=[3, 4, 5, 6, 7]).total
    torch.testing.assert_close(bits, expected)
    assert torch.equal(sampler.nll(images[2:3], steps=20, seed=5), bits[2:3])
    # Further from the data's mean is less likely.
    assert sampler.nll(torch.full((1, 1, 4, 4), 0.9), steps=20) > sampler.nll(torch.full((1, 1, 4, 4), 0.1), steps=20)


def test_nll_takes_all_steps_and_the_null_class():
    backend = Elementwise(LABELLED)
    Sampler(backend).nll(pictures(1))
    assert [t[0] for t in backend.timesteps] == [float(t) for t in reversed(range(100))]
    assert set(map(tuple, backend.labels)) == {(10,)}


def made(verb: str, *arguments: Any, config: UNetConfig = PLAIN, **options: Any) -> Tensor:
    return getattr(Sampler(Elementwise(config)), verb)(*arguments, **({"steps": 2} | options))


SELF_CONDITIONED = adm_unet(mult=(1,), size=(4, 4), super_resolution=True)
NO_NULL = dataclasses.replace(LABELLED, null_class=None)
REFUSALS = {
    "n is 1; expected 2 or more images to interpolate": lambda: made("interpolate", 0, 1, 1),
    "interpolate has its two seeds; leave seed and seeds out": lambda: made("interpolate", 0, 1, 3, seed=4),
    "need a sampler without noise: ddim with eta 0, dpmpp or plms": lambda: made(
        "interpolate", 0, 1, 3, sampler="ddpm"
    ),
    "encode is DDIM with eta 0; leave sampler and eta out": lambda: made("encode", pictures(), sampler="dpmpp"),
    "decode is DDIM with eta 0; leave sampler and eta out": lambda: made("decode", pictures(), eta=0.5),
    "this network needs labels, and none of them means none": lambda: made("encode", pictures(), config=NO_NULL),
    r"images of shape \(1, 4, 4\) given; expected \[n, 1, 4, 4\]": lambda: made("encode", pictures()[0]),
    r"noise of shape \(3, 1, 4, 3\) given": lambda: made("decode", pictures()[..., :3]),
    r"images of torch.uint8 given; expected floats in \[-1, 1\]": lambda: made("img2img", pictures().byte()),
    "images given with NaN or infinite values": lambda: made("nll", pictures() * math.nan),
    r"images reach 255; expected values in \[-1, 1\]": lambda: made("img2img", torch.full((1, 1, 4, 4), 255.0)),
    "strength is 0; expected a number above 0": lambda: made("img2img", pictures(), 0),
    "strength is 1.5; expected": lambda: made("img2img", pictures(), 1.5),
    r"mask has shape \(3,\); expected one for \(3, 1, 4, 4\)": lambda: made("inpaint", pictures(), torch.ones(3)),
    r"mask holds values outside 0 \(kept\) to 1 \(made\)": lambda: made("inpaint", pictures(), torch.full((4, 4), 2.0)),
    "the bound takes each step by itself": lambda: made(
        "nll", pictures(), config=dataclasses.replace(SELF_CONDITIONED, self_condition=True)
    ),
    "a known image and its mask belong together": lambda: Slots(Elementwise(PLAIN), 1).enter(
        0, Request(0, Sampler(Elementwise(PLAIN)).table(steps=2, sampler="ddim"), 0, known=pictures()[0])
    ),
    "batch_size is 0; expected 1 or more": lambda: made("nll", pictures(), batch_size=0),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(RequestError, match=message):
        REFUSALS[message]()
