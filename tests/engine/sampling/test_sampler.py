"""engine.sampling.sampler: an image is its seed, whatever shares its batch; labels, guidance, conditions; every
refusal.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from elementwise import LABELLED, PLAIN, SAMPLERS, SUPER, CountingGuide, Elementwise, finished
from helpers import FP32_OTHER_ORDER, adm_classifier, adm_unet, random_network, tiny_manifest
from torch import Tensor

from engine.backends.eager.eager_backend import EagerBackend
from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from engine.diffusion.noise import RecordedNoise, normal, uniform
from engine.diffusion.prediction import Variance
from engine.diffusion.schedule import cosine_schedule, space_timesteps
from engine.diffusion.solvers import StepTable
from engine.errors import BackendError, RequestError
from engine.networks.classifier import AutogradGuide
from engine.networks.config import UNetConfig
from engine.networks.inputs import Conditions
from engine.sampling.requests import Request
from engine.sampling.sampler import Sampler
from engine.sampling.slots import Slots


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_a_seed_is_an_image(options):
    """Bit for bit: alone, in a batch of 8, at any slot, with any batch size."""
    sampler = Sampler(Elementwise(LABELLED))
    whole = sampler.sample(8, steps=5, seed=40, batch_size=8, **options)
    assert whole.dtype == torch.float32
    assert whole.shape == (8, 1, 4, 4)
    raw = finished(sampler.run(sampler.requests(8, table=sampler.table(steps=5, **options), seed=40)))
    assert len({image.numpy().tobytes() for image in raw.values()}) == 8
    for batch_size in (1, 3, 5, 16):
        assert torch.equal(sampler.sample(8, steps=5, seed=40, batch_size=batch_size, **options), whole)
    for i in (0, 3, 7):
        assert torch.equal(sampler.sample(1, steps=5, seed=40 + i, **options)[0], whole[i])
    order = [5, 0, 7, 2]
    chosen = sampler.sample(4, steps=5, seeds=[40 + i for i in order], batch_size=3, **options)
    assert torch.equal(chosen, whole[order])


def test_a_seed_is_an_image_beside_other_requests():
    """Other tables, step counts, samplers, labels and guidance scales in the same batch change no bit."""
    sampler, guidance = Sampler(Elementwise(LABELLED)), ClassifierGuidance(CountingGuide(), 2.0)
    kinds = [("ddpm", 7, {}), ("ddim", 4, {}), ("ddim", 9, {"eta": 0.5}), ("ddpm", "ddim10", {}), ("ddim", 1, {})]
    kinds += [("dpmpp", 6, {}), ("dpmpp", 3, {}), ("plms", 6, {})]
    requests: list[Request] = []
    for kind, (name, steps, options) in enumerate(kinds):
        table = sampler.table(steps=steps, sampler=name, **options)
        made = sampler.requests(3, table=table, seed=100 * kind, guidance=guidance if kind % 2 else None)
        requests += [dataclasses.replace(r, index=len(requests) + i) for i, r in enumerate(made)]
    mixed = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    alone = {r.index: finished(sampler.run([r], guidance.guide))[r.index] for r in requests}
    for batch_size in (2, 4, 7):
        together = finished(sampler.run(mixed, guidance.guide, batch_size=batch_size))
        assert together.keys() == alone.keys()
        assert all(torch.equal(together[i], alone[i]) for i in alone)


def test_a_seed_is_an_image_on_a_real_network():
    """The eager backend: convolutions may sum in another order, and nothing more."""
    config = adm_unet(num_classes=4, null_class=3, learn_sigma=True)
    sampler = Sampler(EagerBackend(tiny_manifest(config), random_network(config), "fp32", None))
    for options in ({"sampler": "ddpm"}, {"sampler": "ddim"}):
        whole = sampler.sample(8, steps=4, seed=3, batch_size=8, **options)
        assert whole.abs().max() <= 1
        assert whole.std() > 0.1
        for i in (0, 6):
            alone = sampler.sample(1, steps=4, seed=3 + i, **options)
            torch.testing.assert_close(alone[0], whole[i], atol=10 * FP32_OTHER_ORDER, rtol=0)


def test_results_lie_in_the_range_of_images():
    """Also where the checkpoint's own sampler never limits x0."""
    backend = Elementwise(PLAIN)
    backend.manifest = dataclasses.replace(
        backend.manifest, diffusion=dataclasses.replace(backend.manifest.diffusion, clip=None)
    )
    sampler = Sampler(backend)
    raw = finished(sampler.run(sampler.requests(4, table=sampler.table(steps=3, sampler="ddim"))))
    assert max(x.abs().max() for x in raw.values()) > 1
    images = sampler.sample(4, steps=3)
    assert torch.equal(images, torch.stack([raw[i] for i in range(4)]).clamp(-1, 1))


