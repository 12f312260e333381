"""Slots for a long-lived owner, on the host and on a device: images enter, rest, are looked at and leave at will."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_fakes import CapturableElementwise, CapturableGuide, device_sampler
from elementwise import LABELLED, PLAIN, SUPER, CountingGuide, Elementwise, finished
from graph_cases import SAME
from helpers import adm_classifier
from torch import Tensor

from engine import ClassifierFreeGuidance, ClassifierGuidance, RequestError, Sampler
from engine.networks.config import UNetConfig
from engine.sampling.requests import Request
from engine.sampling.slot_batch import SlotBatch
from engine.sampling.slots import Slots

SELF_CONDITIONED = dataclasses.replace(SUPER, self_condition=True)
Open = Callable[[UNetConfig], Sampler]


def host_sampler(config: UNetConfig) -> Sampler:
    return Sampler(Elementwise(config))


def on_device(config: UNetConfig) -> Sampler:
    return device_sampler(CapturableElementwise(config))


DRIVERS = {"host": (host_sampler, CountingGuide), "device": (on_device, CapturableGuide)}


@pytest.fixture(params=DRIVERS)
def driver(request: pytest.FixtureRequest) -> tuple[Open, Callable[[], Any]]:
    """How a sampler and a classifier of this kind of slots are made."""
    return DRIVERS[request.param]


def alone(config: UNetConfig, requests: list[Request], guide: Any = None) -> dict[int, Tensor]:
    """Each image as the host makes it with nothing beside it."""
    return {r.index: finished(host_sampler(config).run([r], guide))[r.index] for r in requests}


def renumbered(*groups: list[Request]) -> list[Request]:
    requests = [request for group in groups for request in group]
    return [dataclasses.replace(request, index=index) for index, request in enumerate(requests)]


def mixed_requests(sampler: Sampler) -> list[Request]:
    """Noise, an x0 of the step before, outs of steps before, a known part, and classifier-free guidance."""
    plus_plus = ClassifierFreeGuidance(0.6, plus_plus=True)
    known = sampler.requests(1, steps=5, sampler="ddpm", seed=4, labels=3)[0]
    mask = torch.zeros(1, 4, 4)
    mask[:, 2:] = 1
    return renumbered(
        sampler.requests(1, steps=4, sampler="ddpm", labels=1),
        sampler.requests(1, steps=6, sampler="dpmpp", seed=1, labels=2),
        sampler.requests(1, steps=5, sampler="plms", seed=2, labels=9),
        [dataclasses.replace(known, known=torch.full((1, 4, 4), 0.25), mask=mask)],
        sampler.requests(1, steps=5, eta=0.5, seed=5, labels=4, guidance_scale=ClassifierFreeGuidance(2.0, 0.5, 0.5)),
        sampler.requests(1, steps=5, seed=6, labels=5, guidance_scale=plus_plus),
    )


def run_at_random(slots: SlotBatch, requests: list[Request], seed: int) -> dict[int, Tensor]:
    """Advance a random part of the slots at a time, until every image is finished."""
    draw, waiting, images, steps = random.Random(seed), list(requests), dict[int, Tensor](), 0
    while waiting or not slots.is_empty:
        if waiting and slots.free and draw.random() < 0.6:
            slots.enter(slots.free[0], waiting.pop(0))
        taken = sorted(set(range(slots.capacity)) - set(slots.free))
        only = draw.sample(taken, draw.randint(0, len(taken)))
        for step in slots.step(only):
            steps += 1
            if step.is_last:
                images[step.request.index] = step.x_prev.clone()
    assert steps == sum(len(request.table) for request in requests)
    return images


@pytest.mark.parametrize("seed", range(3))
def test_a_slot_that_rests_stays_as_it_is(driver, seed):
    """Whatever rests beside it and whenever it rests itself, an image is what it is alone."""
    sampler = driver[0](LABELLED)
    requests = mixed_requests(sampler)
    with sampler.slots(4) as slots:
        assert isinstance(slots, Slots) == (driver[0] is host_sampler)
        images = run_at_random(slots, requests, seed)
    for index, expected in alone(LABELLED, requests).items():
        torch.testing.assert_close(images[index], expected, **SAME)


def test_a_self_conditioned_slot_that_rests(driver):
    """The x0 of its own last step is what its network is given next."""
    sampler = driver[0](SELF_CONDITIONED)
    requests = sampler.requests(3, steps=5)
    with sampler.slots(3) as slots:
        images = run_at_random(slots, requests, 0)
    for index, expected in alone(SELF_CONDITIONED, requests).items():
        torch.testing.assert_close(images[index], expected, **SAME)


def test_only_the_slots_named_are_advanced(driver):
    sampler = driver[0](LABELLED)
    with sampler.slots(3) as slots:
        for slot, request in enumerate(sampler.requests(3, steps=3, labels=1)):
            slots.enter(slot, request)
        sampler.backend.timesteps.clear()
        assert [step.request.index for step in slots.step(only={2, 0})] == [0, 2]
        assert slots.step(only=[]) == []
        assert [step.request.index for step in slots.step()] == [0, 1, 2]
        if isinstance(slots, Slots):
            assert [len(call) for call in sampler.backend.timesteps] == [2, 3]
            assert sampler.backend.timesteps[1] == [50.0, 99.0, 50.0]
        assert [step.is_last for step in slots.step()] == [True, False, True]
        assert slots.free == [0, 2]


def test_leaving(driver):
    """A slot that is left is free at once, and neither the one beside it nor the next image in it notices."""
    sampler = driver[0](LABELLED)
    requests = renumbered(
        sampler.requests(2, steps=5, sampler="plms", labels=[1, 2]),
        sampler.requests(1, steps=4, sampler="dpmpp", seed=9, labels=3),
    )
    images: dict[int, Tensor] = {}
    with sampler.slots(2) as slots:
        slots.enter(0, requests[0])
        slots.enter(1, requests[1])
        slots.step()
        slots.step()
        slots.leave(0)
        assert slots.free == [0]
        slots.enter(0, requests[2])
        while not slots.is_empty:
            images |= finished(slots.step())
    expected = alone(LABELLED, requests[1:])
    assert images.keys() == expected.keys()
    for index, image in expected.items():
        torch.testing.assert_close(images[index], image, **SAME)


def test_a_snapshot_is_of_its_moment(driver):
    """x0 of the slots asked for, in their order, read after later steps; nothing waits for the device to take it."""
    sampler = driver[0](LABELLED)
    with sampler.slots(3) as slots:
        for slot, request in enumerate(sampler.requests(3, steps=5, labels=[1, 5, 2])):
            slots.enter(slot, request)
        assert not slots.snapshot([1]).x0.any()
        expected = [step.x0.clone() for step in slots.step()]
        device = sampler._pool._device
        if device is not None:
            device.calls.clear()
        snapshot = slots.snapshot([2, 0])
        assert device is None or device.calls == []
        later = [step.x0.clone() for step in slots.step()]
        assert snapshot.slots == (2, 0)
        assert torch.equal(snapshot.x0, torch.stack([expected[2], expected[0]]))
        assert torch.equal(slots.snapshot([0, 1, 2]).x0, torch.stack(later))
        assert not torch.equal(later[0], expected[0])


def test_intervals_and_scales_of_guidance_are_each_images_own(driver):
    """Two images of one batch, guided at other timesteps and by other strengths."""
    sampler, guide = driver[0](PLAIN), driver[1]()
    late, early = ClassifierGuidance(guide, 2.0, (0, 40)), ClassifierGuidance(guide, 0.5, (60, 99))
    requests = renumbered(
        sampler.requests(1, steps=4, labels=1, guidance=late),
        sampler.requests(1, steps=4, seed=1, labels=2, guidance=early),
        sampler.requests(1, steps=4, seed=2),
    )
    images: dict[int, Tensor] = {}
    with sampler.slots(3, guide) as slots:
        for slot, request in enumerate(requests):
            slots.enter(slot, request)
        while not slots.is_empty:
            images |= finished(slots.step())
    # Timesteps 99, 66, 33, 0; a graph is run once more where it is captured.
    scales = [scales[:3] for _, scales in guide.calls]
    assert set(map(tuple, scales)) == {(0.0, 0.5, 0.0), (2.0, 0.0, 0.0)}
    for index, expected in alone(PLAIN, requests, CountingGuide()).items():
        torch.testing.assert_close(images[index], expected, **SAME)
    plain = alone(PLAIN, [dataclasses.replace(request, guidance=None) for request in requests])
    assert [torch.equal(plain[i], alone(PLAIN, requests, CountingGuide())[i]) for i in range(3)] == [False, False, True]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 8])
def test_batch_size_is_the_networks_largest_batch(driver, batch_size):
    """Both halves of classifier-free guidance count, and no image changes, also where guided ones come late."""
    sampler = driver[0](LABELLED)
    requests = renumbered(
        sampler.requests(3, steps=3, labels=1),
        sampler.requests(4, steps=4, seed=3, labels=2, guidance_scale=ClassifierFreeGuidance(3.0, interval=(30, 70))),
        sampler.requests(2, steps=4, seed=8, labels=4, guidance_scale=0.0),
    )
    for order in (requests, requests[::-1]):
        sampler.backend.timesteps.clear()
        images = finished(sampler.run(order, batch_size=batch_size))
        assert max(len(call) for call in sampler.backend.timesteps) <= batch_size
        for index, expected in alone(LABELLED, requests).items():
            torch.testing.assert_close(images[index], expected, **SAME)


def test_a_full_batch_of_guided_images_is_one_call(driver):
    """A batch of six holds three guided images twice; slots of one's own take the same call unless told otherwise."""
    sampler = driver[0](LABELLED)
    sampler.sample(3, steps=3, labels=1, guidance_scale=2.0, batch_size=6)
    assert {len(call) for call in sampler.backend.timesteps} == {6}
    for batch_size, calls in ((None, {6}), (4, {3})):
        sampler.backend.timesteps.clear()
        with sampler.slots(3, batch_size=batch_size) as slots:
            for slot, request in enumerate(sampler.requests(3, steps=3, labels=1, guidance_scale=2.0)):
                slots.enter(slot, request)
            slots.step()
        assert {len(call) for call in sampler.backend.timesteps} == calls


