"""engine.cuda_graph: the device's step program makes the images of engine.slots, with every address fixed."""

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
from helpers import FP32_OTHER_ORDER, adm_unet, random_network, tiny_manifest
from test_engine_sampler import LABELLED, PLAIN, SAMPLERS, SUPER, CountingGuide, Elementwise, finished

from engine.backends.eager import EagerBackend
from engine.cuda_graph import GraphSlots
from engine.device import CpuDevice
from engine.errors import BackendError, RequestError
from engine.guidance import ClassifierFreeGuidance, ClassifierGuidance, guided_out, guided_outs
from engine.noise import INPAINTING, NOISE, normal
from engine.prediction import Prediction, Variance
from engine.sampler import Request, Sampler, Slots
from engine.slot_state import HostSlots
from engine.step_program import Variant, is_capturable
from kernels.philox import philox_normal

# The step program and Slots multiply and add in the same order; a normal may be rounded to its neighbour (see
# engine.noise). Classifier-free guidance with projection or rescaling sums a batch in another order than an image.
SAME = {"atol": 1e-6, "rtol": 1e-6}


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
        requests = sampler.requests(7, sampler.table(5, **options), seed=40)
        raw.append(finished(sampler.run(requests, batch_size=batch_size)))
    for index, image in raw[0].items():
        torch.testing.assert_close(raw[1][index], image, **SAME)
    assert len({image.numpy().tobytes() for image in raw[1].values()}) == 7


CFG = {
    "plain": ClassifierFreeGuidance(3.0),
    "off": ClassifierFreeGuidance(1.0, 0.5, 0.5),
    "unlabelled": ClassifierFreeGuidance(0.0),
    "rescaled": ClassifierFreeGuidance(4.0, rescale=0.7),
    "projected": ClassifierFreeGuidance(4.0, parallel=0.2),
    "interval": ClassifierFreeGuidance(2.0, 0.3, 0.5, interval=(20, 70)),
    "plus plus": ClassifierFreeGuidance(0.6, plus_plus=True),
}


@pytest.mark.parametrize("cfg", CFG.values(), ids=CFG)
@pytest.mark.parametrize("prediction", [Prediction.EPS, Prediction.V])
def test_classifier_free_guidance(cfg, prediction):
    manifest = {"prediction": prediction}
    got = both(LABELLED, "sample", 5, manifest=manifest, steps=6, labels=[1, 5, 2, 0, 9], cfg_scale=cfg, batch_size=4)
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
        table = sampler.table(3, "ddim")
        made = sampler.requests(2, table, seed=5)
        first = dataclasses.replace(made[0], known=torch.full((1, 4, 4), 0.5), mask=torch.zeros(1, 4, 4))
        results.append(finished(sampler.run([first, made[1]], batch_size=1)))
    for index in (0, 1):
        torch.testing.assert_close(results[1][index], results[0][index], **SAME)
    assert not torch.equal(results[1][0], results[1][1])


def test_condition_images():
    cond = torch.from_numpy(normal([7, 8, 9], [0] * 3, (3, 4, 4)))
    both(SUPER, "sample", 3, steps=4, cond=cond, batch_size=2)


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
        table = host.table(steps, name, **options)
        made = host.requests(3, table, seed=100 * kind, guidance=guidance if kind % 2 else None)
        for i, request in enumerate(made):
            cfg = [*CFG.values(), None][(kind + i) % 8]
            index = len(requests)
            plus_plus = cfg is not None and cfg.plus_plus and name != "ddim"
            requests.append(dataclasses.replace(request, index=index, cfg=None if plus_plus else cfg))
    mixed = [requests[i] for i in np.random.default_rng(0).permutation(len(requests))]
    expected = finished(host.run(mixed, guidance, batch_size=5))
    for batch_size in (2, 7, 10):
        got = finished(device.run(mixed, guidance, batch_size=batch_size))
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
    for options in ({"sampler": "ddpm"}, {"eta": 0.5}, {"sampler": "plms"}, {"cfg_scale": 2.0}):
        expected, got = (s.sample(5, steps=4, seed=3, labels=1, batch_size=4, **options) for s in (host, device))
        # Guidance and a few steps amplify a forward call's rounding; 5 times is seen.
        torch.testing.assert_close(got, expected, atol=10 * FP32_OTHER_ORDER, rtol=0)


def slots_of(device: Any, backend: Any, capacity: int, **options: Any) -> GraphSlots:
    return GraphSlots(device, backend.manifest, backend, capacity, **options)


def fill(slots: GraphSlots, sampler: Sampler, steps: int = 5, **options: Any) -> None:
    requests = sampler.requests(slots.capacity, sampler.table(steps, "ddim"), **options)
    for slot, request in zip(slots.free, requests, strict=True):
        slots.enter(slot, request)