def ddim_by_hand(backend: Elementwise, seed: int, steps: int, eta: float, y: int) -> np.ndarray:
    """One image by the paper's loop in float64."""
    abar = cosine_schedule(100).alphas_cumprod[space_timesteps(100, steps)]
    shape = (1, *backend.manifest.unet.config.image_size)
    x = normal([seed], [0], shape)[0].astype(np.float64)
    for k, t in enumerate(reversed(range(steps))):
        a, previous = abar[t], abar[t - 1] if t else 1.0
        time = torch.tensor([float(space_timesteps(100, steps)[t])])
        eps = (
            backend(torch.tensor(x[None], dtype=torch.float32), time, Conditions(torch.tensor([y])))[0, :1]
            .double()
            .numpy()
        )
        x0 = np.clip((x - math.sqrt(1 - a) * eps) / math.sqrt(a), -1, 1)
        eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        sigma = eta * math.sqrt((1 - previous) / (1 - a) * (1 - a / previous))
        x = math.sqrt(previous) * x0 + math.sqrt(max(1 - previous - sigma**2, 0)) * eps
        if sigma:
            x = x + sigma * normal([seed], [k + 1], shape)[0]
    return x.clip(-1, 1)


@pytest.mark.parametrize(("steps", "eta"), [(1, 0.0), (6, 0.0), (7, 0.5), (30, 1.0)])
def test_the_whole_loop_beside_the_papers(steps, eta):
    backend = Elementwise(LABELLED)
    image = Sampler(backend).sample(1, steps=steps, sampler="ddim", eta=eta, seed=9, labels=4)[0]
    np.testing.assert_allclose(image, ddim_by_hand(backend, 9, steps, eta, 4), atol=1e-4)


def test_slots_are_refilled():
    backend = Elementwise(PLAIN)
    sampler = Sampler(backend)
    sampler.sample(5, steps=3, batch_size=2)
    assert [len(t) for t in backend.timesteps] == [2] * 6 + [1] * 3
    backend.timesteps.clear()
    long, short = sampler.table(steps=6, sampler="ddim"), sampler.table(steps=2, sampler="ddim")
    requests = [Request(0, long, 0)] + [Request(i, short, i) for i in (1, 2, 3)]
    taken: list[int] = []

    def arriving():
        for request in requests:
            taken.append(request.index)
            yield request

    order = []
    for step in sampler.run(arriving(), batch_size=2):
        order += [step.request.index] if step.is_last else []
        # A request is taken when a slot is free, no earlier.
        assert len(taken) <= 2 + len(order)
    assert [len(t) for t in backend.timesteps] == [2] * 6
    assert order == [1, 2, 0, 3]


@pytest.mark.usefixtures("two_threads")
def test_networks_have_the_callers_threads_and_the_rest_of_a_step_one():
    found: dict[str, int] = {}

    class Network(Elementwise):
        def __call__(self, *given: Any) -> Tensor:
            found["network"] = torch.get_num_threads()
            return super().__call__(*given)

    class Guide(CountingGuide):
        def __call__(self, *given: Any) -> tuple[Tensor, Tensor]:
            found["guide"] = torch.get_num_threads()
            return super().__call__(*given)

    def noise(*given: Any) -> np.ndarray:
        found["noise"] = torch.get_num_threads()
        return normal(*given)

    assert torch.get_num_threads() == 2
    sampler = Sampler(Network(LABELLED))
    sampler.sample(1, steps=2, sampler="ddpm", labels=1, guidance=ClassifierGuidance(Guide(), 2.0), noise=noise)
    assert found == {"network": 2, "guide": 2, "noise": 1}
    assert torch.get_num_threads() == 2


def test_images_at_different_steps_share_a_call():
    backend = Elementwise(PLAIN)
    sampler = Sampler(backend)
    slots = Slots(backend, 2)
    slots.enter(0, Request(0, sampler.table(steps=4, sampler="ddim"), 0))
    slots.step()
    assert slots.free == [1]
    slots.enter(1, Request(1, sampler.table(steps=2, sampler="ddim"), 1))
    slots.step()
    assert backend.timesteps == [[99.0], [66.0, 99.0]]
    assert not slots.is_empty
    assert [s.is_last for s in slots.step()] == [False, True]
    assert [s.is_last for s in slots.step()] == [True]
    assert slots.is_empty