def test_tables_are_kept_by_value_while_they_are_used():
    """Equal tables are one; when the last image that goes by one has left, it is gone."""
    sampler = host_sampler(PLAIN)
    with sampler.slots(3) as slots:
        assert isinstance(slots, Slots)
        for slot in range(2):
            slots.enter(slot, sampler.requests(1, steps=3, seed=slot)[0])
        slots.enter(2, sampler.requests(1, steps=2)[0])
        assert len(slots._rows) == 2
        slots.step()
        slots.leave(0)
        assert len(slots._rows) == 2
        slots.step()
        assert [len(rows.array) for rows in slots._rows.values()] == [3]
        slots.step()
        assert slots.is_empty
        assert not slots._rows


def test_equal_tables_lie_once_in_the_arena():
    """Guidance at other timesteps needs rows of its own, because they say where it acts."""
    sampler = on_device(LABELLED)
    with sampler.slots(3) as slots:
        for slot in range(2):
            slots.enter(slot, sampler.requests(1, steps=3, seed=slot)[0])
        free = ClassifierFreeGuidance(2.0, interval=(0, 50))
        slots.enter(2, sampler.requests(1, steps=3, guidance_scale=free)[0])
        firsts = [placed.first for placed in slots._placed]
    assert firsts == [1, 1, 5]


