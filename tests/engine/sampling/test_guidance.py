"""Guidance: classifier-free in one doubled batch, its variants, and the timesteps that either kind is limited to."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from elementwise import LABELLED, PLAIN, SAMPLERS, CountingGuide, Elementwise, finished, guided, labelled_request
from helpers import adm_unet, random_network, tiny_manifest
from torch import Tensor

from engine.backends.eager.eager_backend import EagerBackend
from engine.diffusion.guidance import EVERYWHERE, ClassifierFreeGuidance, ClassifierGuidance
from engine.diffusion.ladder import visited_timesteps
from engine.diffusion.noise import normal
from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import cosine_schedule
from engine.diffusion.solvers import ddim_table
from engine.errors import RequestError
from engine.networks.config import LabelInput
from engine.networks.inputs import UNCONDITIONED, Conditions
from engine.sampling.options import SamplingOptions
from engine.sampling.requests import Request, make_requests
from engine.sampling.sampler import Sampler
from engine.sampling.slots import Slots

NULL = LABELLED.null_class


class Straight(Elementwise):
    """Calls the network twice instead of once with a doubled batch, and combines the results by the paper's line."""

    scale = 1.0

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        assert conditions.label is not None
        null = Conditions(torch.full_like(conditions.label, 10))
        labelled, without = super().__call__(x_t, timestep, conditions), super().__call__(x_t, timestep, null)
        out = labelled.clone()
        out[:, :1] = without[:, :1] + self.scale * (labelled[:, :1] - without[:, :1])
        return out


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, -1.0])
@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_the_papers_line(options, scale):
    """without + scale (with - without), Ho & Salimans (2022) in today's scale; variance of the labelled half."""
    straight = Straight(LABELLED)
    straight.scale = scale
    expected = Sampler(straight).sample(3, steps=4, labels=[1, 5, 2], **options)
    got = Sampler(Elementwise(LABELLED)).sample(3, steps=4, labels=[1, 5, 2], guidance_scale=scale, **options)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert not torch.equal(got, Sampler(Elementwise(LABELLED)).sample(3, steps=4, labels=[1, 5, 2], **options))


def test_the_variance_channels_are_the_labelled_ones():
    labelled, without = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0)).unbind()
    for cfg in (ClassifierFreeGuidance(4.0), ClassifierFreeGuidance(4.0, 0.7, 0.2)):
        assert torch.equal(guided(labelled, without, cfg, 2)[2:], labelled[2:])
        changed = guided(labelled, torch.cat([without[:2], labelled[2:] + 9]), cfg, 2)
        assert torch.equal(changed, guided(labelled, without, cfg, 2))


def test_scale_1_is_one_call_of_the_labelled_network():
    backend = Elementwise(LABELLED)
    sampler = Sampler(backend)
    plain = sampler.sample(3, steps=4, labels=2)
    assert torch.equal(plain, sampler.sample(3, steps=4, labels=2, guidance_scale=1.0))
    rescaled = ClassifierFreeGuidance(1.0, 0.7, 0.0)
    assert torch.equal(plain, sampler.sample(3, steps=4, labels=2, guidance_scale=rescaled))
    assert [len(t) for t in backend.timesteps] == [3] * 12


def test_one_doubled_batch_of_the_guided_images_only():
    """Guided images are there once more, unlabelled and at their own timestep; the others are not."""
    backend = Elementwise(LABELLED)
    sampler = Sampler(backend)
    table, short = sampler.table(steps=4, sampler="ddim"), sampler.table(steps=2, sampler="ddim")
    slots = Slots(backend, 3)
    slots.enter(0, labelled_request(0, table, 0, 3, ClassifierFreeGuidance(2.0)))
    slots.enter(1, labelled_request(1, table, 1, 4))
    slots.step()
    slots.enter(2, labelled_request(2, short, 2, 5, ClassifierFreeGuidance(0.0)))
    slots.step()
    assert backend.timesteps == [[99.0, 99.0, 99.0], [66.0, 66.0, 99.0, 66.0, 99.0]]
    assert backend.labels == [[3, 4, NULL], [3, 4, 5, NULL, NULL]]


VARIANTS = [
    ClassifierFreeGuidance(3.0),
    None,
    ClassifierFreeGuidance(0.0),
    ClassifierFreeGuidance(6.0, rescale=0.7),
    ClassifierFreeGuidance(6.0, parallel=0.0),
    ClassifierFreeGuidance(2.0, 0.3, 0.5, interval=(20, 70)),
]


