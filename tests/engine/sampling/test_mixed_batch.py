"""All samplers, step counts, labels and guidance in one batch of exported artefacts: no image notices the others."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from elementwise import finished
from helpers import adm_classifier, adm_unet, write_checkpoint

from engine import ClassifierFreeGuidance, Sampler, SamplingOptions, load_checkpoint
from engine.bundle.bundle_folder import Bundle
from engine.sampling.requests import Request
from export.to_onnx import export_bundle

FACTS = {"family": "openai-guided", "image_size": (8, 8), "num_head_channels": 32, "noise_schedule": "cosine"}

SHORT = {"ddpm": 20, "ddim": 10, "few": 4, "dpmpp": 7, "plms": 6}
LONG = {"ddpm": 250, "ddim": 50, "few": 10, "dpmpp": 20, "plms": 20}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A labelled network with a null class and learned variance, and a classifier, as ONNX."""
    folder = tmp_path_factory.mktemp("mixed")
    unet = adm_unet(mult=(1, 2), num_classes=5, null_class=4, learn_sigma=True)
    network = load_checkpoint(write_checkpoint(folder / "net.pt", unet), null_class=4, **FACTS)
    classifier = load_checkpoint(
        write_checkpoint(folder / "clf.pt", adm_classifier(mult=(1, 1), num_classes=4), seed=1), **FACTS
    )
    return export_bundle(network, folder / "net.engine", classifier=classifier)


def requests_of(sampler: Sampler, steps: dict[str, int]) -> list[Request]:
    """One request of each kind twice, with labels and scales of its own; index is its place in the list."""
    free = [
        1.0,
        3.0,
        ClassifierFreeGuidance(2.0, rescale=0.7, parallel=0.2),
        ClassifierFreeGuidance(0.8, plus_plus=True),
    ]
    kinds = [
        ("ddpm", steps["ddpm"], {}, 0.0, free[1]),
        ("ddim", steps["ddim"], {}, 4.0, free[0]),
        ("ddim", steps["few"], {"eta": 0.5}, 1.5, free[2]),
        ("dpmpp", steps["dpmpp"], {}, 0.0, free[2]),
        ("plms", steps["plms"], {}, 2.0, free[1]),
        ("ddim", steps["few"], {}, 0.0, free[3]),
        ("ddpm", steps["ddim"], {}, 6.0, free[0]),
    ]
    made: list[Request] = []
    for number in range(2 * len(kinds)):
        name, count, options, scale, cfg = kinds[number % len(kinds)]
        guidance = sampler.classifier_guidance(scale)
        chosen = SamplingOptions(steps=count, sampler=name, labels=number % 4, seed=90 + number, **options)
        request = sampler.requests(1, chosen, guidance=guidance, guidance_scale=cfg)[0]
        made.append(dataclasses.replace(request, index=number))
    return made


def check(bundle: Bundle, backend: str, steps: dict[str, int], batch_sizes: tuple[int, ...]) -> None:
    sampler = Sampler.open(bundle, backend, "fp32", threads=1)
    guidance = sampler.classifier_guidance(1.0)
    requests = requests_of(sampler, steps)
    alone = {r.index: finished(sampler.run([r], guidance.guide))[r.index] for r in requests}
    assert len({image.numpy().tobytes() for image in alone.values()}) == len(requests)
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(0)).tolist()
    for batch_size in batch_sizes:
        together = finished(sampler.run([requests[i] for i in order], guidance.guide, batch_size=batch_size))
        assert together.keys() == alone.keys()
        differ = [i for i in alone if not torch.equal(together[i], alone[i])]
        assert not differ, f"batch size {batch_size}: images {differ} differ from those made alone"
    sampler.close()


@pytest.mark.parametrize("backend", ["ort", "ov"])
def test_images_of_a_mixed_batch_are_those_made_alone(bundle: Bundle, backend: str):
    pytest.importorskip({"ort": "onnxruntime", "ov": "openvino"}[backend])
    check(bundle, backend, SHORT, (3, 8))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ort", "ov"])
def test_images_of_a_long_mixed_batch_are_those_made_alone(bundle: Bundle, backend: str):
    pytest.importorskip({"ort": "onnxruntime", "ov": "openvino"}[backend])
    check(bundle, backend, LONG, (2, 5, 14))