def test_the_block_ends_what_was_begun(driver):
    """Slots are empty again after it, and a sampler is closed."""
    backend = Elementwise(PLAIN)
    closed: list[str] = []
    backend.close = lambda: closed.append("closed")  # type: ignore[method-assign]
    with Sampler(backend) as sampler:
        assert sampler.sample(1, steps=1).shape == (1, 1, 4, 4)
        assert not closed
    assert closed == ["closed"]
    sampler = driver[0](PLAIN)

    def interrupted() -> None:
        with sampler.slots(2) as slots:
            slots.enter(0, sampler.requests(1, steps=3)[0])
            slots.step()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with sampler.slots(2) as slots:
        assert slots.free == [0, 1]
        assert slots.capacity == 2


REFUSALS: dict[str, Callable[[Sampler, SlotBatch, Request], Any]] = {
    "slot 1 is empty; name slots with an image in progress": lambda _, slots, r: slots.leave(1),
    "slot 1 is empty": lambda _, slots, r: slots.step(only=[0, 1]),
    "slot 0 is taken": lambda _, slots, r: slots.enter(0, r),
    "slot 2 does not exist; there are slots 0 to 1": lambda _, slots, r: slots.snapshot([0, 2]),
    "asks for guidance by a classifier; give its guide": lambda sampler, slots, _: slots.enter(
        1, sampler.requests(1, steps=2, guidance=ClassifierGuidance(CountingGuide()))[0]
    ),
    "the classifier reads 1 channels of .8, 8., the network makes": lambda sampler, *_: sampler.slots(
        1, CountingGuide(adm_classifier(mult=(1,), size=(8, 8)))
    ),
    "capacity is 0; expected 1 or more slots": lambda sampler, *_: sampler.slots(0),
    "batch_size is 2; expected 3 or more": lambda sampler, *_: sampler.slots(3, batch_size=2),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(driver, message):
    sampler = driver[0](PLAIN)
    request = sampler.requests(1, steps=2)[0]
    with sampler.slots(2) as slots:
        slots.enter(0, request)
        with pytest.raises(RequestError, match=message):
            REFUSALS[message](sampler, slots, request)
        assert slots.free == [1]


def test_a_label_that_is_missing_is_refused(driver):
    sampler = driver[0](LABELLED)
    with sampler.slots(1) as slots, pytest.raises(RequestError, match="this network takes a label"):
        slots.enter(0, Request(0, sampler.table(steps=2), 0))