def test_a_seed_is_an_image_beside_other_guidance():
    """Each slot has its own scale and variant, and changes no bit of another's image."""
    sampler = Sampler(Elementwise(LABELLED))
    requests = []
    for cfg in VARIANTS:
        for sampler_name, steps in (("ddim", 5), ("ddpm", 3), ("dpmpp", 7)):
            made = sampler.requests(1, steps=steps, sampler=sampler_name, labels=3, seed=len(requests))
            requests.append(dataclasses.replace(made[0], index=len(requests), free_guidance=cfg))
    alone = {r.index: finished(sampler.run([r]))[r.index] for r in requests}
    for batch_size in (2, 5, 18):
        together = finished(sampler.run(requests[::-1], batch_size=batch_size))
        assert all(torch.equal(together[i], alone[i]) for i in alone)


def test_a_real_network_beside_two_calls():
    config = adm_unet(num_classes=4, null_class=3, learn_sigma=True)
    network = random_network(config)
    backend = EagerBackend(tiny_manifest(config), network, "fp32", None)
    images = Sampler(backend).sample(2, steps=1, labels=[0, 2], guidance_scale=2.5, seed=5)
    table = Sampler(backend).table(steps=1, sampler="ddim")
    x, t = Slots(backend, 1), torch.full((1,), float(table.timestep[0]))
    for i, y in enumerate((0, 2)):
        x.enter(0, Request(0, table, 5 + i, Conditions(torch.tensor([y]))))
        start = x._x_t[:1].clone()
        x.step()
        with torch.inference_mode():
            labelled, without = (network(start, t, torch.tensor([label]))[:, :1] for label in (y, 3))
        eps = without + 2.5 * (labelled - without)
        expected = (table.A[0] * start + table.B[0] * eps).clamp(-1, 1)[0]
        # B of the last timestep is large: 1e-5 in eps is more in x0.
        torch.testing.assert_close(images[i], expected.float(), atol=1e-4 * abs(table.B[0]), rtol=0)


def test_rescaling_restores_the_standard_deviation():
    """Lin et al. (2023), eq. 15 and 16: wholly at 1, and by that share between the two below."""
    labelled, without = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
    plain = guided(labelled, without, ClassifierFreeGuidance(5.0), 3)
    full = guided(labelled, without, ClassifierFreeGuidance(5.0, rescale=1.0), 3)
    assert full.std().item() == pytest.approx(labelled.std().item(), rel=1e-5)
    assert plain.std().item() > 2 * labelled.std().item()
    half = guided(labelled, without, ClassifierFreeGuidance(5.0, rescale=0.5), 3)
    torch.testing.assert_close(half, 0.5 * (plain + full))


def test_projection_removes_the_parallel_component():
    """Sadat et al. (2024), eq. 8: what is left of the update is orthogonal to the labelled result."""
    labelled, without = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double().unbind()
    update = guided(labelled, without, ClassifierFreeGuidance(2.0, parallel=0.0), 3) - labelled
    assert float((update * labelled).sum()) == pytest.approx(0, abs=1e-10)
    whole = labelled - without
    along = (whole * labelled).sum() / (labelled**2).sum() * labelled
    torch.testing.assert_close(update, whole - along)
    third = guided(labelled, without, ClassifierFreeGuidance(2.0, parallel=0.25), 3) - labelled
    torch.testing.assert_close(third, whole - 0.75 * along)


