"""engine.sampling.graph_slots: the device's step program makes the images of engine.sampling.slots, with every address
fixed.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from device_fakes import CapturableElementwise, CapturableGuide, OnDevice, RecordingDevice, device_sampler
from elementwise import LABELLED, PLAIN, SAMPLERS, SUPER, CountingGuide, Elementwise, finished
from graph_cases import CFG, SAME
from helpers import FP32_OTHER_ORDER, adm_unet, random_network, tiny_manifest

from engine.backends.eager.eager_backend import EagerBackend
from engine.backends.protocol import is_capturable
from engine.device import CpuDevice
from engine.diffusion.guidance import ClassifierGuidance
from engine.diffusion.noise import normal
from engine.diffusion.prediction import Prediction, Variance
from engine.errors import BackendError, RequestError
from engine.sampling.requests import Request
from engine.sampling.sampler import Sampler
from engine.sampling.slots import Slots


def pair(config: Any, **manifest: Any) -> tuple[Sampler, Sampler]:
    """The host's sampler and the device's on the same network of exact operations."""
    backends = Elementwise(config), CapturableElementwise(config)
    for backend in backends:
        diffusion = dataclasses.replace(backend.manifest.diffusion, **manifest)
        backend.manifest = dataclasses.replace(backend.manifest, diffusion=diffusion)
    return Sampler(backends[0]), device_sampler(backends[1])


def both(config: Any, verb: str = "sample", *args: Any, manifest: dict[str, Any] | None = None, **options: Any) -> Any:
    host, device = pair(config, **(manifest or {}))
    expected, got = (getattr(sampler, verb)(*args, **options) for sampler in (host, device))
    torch.testing.assert_close(got, expected, **SAME)
    assert device._pool._idle, "the device's path was not taken"
    return got


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_images_of_every_sampler(options, batch_size):
    """Before they are clamped, so that every difference is seen."""
    raw = []
    for sampler in pair(LABELLED):
        requests = sampler.requests(7, table=sampler.table(steps=5, **options), seed=40)
        raw.append(finished(sampler.run(requests, batch_size=batch_size)))
    for index, image in raw[0].items():
        torch.testing.assert_close(raw[1][index], image, **SAME)
    assert len({image.numpy().tobytes() for image in raw[1].values()}) == 7


@pytest.mark.parametrize("cfg", CFG.values(), ids=CFG)
@pytest.mark.parametrize("prediction", [Prediction.EPS, Prediction.V])
def test_classifier_free_guidance(cfg, prediction):
    manifest = {"prediction": prediction}
    got = both(
        LABELLED, "sample", 5, manifest=manifest, steps=6, labels=[1, 5, 2, 0, 9], guidance_scale=cfg, batch_size=4
    )
    assert got.std() > 0.01


def test_thresholds_and_clipping():
    both(PLAIN, "sample", 3, manifest={"clip": 1.5, "percentile": 0.8}, steps=5, batch_size=2)


def test_inpainting_with_jumps():
    images = torch.from_numpy(normal([1, 2, 3], [0] * 3, (1, 4, 4))).clamp(-1, 1)
    mask = (torch.arange(16).reshape(4, 4) % 3 / 2).float()
    options = {"steps": 6, "sampler": "ddpm", "variance": Variance.FIXED_LARGE, "jump_length": 2, "resamplings": 2}
    both(PLAIN, "inpaint", images, mask, batch_size=2, **options)
    both(PLAIN, "inpaint", images, mask, steps=6, eta=0.5, batch_size=2)


def test_a_mask_stays_with_its_image():
    """The slot of an inpainted image, used again, keeps nothing of it."""
    host, device = pair(PLAIN)
    results = []
    for sampler in (host, device):
        table = sampler.table(steps=3, sampler="ddim")
        made = sampler.requests(2, table=table, seed=5)
        first = dataclasses.replace(made[0], known=torch.full((1, 4, 4), 0.5), mask=torch.zeros(1, 4, 4))
        results.append(finished(sampler.run([first, made[1]], batch_size=1)))
    for index in (0, 1):
        torch.testing.assert_close(results[1][index], results[0][index], **SAME)
    assert not torch.equal(results[1][0], results[1][1])


def test_condition_images():
    cond = torch.from_numpy(normal([7, 8, 9], [0] * 3, (3, 4, 4)))
    both(SUPER, "sample", 3, steps=4, image=cond, batch_size=2)


def test_self_conditioning_and_previews():
    config = dataclasses.replace(SUPER, self_condition=True)
    host, device = pair(config)
    for one, other in zip(host.stream(3, steps=4, batch_size=2), device.stream(3, steps=4, batch_size=2), strict=True):
        assert (one.index, one.step, one.image is None) == (other.index, other.step, other.image is None)
        torch.testing.assert_close(other.x0, one.x0, **SAME)
    expected, got = (sampler.progressive(3, steps=4, sampler="plms", batch_size=2) for sampler in (host, device))
    torch.testing.assert_close((got.x, got.x0), (expected.x, expected.x0), **SAME)


@pytest.mark.parametrize("interval", [(-math.inf, math.inf), (30.0, 80.0)])
@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"eta": 0.3}, {"sampler": "plms"}, {"sampler": "dpmpp"}])
def test_classifier_guidance(interval, options):
    host, device = pair(LABELLED)
    guides = CapturableGuide(), CapturableGuide()
    results = [
        sampler.sample(
            4, steps=6, labels=[1, 2, 3, 4], guidance=ClassifierGuidance(guide, 0.5, interval), batch_size=3, **options
        )
        for sampler, guide in zip((host, device), guides, strict=True)
    ]
    torch.testing.assert_close(results[1], results[0], **SAME)
    called = [{(y, s) for ys, scales in guide.calls for y, s in zip(ys, scales, strict=True) if s} for guide in guides]
    assert called[0] == called[1]
    # Neither calls a classifier for a step at which no image is guided.
    (slots,) = device._pool._idle.values()
    captures = sum(variant.gradient for variant in slots.captured)
    assert captures == 1
    assert len(guides[1].calls) == len(guides[0].calls) + captures


def test_requests_of_every_kind_share_a_batch():
    """Other tables, step counts, labels and guidance, entering as slots empty: the host's slots and the device's."""
    host, device = pair(LABELLED)
    guidance = ClassifierGuidance(CapturableGuide(), 2.0, (10.0, 80.0))
    kinds = [("ddpm", 7, {}), ("ddim", 4, {}), ("ddim", 9, {"eta": 0.5}), ("ddpm", "ddim10", {}), ("ddim", 1, {})]
    kinds += [("dpmpp", 6, {}), ("dpmpp", 3, {}), ("plms", 6, {})]
    requests: list[Request] = []
    for kind, (name, steps, options) in enumerate(kinds):
        table = host.table(steps=steps, sampler=name, **options)
        made = host.requests(3, table=table, seed=100 * kind, guidance=guidance if kind % 2 else None)
        for i, request in enumerate(made):
            cfg = [*CFG.values(), None][(kind + i) % 8]
            index = len(requests)
            plus_plus = cfg is not None and cfg.plus_plus and name != "ddim"
            requests.append(dataclasses.replace(request, index=index, free_guidance=None if plus_plus else cfg))
    mixed = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    expected = finished(host.run(mixed, guidance.guide, batch_size=5))
    for batch_size in (2, 7, 10):
        got = finished(device.run(mixed, guidance.guide, batch_size=batch_size))
        assert got.keys() == expected.keys()
        for index, image in got.items():
            torch.testing.assert_close(image, expected[index], **SAME)
    recorder = device._pool._device
    assert recorder.replays > 3 * recorder.captures


def test_a_real_network():
    """Convolutions may sum in another order in a batch of another size, and nothing more."""
    config = adm_unet(num_classes=4, null_class=3, learn_sigma=True)
    network, manifest = random_network(config), tiny_manifest(config)
    host = Sampler(EagerBackend(manifest, network, "fp32", None))
    device = device_sampler(OnDevice(manifest, network, "fp32", None), CpuDevice())
    for options in ({"sampler": "ddpm"}, {"eta": 0.5}, {"sampler": "plms"}, {"guidance_scale": 2.0}):
        expected, got = (s.sample(5, steps=4, seed=3, labels=1, batch_size=4, **options) for s in (host, device))
        # Guidance and a few steps amplify a forward call's rounding; 5 times is seen.
        torch.testing.assert_close(got, expected, atol=10 * FP32_OTHER_ORDER, rtol=0)


def test_padding_to_the_networks_batches():
    """A network of batches of 4: five slots run in 8, doubled 12; what lies beyond changes nothing."""
    host, device = pair(LABELLED)
    device.backend.bucket = 4
    for options in ({}, {"guidance_scale": 3.0}):
        expected, got = (s.sample(5, steps=4, labels=2, batch_size=10, **options) for s in (host, device))
        torch.testing.assert_close(got, expected, **SAME)
    assert {len(t) for t in device.backend.timesteps} == {8, 12}


def test_batch_size_is_the_networks_batch():
    backend = CapturableElementwise(LABELLED)
    sampler = device_sampler(backend)
    sampler.sample(9, steps=2, labels=2, batch_size=8)
    assert {len(t) for t in backend.timesteps} == {8}
    backend.timesteps.clear()
    sampler.sample(9, steps=2, labels=2, batch_size=8, guidance_scale=2.0)
    assert {len(t) for t in backend.timesteps} == {8}


def test_slots_are_kept_between_runs():
    """The second run of the same shape captures nothing; two runs at a time have slots of their own."""
    sampler = device_sampler(CapturableElementwise(LABELLED))
    device = sampler._pool._device or sampler._pool._make_device()
    first = sampler.sample(4, steps=4, labels=1)
    captures, allocations = device.captures, len(device.allocated)
    assert torch.equal(sampler.sample(4, steps=4, labels=1), first)
    assert (device.captures, len(device.allocated)) == (captures, allocations)
    one, other = (sampler.stream(4, steps=4, labels=1) for _ in range(2))
    images: list[dict[int, Any]] = [{}, {}]
    for pairs in zip(one, other, strict=True):
        for preview, found in zip(pairs, images, strict=True):
            if preview.image is not None:
                found[preview.index] = preview.image
    for found in images:
        assert torch.equal(torch.stack([found[i] for i in range(4)]), first)


def test_a_run_given_up_leaves_empty_slots():
    sampler = device_sampler(CapturableElementwise(LABELLED))
    run = sampler.stream(4, steps=4, labels=1)
    next(run)
    run.close()
    assert all(slots.is_empty for slots in sampler._pool._idle.values())
    expected = Sampler(Elementwise(LABELLED)).sample(4, steps=4, labels=1, sampler="plms")
    torch.testing.assert_close(sampler.sample(4, steps=4, labels=1, sampler="plms"), expected, **SAME)


def test_few_idle_slots_are_kept_and_closing_releases_them():
    sampler = device_sampler(CapturableElementwise(PLAIN))
    for n in range(1, 8):
        sampler.sample(n, steps=1)
    assert len(sampler._pool._idle) == 4
    kept = [weakref.ref(slots) for slots in sampler._pool._idle.values()]
    sampler.close()
    gc.collect()
    assert not any(reference() for reference in kept)


def test_a_step_read_too_late_is_refused():
    """A step's images are copied when they are asked for; a finished image is always there."""
    sampler = device_sampler(CapturableElementwise(PLAIN))
    steps = list(sampler.run(sampler.requests(1, table=sampler.table(steps=3, sampler="ddim"))))
    assert steps[-1].x_prev.shape == (1, 4, 4)
    with pytest.raises(RequestError, match="read them before it"):
        _ = steps[0].x0


