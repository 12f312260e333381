"""On a GPU: CUDA graphs beside the plain slots, streams, refills and memory."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from device_slots import slots_of
from elementwise import SAMPLERS, finished
from exported import call
from graph_cases import CFG
from helpers import adm_unet, random_network, tiny_manifest

from engine.backends.eager.eager_backend import EagerBackend
from engine.device import cuda_device
from engine.diffusion.guidance import ClassifierGuidance
from engine.diffusion.noise import normal
from engine.networks.inputs import Conditions, Inputs
from engine.sampling.graph_slots import GraphSlots
from engine.sampling.options import SamplingOptions
from engine.sampling.pool import SlotPool
from engine.sampling.sampler import Sampler
from engine.sampling.slots import Slots
from kernels.philox import philox_normal

pytestmark = pytest.mark.gpu

CONFIG = adm_unet(num_classes=11, null_class=10, learn_sigma=True)
# fp32 with TF32 off: other kernels for another batch size, over the few steps here.
FP32_ON_CUDA = 5e-4


@pytest.fixture(scope="module", autouse=True)
def _exact_fp32():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(scope="module")
def backend() -> EagerBackend:
    return EagerBackend(tiny_manifest(CONFIG), random_network(CONFIG), "fp32", None)


class GradientOnCuda:
    """A guide of single elements, bound to buffers on the GPU."""

    def __init__(self, config: Any) -> None:
        self.config, self.device = config, torch.device("cuda")

    def __call__(self, x_t: Any, timestep: Any, y: Any, scale: Any) -> Any:
        grad = (x_t * 0.125 - y[:, None, None, None] * 0.05) * scale[:, None, None, None]
        return grad, torch.zeros(len(x_t), device=x_t.device)

    def fit(self, batch: int) -> int:
        return batch

    def bind(self, buffers: Any) -> Any:
        guide = self

        class Bound:
            def enqueue(self, stream: Any) -> None:
                grad, _ = guide(*(buffers[name] for name in ("x_t", "timestep", "label", "scale")))
                buffers["grad"].copy_(grad)

            def check_capturable(self, stream: Any) -> None:
                pass

        return Bound()


def both(backend: EagerBackend, n: int, batch_size: int = 8, **options: Any) -> tuple[Any, Any, GraphSlots]:
    """Images of the plain slots and of the graphs, and the slots that made the latter."""
    sampler = Sampler(backend)
    chosen = SamplingOptions(batch_size=batch_size, **options)
    requests = sampler.requests(n, chosen)
    slots, expected, waiting = Slots(backend, batch_size, chosen.guide), {}, list(requests)
    while waiting or not slots.is_empty:
        for slot in slots.free[: len(waiting)]:
            slots.enter(slot, waiting.pop(0))
        expected |= finished(slots.step())
    got = finished(sampler.run(requests, chosen.guide, batch_size=batch_size))
    (used,) = sampler._pool._idle.values()
    return expected, got, used


def assert_same(expected: Any, got: Any) -> None:
    assert got.keys() == expected.keys()
    for index, image in expected.items():
        torch.testing.assert_close(got[index].clamp(-1, 1), image.clamp(-1, 1), atol=FP32_ON_CUDA, rtol=0)


@pytest.mark.parametrize("options", SAMPLERS.values(), ids=SAMPLERS)
def test_graphs_make_the_images_of_the_slots(backend, options):
    expected, got, used = both(backend, 12, steps=6, labels=3, **options)
    assert used.captured, "nothing was captured"
    assert_same(expected, got)


@pytest.mark.parametrize("cfg", CFG.values(), ids=CFG)
def test_classifier_free_guidance(backend, cfg):
    expected, got, used = both(backend, 5, steps=8, labels=3, guidance_scale=cfg)
    assert used.captured
    assert_same(expected, got)


@pytest.mark.parametrize("interval", [(-1.0, 1e6), (30.0, 80.0)])
def test_the_gradients_stream_joins(backend, interval):
    """Forked and joined inside the graph: the images are those of the calls one after the other."""
    guidance = ClassifierGuidance(GradientOnCuda(CONFIG), 0.5, interval)
    expected, got, used = both(backend, 6, steps=12, labels=[1, 2, 3, 4, 5, 6], guidance=guidance)
    assert any(variant.gradient for variant in used.captured)
    assert_same(expected, got)


def test_refills_while_a_graph_is_replayed(backend):
    """Images of other lengths enter as slots empty; each is what it is alone."""
    sampler = Sampler(backend)
    requests = []
    for index, (steps, name) in enumerate(
        [(9, "ddim"), (4, "ddpm"), (6, "dpmpp"), (3, "ddim"), (8, "ddpm"), (5, "ddim")]
    ):
        made = sampler.requests(1, table=sampler.table(steps=steps, sampler=name), labels=index, seed=index)[0]
        requests.append(dataclasses.replace(made, index=index))
    got = finished(sampler.run(requests, batch_size=2))
    for request in requests:
        slots, alone = Slots(backend, 1), {}
        slots.enter(0, request)
        while not slots.is_empty:
            alone |= finished(slots.step())
        assert_same(alone, {request.index: got[request.index]})


def test_rows_and_noise_on_the_device(backend):
    slots, sampler = slots_of(cuda_device(), backend, 3), Sampler(backend)
    for slot, steps in enumerate((12, 15, 20)):
        slots.enter(
            slot, sampler.requests(1, table=sampler.table(steps=steps, sampler="ddpm"), labels=1, seed=steps)[0]
        )
    for _ in range(10):
        slots.step()
        cuda_device().synchronize()
        assert slots._state.ints.cpu().tolist() == slots._host.ints.tolist()
    seeds = [5, 2**40 + 3]
    keys = torch.tensor([[s & 0xFFFFFFFF, s >> 32] for s in seeds], device="cuda")
    draws = torch.tensor([1, 7], device="cuda")
    got = philox_normal(keys[:, 0], keys[:, 1], draws, (3, 8, 8), 0).cpu()
    torch.testing.assert_close(got, torch.from_numpy(normal(seeds, [1, 7], (3, 8, 8))), atol=1e-5, rtol=0)


def test_memory_does_not_grow_over_200_steps(backend):
    slots, sampler = slots_of(cuda_device(), backend, 4), Sampler(backend)
    table = sampler.table(steps=20, sampler="ddpm")

    def steps(number: int) -> None:
        for _ in range(number):
            for slot in slots.free:
                slots.enter(slot, sampler.requests(1, table=table, labels=1)[0])
            slots.step()

    steps(40)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    steps(200)
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_half_precision_is_near(backend):
    """Of one call: a random network amplifies each step's rounding in the next ones."""
    half = EagerBackend(tiny_manifest(CONFIG), random_network(CONFIG), "fp16", None)
    x_t = torch.randn(4, CONFIG.in_channels, *CONFIG.image_size, generator=torch.Generator().manual_seed(0))
    conditions = Conditions(torch.tensor([1, 2, 9, 10]))
    inputs = Inputs(x_t, torch.tensor([3.0, 250.0, 500.0, 999.0]), conditions).to(torch.device("cuda"))
    full, got = (call(b, inputs).float() for b in (backend, half))
    # 2^-11 a rounding, over some twenty layers; a GPU gave 0.0025 to 0.0028 over four batches.
    error = float((got - full).square().mean().sqrt() / full.square().mean().sqrt())
    assert error <= 0.01


def test_closing_gives_the_memory_back():
    before = torch.cuda.memory_allocated()
    backend = EagerBackend(tiny_manifest(CONFIG), random_network(CONFIG), "fp32", None)
    sampler = Sampler(backend)
    sampler.sample(4, steps=4, labels=2)
    assert isinstance(sampler._pool, SlotPool)
    sampler.close()
    del sampler, backend
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < 1 << 20