@pytest.mark.parametrize("timestep_scale", [1.0, 10.0, 1000 / 97])
def test_free_guidance_acts_in_its_interval_only(timestep_scale):
    """Ten steps at 0, 11, ..., 99; whatever the network's own time is. Outside there is no doubled batch."""
    backend = Elementwise(LABELLED)
    of = dataclasses.replace(backend.manifest.diffusion, timestep_scale=timestep_scale)
    backend.manifest = dataclasses.replace(backend.manifest, diffusion=of)
    sampler = Sampler(backend)
    cfg = ClassifierFreeGuidance(3.0, interval=(22, 55))
    images = sampler.sample(2, steps=10, labels=1, guidance_scale=cfg)
    assert [len(t) for t in backend.timesteps] == [2, 2, 2, 2, 4, 4, 4, 4, 2, 2]
    everywhere = sampler.sample(2, steps=10, labels=1, guidance_scale=3.0)
    assert not torch.equal(images, everywhere)
    nowhere = dataclasses.replace(cfg, interval=(56, 65))
    plain = sampler.sample(2, steps=10, labels=1)
    assert torch.equal(sampler.sample(2, steps=10, labels=1, guidance_scale=nowhere), plain)
    whole = dataclasses.replace(cfg, interval=(0, 99))
    assert torch.equal(sampler.sample(2, steps=10, labels=1, guidance_scale=whole), everywhere)


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_a_classifier_acts_in_its_interval_only(options):
    """Outside the interval the classifier is not called, and an image beside a guided one has a scale of 0."""
    sampler, guide = Sampler(Elementwise(PLAIN)), CountingGuide()
    guided = {"guidance": ClassifierGuidance(guide, 2.0, (22, 55))}
    images = sampler.sample(2, steps=10, labels=1, **options, **guided)
    assert [scale for _, scale in guide.calls] == [[2.0, 2.0]] * 4
    table, always = sampler.table(steps=10, **options), ClassifierGuidance(guide, 2.0)
    raw = [
        finished(sampler.run(sampler.requests(2, table=table, labels=1, guidance=chosen), guide))
        for chosen in (guided["guidance"], always)
    ]
    assert torch.equal(raw[0][0].clamp(-1, 1), images[0])
    assert not torch.equal(raw[0][0], raw[1][0])
    nowhere = ClassifierGuidance(CountingGuide(), 2.0, (56, 65))
    plain = sampler.sample(2, steps=10, labels=1, **options, guidance=dataclasses.replace(nowhere, scale=0.0))
    assert torch.equal(sampler.sample(2, steps=10, labels=1, **options, guidance=nowhere), plain)
    assert not nowhere.guide.calls


def test_images_in_and_out_of_the_interval_share_a_batch():
    sampler, guide = Sampler(Elementwise(PLAIN)), CountingGuide()
    guidance = ClassifierGuidance(guide, 2.0, (90, 99))
    table = sampler.table(steps=4, sampler="ddim")
    requests = sampler.requests(2, table=table, labels=[1, 2], guidance=guidance)
    slots = Slots(sampler.backend, 2, guide)
    slots.enter(0, requests[0])
    slots.step()
    slots.enter(1, requests[1])
    slots.step()
    assert [scale for _, scale in guide.calls] == [[2.0], [0.0, 2.0]]