def test_one_capture_then_replays_only():
    """The first step runs as it is, the second is captured; no later step allocates or copies, also after a refill."""
    backend, device = CapturableElementwise(LABELLED), RecordingDevice()
    slots, sampler = slots_of(device, backend, 3), Sampler(backend)
    fill(slots, sampler)
    slots.step()
    device.calls.clear()
    slots.step()
    assert device.calls[0] == "capture"
    assert device.calls[-1] == "replay" or device.calls[device.calls.index("captured") + 1] == "replay"
    addresses = [tensor.data_ptr() for tensor in device.allocated]
    for _ in range(2):
        while not slots.is_empty:
            device.calls.clear()
            steps = slots.step()
            assert "allocate" not in device.calls
            assert "copy_in" not in device.calls
            assert device.calls.count("replay") == 1
            assert device.calls.count("copy_out") == (2 if steps[0].is_last else 0)
        fill(slots, sampler, steps=3, seed=9)
        slots.step()
    assert device.captures == 1
    assert addresses == [tensor.data_ptr() for tensor in device.allocated]


def test_a_graph_for_each_variant_once():
    """With or without gradient, with or without doubling; images at their rows choose among them."""
    backend, device, guide = CapturableElementwise(LABELLED), RecordingDevice(), CapturableGuide()
    slots = slots_of(device, backend, 2, guide=guide, guide_interval=(40.0, 99.0))
    sampler, guidance = Sampler(backend), ClassifierGuidance(guide, 1.0, (40.0, 99.0))
    for _ in range(3):
        fill(slots, sampler, 20, guidance=guidance, cfg_scale=ClassifierFreeGuidance(2.0, interval=(20.0, 70.0)))
        while not slots.is_empty:
            slots.step()
    assert set(slots.captured) == {
        Variant(gradient=True),
        Variant(gradient=True, doubled=True),
        Variant(doubled=True),
        Variant(),
    }
    assert device.captures == 4


def test_the_gradient_runs_beside_the_network():
    """Forked after the inputs are there, joined before the update, inside the capture too."""
    backend, device, guide = CapturableElementwise(LABELLED), RecordingDevice(), CapturableGuide()
    slots, sampler = slots_of(device, backend, 2, guide=guide), Sampler(backend)
    fill(slots, sampler, guidance=ClassifierGuidance(guide, 1.0))
    expected = ["use main", "main records event1", "side1 waits event1", "use side1", "gradient on side1"]
    expected += ["side1 records event2", "network on main", "main waits event2"]
    device.calls.clear()
    slots.step()
    assert [call for call in device.calls if call not in ("copy_in", "allocate")] == expected
    device.calls.clear()
    slots.step()
    assert device.calls[: len(expected) + 3] == ["capture", *expected, "captured", "replay"]


def test_shadow_rows_are_the_devices():
    """At every step; a finished slot rests until it is filled again, and changes nothing."""
    backend = CapturableElementwise(LABELLED)
    slots, sampler = slots_of(RecordingDevice(), backend, 3), Sampler(backend)
    made = [sampler.requests(1, sampler.table(steps, "ddpm"), seed=steps)[0] for steps in (2, 5, 3, 4)]
    for slot, request in enumerate(made[:3]):
        slots.enter(slot, request)
    resting = []
    for step in range(6):
        slots.step()
        if step < 4:
            assert np.array_equal(slots._state.ints.numpy()[:, 1], slots._host.ints[:, 1])
        if step >= 1:
            resting.append(slots._state.x_t[0].clone())
        if step == 3:
            slots.enter(2, made[3])
    assert all(torch.equal(image, resting[0]) for image in resting)
    assert not torch.isnan(slots._state.x_t).any()


def test_rows_stop_at_the_last():
    host = HostSlots(2)
    host.enter(0, 10, 12, (5 << 32) + 7, (1.0, 1.0, 0.0, 1.0, 0.0))
    assert host.ints[:, 0].tolist() == [10, 12, 7, 5, 1]
    for expected in (11, 12, 12):
        host.advance()
        assert host.row.tolist() == [expected, 0]
    host.enter(1, 1, 2, 2**64 - 1, (0.0,) * 5)
    assert host.ints[2:4, 1].tolist() == [-1, -1]


