"""engine.sampling.step_program and engine.sampling.device_state: what is enqueued in which order, at which addresses,
by which rows.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from device_fakes import CapturableElementwise, CapturableGuide, RecordingDevice
from device_slots import slots_of
from elementwise import LABELLED, PLAIN, SUPER, Elementwise, finished, guided
from graph_cases import CFG, SAME
from torch import Tensor

from engine.diffusion.guidance import ClassifierFreeGuidance, ClassifierGuidance
from engine.diffusion.noise import INPAINTING, NOISE, normal
from engine.errors import RequestError
from engine.sampling.device_state import HostSlots
from engine.sampling.graph_slots import GraphSlots
from engine.sampling.sampler import Sampler
from engine.sampling.step import guidance_numbers, guided_out
from engine.sampling.step_program import Variant
from kernels.philox import philox_normal


def fill(slots: GraphSlots, sampler: Sampler, steps: int = 5, **options: Any) -> None:
    requests = sampler.requests(slots.capacity, table=sampler.table(steps=steps, sampler="ddim"), **options)
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
    slots = slots_of(device, backend, 2, guide=guide)
    sampler, guidance = Sampler(backend), ClassifierGuidance(guide, 1.0, (40.0, 99.0))
    for _ in range(3):
        fill(slots, sampler, 20, guidance=guidance, guidance_scale=ClassifierFreeGuidance(2.0, interval=(20.0, 70.0)))
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
    made = [
        sampler.requests(1, table=sampler.table(steps=steps, sampler="ddpm"), seed=steps)[0] for steps in (2, 5, 3, 4)
    ]
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
    """Words are the same; a normal may be its neighbour where another maths library rounds (engine.diffusion.noise)."""
    seeds, draws = [0, 1, 2**32 + 5, 2**64 - 1], [0, 1, 999, 2**31 - 1]
    expected = normal(seeds, draws, (3, 5, 7), stream)
    words = np.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], dtype=np.uint32).view(np.int32)
    keys = torch.from_numpy(words)
    got = philox_normal(keys[:, 0], keys[:, 1], torch.tensor(draws, dtype=torch.int32), (3, 5, 7), stream)
    assert got.dtype == torch.float32
    np.testing.assert_array_max_ulp(got.numpy(), expected, maxulp=1)
    assert np.mean(got.numpy() != expected) < 1e-2


def guided_by_hand(labelled: Tensor, without: Tensor, cfg: ClassifierFreeGuidance) -> Tensor:
    """The lines of ClassifierFreeGuidance for one image [C, H, W], in float64."""
    labelled, without = labelled.double(), without.double()
    update = labelled - without
    update = update - (1 - cfg.parallel) * (update * labelled).sum() / labelled.square().sum() * labelled
    out = labelled + (cfg.scale - 1) * update
    return out * (cfg.rescale * labelled.std() / out.std() + 1 - cfg.rescale)


def test_guidance_of_a_batch_is_that_of_each_image():
    labelled, without = torch.randn(2, 7, 4, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    chosen = [*CFG.values(), ClassifierFreeGuidance(2.5, 0.7, 0.3)][:7]
    numbers = torch.tensor([guidance_numbers(cfg) for cfg in chosen])
    got = guided_out(labelled[: len(chosen)], without[: len(chosen)], numbers[:, 0], (numbers[:, 1], numbers[:, 2]), 2)
    for i, cfg in enumerate(chosen):
        torch.testing.assert_close(got[i, :2], guided_by_hand(labelled[i, :2], without[i, :2], cfg).float(), **SAME)
        assert torch.equal(got[i, 2:], labelled[i, 2:])
        assert torch.equal(got[i], guided(labelled[i], without[i], cfg, 2))


def test_tables_take_the_place_of_tables_that_nobody_uses():
    """More tables than the arena holds, one after another; those of images in progress stay."""
    backend, device = CapturableElementwise(PLAIN), RecordingDevice()
    slots, sampler = slots_of(device, backend, 2), Sampler(backend)
    rows = len(slots._state.arena)
    long = sampler.requests(1, table=sampler.table(steps=100, sampler="ddim"), seed=1)[0]
    slots.enter(0, long)
    placed = slots._placed[0]
    for number in range(2 * rows // 100):
        slots.enter(1, sampler.requests(1, steps=100, eta=(number + 1) / 1000, seed=number)[0])
        assert slots._placed[1].first > placed.last or slots._placed[1].last < placed.first
        slots.leave(1)
    while not slots.is_empty:
        last = slots.step()
    expected = finished(Sampler(Elementwise(PLAIN)).run([long]))[0]
    torch.testing.assert_close(last[0].x_prev, expected, **SAME)
    too_long = dataclasses.replace(long.table, **{n: np.zeros(rows) for n in type(long.table).__dataclass_fields__})
    with pytest.raises(RequestError, match="does not fit"):
        slots.enter(1, dataclasses.replace(long, table=too_long))


ENTER = {
    "slot 0 is taken": lambda slots, request: (slots.enter(0, request), slots.enter(0, request)),
    "both or neither": lambda slots, request: slots.enter(0, dataclasses.replace(request, known=torch.zeros(1, 4, 4))),
    "needs a label that means none": lambda slots, request: slots.enter(
        0, dataclasses.replace(request, free_guidance=ClassifierFreeGuidance(2.0))
    ),
}


@pytest.mark.parametrize("message", ENTER)
def test_refusals(message):
    backend = CapturableElementwise(PLAIN)
    request = Sampler(backend).requests(1, table=Sampler(backend).table(steps=2, sampler="ddim"))[0]
    with pytest.raises(RequestError, match=message):
        ENTER[message](slots_of(RecordingDevice(), backend, 1), request)
    with pytest.raises(RequestError, match="pass image"):
        slots_of(RecordingDevice(), CapturableElementwise(SUPER), 1).enter(0, request)