REFUSALS = {
    "needs a label that means none, and this checkpoint names none; leave guidance_scale": lambda: Sampler(
        Elementwise(dataclasses.replace(LABELLED, null_class=None))
    ).sample(1, steps=1, guidance_scale=2.0),
    "classifier-free guidance needs a label": lambda: Sampler(
        Elementwise(dataclasses.replace(LABELLED, label=LabelInput.VECTOR))
    ).sample(1, steps=1, guidance_scale=2.0, labels=[[0.0] * LABELLED.time.channels]),
    "needs a label that means none": lambda: Slots(Elementwise(PLAIN), 1).enter(
        0, Request(0, Sampler(Elementwise(PLAIN)).table(steps=2), 0, free_guidance=ClassifierFreeGuidance(2.0))
    ),
    "the classifier-free guidance scale is nan; expected a finite number": lambda: ClassifierFreeGuidance(math.nan),
    "rescale is 1.5 and parallel 1.0 .*; expected numbers from 0 to 1": lambda: ClassifierFreeGuidance(2.0, 1.5),
    "rescale is 0.0 and parallel -1": lambda: ClassifierFreeGuidance(2.0, parallel=-1),
    "guidance is limited to 5 to 4; expected the smaller timestep first": lambda: ClassifierFreeGuidance(
        interval=(5, 4)
    ),
    "guidance is limited to 9 to 4": lambda: ClassifierGuidance(CountingGuide(), interval=(9, 4)),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(RequestError, match=message):
        REFUSALS[message]()


PREDICTIONS = {"eps": Prediction.EPS, "x0": Prediction.X0, "v": Prediction.V}


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("prediction", PREDICTIONS.values(), ids=PREDICTIONS)
def test_plus_plus_goes_along_the_unlabelled_eps(prediction, eta):
    """CFG++'s lines written out: x0 of the guided out, eps of the unlabelled one (from its limited x0 for x0 and v)."""
    config = adm_unet(mult=(1,), size=(4, 4), num_classes=11, null_class=10)
    backend = Elementwise(config)
    diffusion = dataclasses.replace(backend.manifest.diffusion, prediction=prediction, variance=Variance.FIXED_SMALL)
    backend.manifest = dataclasses.replace(backend.manifest, diffusion=diffusion)
    sampler, cfg = Sampler(backend), ClassifierFreeGuidance(0.6, plus_plus=True)
    table = sampler.table(steps=4, eta=eta, guidance_scale=cfg)
    steps = list(sampler.run(sampler.requests(1, table=table, labels=3, seed=5, guidance_scale=cfg)))
    x = torch.from_numpy(normal([5], [0], (1, 4, 4))).double()
    schedule = diffusion.schedule.respaced(visited_timesteps(diffusion, 4))
    for row, (abar, previous) in enumerate(
        zip(schedule.alphas_cumprod[::-1], schedule.alphas_cumprod_prev[::-1], strict=True)
    ):
        time = torch.tensor([table.timestep[row]], dtype=torch.float32)
        labelled, without = (backend(x.float(), time, Conditions(torch.tensor([y]))).double() for y in (3, NULL))
        guided = without + 0.6 * (labelled - without)
        x0, null_x0 = (_to_x0(prediction, x, out, abar).clamp(-1, 1) for out in (guided, without))
        eps = without if prediction is Prediction.EPS else (x - math.sqrt(abar) * null_x0) / math.sqrt(1 - abar)
        sigma = eta * math.sqrt((1 - previous) / (1 - abar) * (1 - abar / previous))
        x = math.sqrt(previous) * x0 + math.sqrt(1 - previous - sigma**2) * eps
        if sigma:
            x = x + sigma * torch.from_numpy(normal([5], [row + 1], (1, 4, 4)))
        torch.testing.assert_close(steps[row].x_prev.double(), x[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(steps[row].x0.double(), x0[0], atol=2e-5, rtol=1e-5)
    assert [len(t) for t in backend.timesteps[:4]] == [2] * 4


def _to_x0(prediction: Prediction, x: Tensor, out: Tensor, abar: float) -> Tensor:
    match prediction:
        case Prediction.EPS:
            return (x - math.sqrt(1 - abar) * out) / math.sqrt(abar)
        case Prediction.V:
            return math.sqrt(abar) * x - math.sqrt(1 - abar) * out
        case _:
            return out


def test_plus_plus_beside_other_images_and_at_scale_1():
    """It changes no batch mate, and also at scale 1 it takes its eps from the unlabelled call."""
    sampler = Sampler(Elementwise(LABELLED))
    cfg = ClassifierFreeGuidance(1.0, plus_plus=True)
    images = sampler.sample(3, steps=4, labels=2, guidance_scale=cfg)
    assert not torch.equal(images, sampler.sample(3, steps=4, labels=2))
    one = sampler.requests(1, steps=4, labels=2, guidance_scale=cfg)[0]
    other = sampler.requests(1, steps=4, labels=5, seed=9)[0]
    both = finished(sampler.run([one, dataclasses.replace(other, index=1)]))
    assert torch.equal(both[0].clamp(-1, 1), images[0])
    assert torch.equal(both[1].clamp(-1, 1), sampler.sample(1, steps=4, labels=5, seed=9)[0])


@pytest.mark.parametrize(
    ("steps", "scale", "interval", "is_wild"),
    [
        (50, 2.0, EVERYWHERE, True),
        ("ddim50", 2.0, EVERYWHERE, False),
        (50, 2.0, (0, 990), False),
        (50, 0.0, EVERYWHERE, False),
    ],
)
def test_a_gradient_that_swamps_the_image_is_warned_of(caplog, steps, scale, interval, is_wild):
    """The cosine schedule's last timestep holds 5e-5 of the image; other starts, intervals and scale 0 are fine."""
    table = ddim_table(Diffusion(cosine_schedule(1000)), steps)
    guidance = ClassifierGuidance(CountingGuide(), scale, interval)
    make_requests(PLAIN, 1, table, SamplingOptions(guidance=guidance))
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == is_wild
    if is_wild:
        assert "classifier guidance at timestep 999 shifts x0 by 2e+04 times the gradient" in messages[0]
        assert "steps='ddimN'" in messages[0]
