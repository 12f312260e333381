"""What the pages "add a family" and "add a backend" end with: each was followed once, and this is the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_unet import PlainUNet, save

from engine import BackendError, Sampler, UnknownFamilyError, load_checkpoint
from engine.backends.ort.ort_backend import OrtBackend
from engine.bundle.bundle_folder import Bundle
from engine.bundle.file_names import UNET, onnx_name
from engine.bundle.from_checkpoint import checkpoint_manifest
from engine.checkpoints import load
from export.to_onnx import export_onnx

SIZE = 8


@pytest.fixture
def original() -> PlainUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PlainUNet()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


@pytest.fixture
def family(example, monkeypatch):
    """The translator, registered as its page says: one more entry of FAMILIES."""
    module = example("extend/family")
    monkeypatch.setattr(load, "FAMILIES", (*load.FAMILIES, module))
    return module


def test_the_file_is_unknown_without_the_translator(original, tmp_path):
    save(original, str(tmp_path / "plain.pt"), SIZE)
    with pytest.raises(UnknownFamilyError):
        load_checkpoint(tmp_path / "plain.pt")


def test_the_translated_network_is_the_original(family, original, tmp_path):
    save(original, str(tmp_path / "plain.pt"), SIZE)
    checkpoint = load_checkpoint(tmp_path / "plain.pt")
    assert checkpoint.family == "plain"
    assert [a.name for a in checkpoint.assumptions] == ["num_train_timesteps", "variance"]
    x, t = torch.randn(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)), torch.tensor([0.0, 500.0, 999.0])
    expected = original(x, t)
    # The attention's scale is folded into the weights: an ulp here and there.
    assert (checkpoint.unet()(x, t) - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_a_tensor_that_no_block_has_is_an_error(family, original, tmp_path):
    original.register_parameter("another", torch.nn.Parameter(torch.zeros(1)))
    save(original, str(tmp_path / "plain.pt"), SIZE)
    with pytest.raises(Exception, match="1 tensors do not belong to the network inferred from the file: another"):
        load_checkpoint(tmp_path / "plain.pt")


@pytest.fixture
def onnx_bundle(family, original, tmp_path) -> Path:
    save(original, str(tmp_path / "plain.pt"), SIZE)
    checkpoint = load_checkpoint(tmp_path / "plain.pt")
    folder = tmp_path / "plain.engine"
    folder.mkdir()
    export_onnx(checkpoint.unet(), folder / onnx_name(UNET))
    Bundle.write(folder, checkpoint_manifest(checkpoint))
    return folder


def test_the_backend_makes_the_images_of_another_backend(example, onnx_bundle):
    bundle = Bundle.open(onnx_bundle)
    own = Sampler(example("extend/backend").open(bundle, None, None))
    ort = Sampler(OrtBackend(bundle.manifest, bundle.file(onnx_name(UNET)), "fp32", 1))
    made, wanted = (sampler.sample(2, steps=3, seed=4, batch_size=1) for sampler in (own, ort))
    assert (made - wanted).abs().max() <= 1e-4
    own.close()
    ort.close()


def test_the_backend_says_what_it_lacks(example, digits_bundle):
    with pytest.raises(BackendError, match=r"the bundle holds no unet\.onnx"):
        example("extend/backend").open(Bundle.open(digits_bundle), None, None)