def test_a_step_that_cannot_be_captured_runs_without_a_graph(monkeypatch, caplog):
    """With one warning, and the same images."""
    backend, device = CapturableElementwise(PLAIN), RecordingDevice()

    def refuse(program: Any) -> None:
        raise BackendError("this context compiles while it runs")

    monkeypatch.setattr(device, "capture", refuse)
    got = device_sampler(backend, device).sample(2, steps=5)
    assert torch.equal(got, Sampler(Elementwise(PLAIN)).sample(2, steps=5))
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "compiles while it runs" in caplog.text


def test_the_plain_slots_where_a_graph_cannot_be():
    """A backend on the CPU, noise of one's own, a guide that cannot be captured."""
    host, device = pair(PLAIN)
    assert not is_capturable(host.backend)
    assert is_capturable(device.backend)
    device.backend.device = torch.device("cpu")
    assert not is_capturable(device.backend)
    assert torch.equal(device.sample(2, steps=3), host.sample(2, steps=3))
    device.backend.device = torch.device("cuda")

    def own(*args: Any) -> Any:
        return normal(*args)

    for guide, noise in ((None, own), (CountingGuide(), normal)):
        with device.slots(2, guide, noise) as slots:
            assert isinstance(slots, Slots)
    assert not device._pool._idle