@pytest.mark.parametrize("stream", [NOISE, INPAINTING])
def test_noise_on_the_device_is_that_of_the_host(stream):
    """Words are the same; a normal may be its neighbour where another maths library rounds (engine.noise)."""
    seeds, draws = [0, 1, 2**32 + 5, 2**64 - 1], [0, 1, 999, 2**31 - 1]
    expected = normal(seeds, draws, (3, 5, 7), stream)
    words = np.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], dtype=np.uint32).view(np.int32)
    keys = torch.from_numpy(words)
    got = philox_normal(keys[:, 0], keys[:, 1], torch.tensor(draws, dtype=torch.int32), (3, 5, 7), stream)
    assert got.dtype == torch.float32
    np.testing.assert_array_max_ulp(got.numpy(), expected, maxulp=1)
    assert np.mean(got.numpy() != expected) < 1e-2


def test_guidance_of_a_batch_is_that_of_each_image():
    labelled, without = torch.randn(2, 7, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    chosen = list(CFG.values())
    numbers = torch.tensor([[cfg.scale, cfg.rescale, cfg.parallel] for cfg in chosen])
    is_active = torch.tensor([i != 2 for i in range(7)])
    got = guided_outs(labelled, without, is_active, numbers[:, 0], (numbers[:, 1], numbers[:, 2]), 2)
    for i, cfg in enumerate(chosen):
        expected = labelled[i] if i == 2 else guided_out(labelled[i], without[i], cfg, 2)
        torch.testing.assert_close(got[i], expected, **SAME)


def test_padding_to_the_networks_batches():
    """A network of batches of 4: five slots run in 8, doubled 12; what lies beyond changes nothing."""
    host, device = pair(LABELLED)
    device.backend.bucket = 4
    for options in ({}, {"cfg_scale": 3.0}):
        expected, got = (s.sample(5, steps=4, labels=2, batch_size=10, **options) for s in (host, device))
        torch.testing.assert_close(got, expected, **SAME)
    assert {len(t) for t in device.backend.timesteps} == {8, 12}


def test_batch_size_is_the_networks_batch():
    backend = CapturableElementwise(LABELLED)
    sampler = device_sampler(backend)
    sampler.sample(9, steps=2, labels=2, batch_size=8)
    assert {len(t) for t in backend.timesteps} == {8}
    backend.timesteps.clear()
    sampler.sample(9, steps=2, labels=2, batch_size=8, cfg_scale=2.0)
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
    steps = list(sampler.run(sampler.requests(1, sampler.table(3, "ddim"))))
    assert steps[-1].x_prev.shape == (1, 4, 4)
    with pytest.raises(RequestError, match="read them before it"):
        _ = steps[0].x0


def test_tables_take_the_place_of_tables_that_nobody_uses():
    """More tables than the arena holds, one after another; those of images in progress stay."""
    backend, device = CapturableElementwise(PLAIN), RecordingDevice()
    slots, sampler = slots_of(device, backend, 2), Sampler(backend)
    rows = len(slots._state.arena)
    long = sampler.requests(1, sampler.table(100, "ddim"), seed=1)[0]
    slots.enter(0, long)
    placed = slots._placed[0]
    for number in range(2 * rows // 100):
        slots.enter(1, sampler.requests(1, sampler.table(100, "ddim"), seed=number)[0])
        assert slots._placed[1].first > placed.last or slots._placed[1].last < placed.first
        slots._leave(1)
    while not slots.is_empty:
        last = slots.step()
    expected = finished(Sampler(Elementwise(PLAIN)).run([long]))[0]
    torch.testing.assert_close(last[0].x_prev, expected, **SAME)
    too_long = dataclasses.replace(long.table, **{n: np.zeros(rows) for n in type(long.table).__dataclass_fields__})
    with pytest.raises(RequestError, match="does not fit"):
        slots.enter(1, dataclasses.replace(long, table=too_long))


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

    table = host.table(3, "ddim")
    for guidance, noise in ((None, own), (ClassifierGuidance(CountingGuide()), normal)):
        with device._pool.borrow(host.requests(2, table), guidance, noise, 2) as slots:
            assert isinstance(slots, Slots)
    assert not device._pool._idle


ENTER = {
    "slot 0 is taken": lambda slots, request: (slots.enter(0, request), slots.enter(0, request)),
    "both or neither": lambda slots, request: slots.enter(0, dataclasses.replace(request, known=torch.zeros(1, 4, 4))),
    "needs a label that means none": lambda slots, request: slots.enter(
        0, dataclasses.replace(request, cfg=ClassifierFreeGuidance(2.0))
    ),
}


@pytest.mark.parametrize("message", ENTER)
def test_refusals(message):
    backend = CapturableElementwise(PLAIN)
    request = Sampler(backend).requests(1, Sampler(backend).table(2, "ddim"))[0]
    with pytest.raises(RequestError, match=message):
        ENTER[message](slots_of(RecordingDevice(), backend, 1), request)
    with pytest.raises(RequestError, match="pass cond"):
        slots_of(RecordingDevice(), CapturableElementwise(SUPER), 1).enter(0, request)
