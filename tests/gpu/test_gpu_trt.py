"""On a GPU with TensorRT: plans beside eager torch and ONNX Runtime. None of this ran without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_parts
from engine.backends.registry import open_backend, open_guide
from engine.backends.trt.trt_backend import TrtBackend, TrtGuide
from engine.backends.trt.trt_library import find_plans
from engine.bundle.bundle_folder import Bundle, is_bundle
from engine.diffusion.guidance import ClassifierGuidance
from engine.errors import BackendError
from engine.sampling.sampler import Sampler

pytestmark = [pytest.mark.gpu, pytest.mark.trt]

# fp16 beside fp32 on the digits, whose images are in [-1, 1]: the rms error of one call is 1e-3 of its output.
FP16_RMS, FP16_IMAGES_RMS = 5e-3, 2e-2


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = Path(os.environ.get(gpu_parts.BUNDLE_VARIABLE, ""))
    if not is_bundle(folder):
        work: Path = tmp_path_factory.mktemp("work")
        gpu_parts.build(work)
        folder = gpu_parts.bundle_folder(work)
    opened = Bundle.open(folder)
    if not opened.manifest.unet.plans:
        pytest.skip("no TensorRT that builds for this GPU is installed")
    return opened


def inputs(bundle: Bundle, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    config = bundle.manifest.unet.config
    rng = torch.Generator().manual_seed(count)
    x_t = torch.randn(count, config.in_channels, *config.image_size, generator=rng)
    times = bundle.manifest.diffusion.schedule.timesteps
    timestep = torch.from_numpy(times[torch.randint(len(times), (count,), generator=rng).numpy()].astype("float32"))
    return x_t, timestep, torch.arange(count) % 10


@pytest.mark.parametrize("count", [1, 3, 8, 70])
def test_a_call_beside_onnx_runtime(bundle, count):
    """Padded, as it is, and split."""
    backend, reference = TrtBackend(bundle, None), open_backend(bundle, "ort", "fp32")
    expected, got = reference(*inputs(bundle, count)), backend(*inputs(bundle, count)).cpu()
    assert (got - expected).square().mean().sqrt() < FP16_RMS * expected.square().mean().sqrt()
    assert torch.equal(backend(*inputs(bundle, count)).cpu(), got)


def test_auto_takes_the_plan(bundle):
    assert open_backend(bundle).name == "trt"


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm"}, {"guidance_scale": 2.0}], ids=["ddim", "ddpm", "cfg"])
def test_images_beside_eager(bundle, options):
    given = {"steps": 20, "labels": list(range(10)), "seed": 3} | options
    samplers = [Sampler.open(bundle, name, precision) for name, precision in (("trt", None), ("eager", "fp32"))]
    got, expected = (sampler.sample(10, **given) for sampler in samplers)
    for sampler in samplers:
        (slots,) = sampler._pool._idle.values()
        assert slots.captured, f"{sampler.backend.name} was not captured"
    assert (got - expected).square().mean().sqrt() < FP16_IMAGES_RMS


def test_memory_does_not_grow_over_200_steps(bundle):
    sampler = Sampler.open(bundle, "trt")
    given = {"steps": 50, "labels": 3, "batch_size": 8}
    sampler.sample(8, **given)
    torch.cuda.synchronize()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    sampler.sample(32, **given)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert free - torch.cuda.mem_get_info()[0] < 1 << 24


def test_the_classifiers_plan(tmp_path):
    """Its gradient beside ONNX Runtime's, and inside the graph on a stream of its own. The longest, so the last."""
    gpu_parts.build(tmp_path, with_classifier=True)
    bundle = Bundle.open(gpu_parts.bundle_folder(tmp_path))
    try:
        find_plans(bundle, "classifier", None)
    except BackendError as error:
        pytest.skip(str(error))
    guide, reference = open_guide(bundle, "trt"), open_guide(bundle, "ort", "fp32")
    assert isinstance(guide, TrtGuide)
    x_t, timestep, y = inputs(bundle, 6)
    scale = torch.linspace(0, 2, 6)
    (expected, _), (got, _) = reference(x_t, timestep, y, scale), guide(x_t, timestep, y, scale)
    assert (got - expected).square().mean().sqrt() < 2e-2 * expected.square().mean().sqrt()
    sampler = Sampler.open(bundle, "trt")
    given = {"steps": 20, "labels": list(range(10))}
    images = [sampler.sample(10, guidance=ClassifierGuidance(g, 1.0), **given) for g in (guide, reference)]
    assert any(v.gradient for slots in sampler._pool._idle.values() for v in slots.captured)
    assert (images[0] - images[1]).square().mean().sqrt() < FP16_IMAGES_RMS