def test_which_noise_is_drawn():
    """Draw 0 is x_T, draw k + 1 the k-th executed step; rows without noise draw nothing."""
    drawn: list[tuple[int, int]] = []

    def spy(seeds: Sequence[int], draws: Sequence[int], shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
        drawn.extend(zip(seeds, draws, strict=True))
        return normal(seeds, draws, shape, stream)

    sampler = Sampler(Elementwise(PLAIN))
    sampler.sample(2, steps=3, sampler="ddpm", seeds=[7, 9], noise=spy)
    assert Counter(drawn) == Counter((seed, draw) for seed in (7, 9) for draw in (0, 1, 2))
    drawn.clear()
    sampler.sample(2, steps=3, sampler="ddim", seeds=[7, 9], noise=spy)
    assert drawn == [(7, 0), (9, 0)]


def test_recorded_noise_replaces_the_generator():
    sampler = Sampler(Elementwise(PLAIN))
    seeds = [21, 22, 23]
    z = np.stack([normal(seeds, [k + 1] * 3, (1, 4, 4)) for k in range(4)])
    recorded = RecordedNoise(normal(seeds, [0] * 3, (1, 4, 4)), z)
    expected = sampler.sample(3, steps=5, sampler="ddpm", seeds=seeds)
    assert torch.equal(sampler.sample(3, steps=5, sampler="ddpm", noise=recorded, batch_size=2), expected)
    assert torch.equal(sampler.sample(2, steps=5, sampler="ddpm", noise=recorded, seeds=[2, 0]), expected[[2, 0]])
    with pytest.raises(RequestError, match="draw 5 was not recorded: z holds 4 steps"):
        sampler.sample(1, steps=6, sampler="ddpm", noise=recorded)


def seen_labels(backend: Elementwise) -> list[int]:
    return backend.labels[0]


def test_labels_are_drawn_from_the_seed():
    backend = Elementwise(LABELLED)
    sampler = Sampler(backend)
    sampler.sample(400, steps=1, batch_size=400)
    labels = seen_labels(backend)
    assert set(labels) == set(range(10))
    # Uniform: 40 of each, and 5 standard deviations of a binomial count.
    assert all(abs(count - 40) < 5 * math.sqrt(400 * 0.09) for count in Counter(labels).values())
    # Stream 2 of the generator, so that labels and noise do not hang together.
    assert labels == [int(10 * u) for u in uniform(range(400), [0] * 400, 2)]
    backend.labels.clear()
    sampler.sample(3, steps=1, seeds=[399, 5, 0])
    assert seen_labels(backend) == [labels[399], labels[5], labels[0]]


def test_labels_that_are_given():
    backend = Elementwise(LABELLED)
    sampler = Sampler(backend)
    for given, seen in ((3, [3, 3]), ([0, 10], [0, 10]), (np.array([1, 2]), [1, 2]), (torch.tensor([9, 0]), [9, 0])):
        backend.labels.clear()
        sampler.sample(2, steps=1, labels=given)
        assert seen_labels(backend) == seen


def test_a_label_changes_the_image_and_no_others():
    sampler = Sampler(Elementwise(LABELLED))
    first = sampler.sample(3, steps=3, labels=[1, 2, 3])
    second = sampler.sample(3, steps=3, labels=[1, 5, 3])
    assert [torch.equal(a, b) for a, b in zip(first, second, strict=True)] == [True, False, True]


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_guidance_scale_0_is_no_guidance(options):
    guide = CountingGuide()
    sampler = Sampler(Elementwise(LABELLED))
    plain = sampler.sample(3, steps=4, labels=2, **options)
    guided = sampler.sample(3, steps=4, labels=2, guidance=ClassifierGuidance(guide, 0.0), **options)
    assert torch.equal(plain, guided)
    assert not guide.calls
    assert not torch.equal(
        plain, sampler.sample(3, steps=4, labels=2, guidance=ClassifierGuidance(guide, 1.0), **options)
    )


def test_only_the_guided_images_of_a_batch_are_guided():
    sampler, guide = Sampler(Elementwise(LABELLED)), CountingGuide()
    guidance = ClassifierGuidance(guide, 1.5)
    table = sampler.table(steps=4, sampler="ddpm")
    plain = sampler.requests(2, table=table, labels=[1, 2], seed=5)
    guided = sampler.requests(2, table=table, labels=[1, 2], seed=5, guidance=guidance)
    mixed = finished(sampler.run([plain[0], guided[1]], guidance.guide))
    # An image without guidance has no class for the classifier, and a scale of 0.
    assert guide.calls[0] == ([0, 2], [0.0, 1.5])
    assert torch.equal(mixed[0], finished(sampler.run(plain))[0])
    assert torch.equal(mixed[1], finished(sampler.run(guided, guidance.guide))[1])
    assert not torch.equal(mixed[1], finished(sampler.run(plain))[1])


def test_guidance_of_an_unlabelled_network_draws_the_classifiers_classes():
    sampler, guide = Sampler(Elementwise(PLAIN)), CountingGuide()
    sampler.sample(200, steps=1, batch_size=200, guidance=ClassifierGuidance(guide))
    assert set(guide.calls[0][0]) == set(range(10))


def test_the_classifiers_gradient_is_the_slope_of_its_log_probability():
    classifier = random_network(adm_classifier(num_classes=3))
    guide = AutogradGuide(classifier)
    x, t, y = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5.0, 90.0]), [2, 0]
    scale = torch.tensor([2.0, 0.0])
    grad, log_p = guide(x, t, torch.tensor(y), scale)
    assert grad.shape == x.shape
    assert not grad.requires_grad
    assert not log_p.requires_grad
    assert not grad[1].any()
    direction = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))

    def log_probability(step: float) -> float:
        with torch.inference_mode():
            logits = classifier(x[:1] + step * direction, t[:1]).double()
        return float(F.log_softmax(logits, dim=1)[0, 2])

    assert log_p[0].item() == pytest.approx(log_probability(0.0), abs=1e-5)
    slope = (log_probability(1e-2) - log_probability(-1e-2)) / 2e-2
    assert (grad[0] * direction).sum().item() == pytest.approx(2 * slope, rel=2e-2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_guidance_inside_the_callers_own_mode(mode):
    """A caller that switched gradients off still gets the guided image."""
    config = adm_unet(mult=(1,), attention=())
    network, classifier = random_network(config), random_network(adm_classifier(mult=(1,), attention=()))
    sampler = Sampler(EagerBackend(tiny_manifest(config), network, "fp32", None))
    guidance = ClassifierGuidance(AutogradGuide(classifier), 3.0)
    expected = sampler.sample(1, steps=2, guidance=guidance, labels=1)
    with mode():
        got = sampler.sample(1, steps=2, guidance=guidance, labels=1)
    torch.testing.assert_close(got, expected, atol=FP32_OTHER_ORDER, rtol=0)


def test_condition_images():
    """Low-resolution images are brought to the network's size, bilinear, one for each image."""
    sampler = Sampler(Elementwise(SUPER))
    low = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = sampler.sample(3, steps=3, image=low, seed=1, batch_size=2)
    full = F.interpolate(low, (8, 8), mode="bilinear", align_corners=False)
    assert torch.equal(images, sampler.sample(3, steps=3, image=full, seed=1))
    assert torch.equal(images, sampler.sample(3, steps=3, image=full.double(), seed=1))
    for i in range(3):
        assert torch.equal(sampler.sample(1, steps=3, image=low[i : i + 1], seed=1 + i)[0], images[i])
    assert not torch.equal(sampler.sample(3, steps=3, image=low.flip(0), seed=1), images)


def sample(config: UNetConfig, n: int = 2, **options: Any) -> Tensor:
    return Sampler(Elementwise(config)).sample(n, **({"steps": 2} | options))


def guidance(scale: float = 1.0, **changes: Any) -> ClassifierGuidance:
    return ClassifierGuidance(CountingGuide(adm_classifier(**({"mult": (1,), "size": (4, 4)} | changes))), scale)


REFUSALS = {
    "n is 0; expected 1 or more images": lambda: sample(PLAIN, n=0),
    "n is -1; expected 1 or more images": lambda: sample(PLAIN, n=-1),
    "1 seeds given for 2 images": lambda: sample(PLAIN, seeds=[1]),
    r"seed is -1; expected an integer, 0 <= seed < 2\*\*64": lambda: sample(PLAIN, seed=-1),
    "seed is 18446744073709551616": lambda: sample(PLAIN, seed=2**64 - 1),
    "batch_size is 0; expected 1 or more": lambda: sample(PLAIN, batch_size=0),
    "unknown sampler 'euler'; known: ddim, ddpm, dpmpp, plms": lambda: sample(PLAIN, sampler="euler"),
    "eta belongs to ddim; ddpm has its own variance": lambda: sample(PLAIN, sampler="ddpm", eta=0.5),
    "variance belongs to ddpm; the noise of ddim is set by eta": lambda: sample(PLAIN, variance=Variance.FIXED_SMALL),
    "no variance channels; choose fixed_small or fixed_large": lambda: sample(
        PLAIN, sampler="ddpm", variance=Variance.LEARNED_RANGE
    ),
    "dpmpp adds no noise; leave eta and variance out": lambda: sample(PLAIN, sampler="dpmpp", eta=0.5),
    "plms adds no noise; leave eta": lambda: sample(PLAIN, sampler="plms", eta=0.5),
    "goes along the unlabelled eps, which dpmpp does not; use ddim": lambda: sample(
        LABELLED, sampler="dpmpp", guidance_scale=ClassifierFreeGuidance(2.0, plus_plus=True)
    ),
    "dpmpp adds no noise; leave eta": lambda: sample(PLAIN, sampler="dpmpp", variance=Variance.FIXED_SMALL),
    "eta must lie between 0 and 1, got -1": lambda: sample(PLAIN, eta=-1),
    "cannot take 0 steps": lambda: sample(PLAIN, steps=0),
    "cannot take 101 steps": lambda: sample(PLAIN, steps=101),
    "cannot read 'many' as steps": lambda: sample(PLAIN, steps="many"),
    "takes no labels and no classifier was given; leave labels out": lambda: sample(PLAIN, labels=1),
    "label 11 does not exist; this checkpoint has labels 0 to 10": lambda: sample(LABELLED, labels=11),
    "label -1 does not exist; this checkpoint has labels 0 to 10": lambda: sample(LABELLED, labels=[0, -1]),
    "3 labels given for 2 images": lambda: sample(LABELLED, labels=[0, 1, 2]),
    "label 10 is unknown to the classifier, which has classes 0 to 9; choose one of": lambda: sample(
        LABELLED, labels=10, guidance=guidance()
    ),
    r"label \d is unknown to the classifier, which has classes 0 to 0": lambda: sample(
        LABELLED, n=9, guidance=guidance(num_classes=1)
    ),
    "label 10 does not exist; this checkpoint has labels 0 to 9": lambda: sample(PLAIN, labels=10, guidance=guidance()),
    "the guidance scale is nan; expected a finite number": lambda: sample(PLAIN, guidance=guidance(math.nan)),
    r"classifier reads 1 channels of \(8, 8\), the network makes": lambda: sample(
        PLAIN, guidance=guidance(size=(8, 8))
    ),
    "classifier reads 3 channels .* use the classifier trained for it": lambda: sample(
        PLAIN, guidance=guidance(channels=3)
    ),
    "takes no condition image; leave image out": lambda: sample(PLAIN, image=torch.zeros(2, 1, 4, 4)),
    r"takes a condition image for each image: image \[2, 3, h, w\], got nothing": lambda: sample(SUPER),
    r"image \[2, 3, h, w\], got shape \(1, 3, 4, 4\)": lambda: sample(SUPER, image=torch.zeros(1, 3, 4, 4)),
    r"got shape \(2, 1, 4, 4\)": lambda: sample(SUPER, image=torch.zeros(2, 1, 4, 4)),
    r"got shape \(2, 3, 4\)": lambda: sample(SUPER, image=torch.zeros(2, 3, 4)),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    with pytest.raises(RequestError, match=message):
        REFUSALS[message]()


def a_table(config: UNetConfig) -> StepTable:
    return Sampler(Elementwise(config)).table(steps=2, sampler="ddim")


def test_refusals_of_a_slot():
    slots = Slots(Elementwise(PLAIN), 1)
    slots.enter(0, Request(0, a_table(PLAIN), 0))
    with pytest.raises(RequestError, match="slot 0 is taken"):
        slots.enter(0, Request(1, a_table(PLAIN), 1))
    with pytest.raises(RequestError, match="this network takes a condition image; pass image"):
        Slots(Elementwise(SUPER), 1).enter(0, Request(0, a_table(SUPER), 0))


def test_a_request_can_start_from_an_image():
    start = torch.full((1, 4, 4), 0.25)
    table = a_table(PLAIN)
    sampler = Sampler(Elementwise(PLAIN))
    begun = finished(sampler.run([Request(0, table, 0, x_start=start)]))[0]
    assert torch.equal(begun, finished(sampler.run([Request(0, table, 77, x_start=start)]))[0])
    assert not torch.equal(begun, finished(sampler.run([Request(0, table, 0)]))[0])
    assert torch.equal(start, torch.full((1, 4, 4), 0.25))


@pytest.mark.usefixtures("two_threads")
def test_a_closed_sampler():
    config = adm_unet(mult=(1,), attention=())
    sampler = Sampler(EagerBackend(tiny_manifest(config), random_network(config), "fp32", 1))
    sampler.sample(1, steps=1)
    assert torch.get_num_threads() == 2
    sampler.close()
    with pytest.raises(BackendError, match="this backend was closed; open the bundle again"):
        sampler.sample(1, steps=1)
