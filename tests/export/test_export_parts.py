"""The parts of the export, without a whole one."""

from __future__ import annotations

import argparse
import dataclasses
import re
import warnings

import pytest
import torch
from exported import call
from helpers import adm_classifier, adm_unet, with_unet, write_checkpoint

import export.onnx.onnx_file
from engine import load_checkpoint
from engine.backends.ort.ort_backend import OrtBackend
from engine.backends.ov.ov_backend import OpenVINOBackend
from engine.bundle.bundle_folder import Bundle
from engine.bundle.manifest import FileEntry, Manifest, Measurement, NetworkEntry, Networks, PlanEntry
from engine.diffusion.prediction import Diffusion
from engine.diffusion.schedule import linear_schedule
from engine.errors import CheckpointError, ExportError
from engine.networks.config import Attention, Conv, NormSiLU, Pop, Push, Resample, ResBlock, TimeConfig, UNetConfig
from engine.networks.inputs import Conditions, Inputs, join_inputs
from engine.networks.unet import UNet
from export import arguments as cli
from export import to_onnx, to_trt
from export.onnx.block_outputs import OnnxLayers, torch_layers
from export.onnx.passes import module_scope
from export.precision import GpuHalf, Precision, typed_unet
from export.subject import IMAGES, VISITED, make_subject, real_cases
from export.verify import Difference, check

# Unlabelled, with a condition image, time added rather than scale and shift, resampling inside ResBlocks.
CONFIG = UNetConfig(
    in_channels=1,
    out_channels=1,
    image_size=(8, 4),
    time=TimeConfig(7, 16),
    blocks=(
        Conv(3, 8),
        Push(),
        ResBlock(8, 8, scale_shift=False, resample=Resample.DOWN, groups=4),
        Attention(8, 2, 4, groups=4),
        ResBlock(8, 8, scale_shift=False, resample=Resample.UP, groups=4),
        Pop(),
        NormSiLU(16, groups=4),
        Conv(16, 1, kernel=1),
    ),
    cond_channels=2,
)
FACTS = {"family": "openai-guided", "image_size": (8, 8), "num_head_channels": 32, "noise_schedule": "cosine"}
COMPUTING = {0, 2, 3, 4, 6, 7}


def random_unet(config: UNetConfig = CONFIG) -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet(config).eval().requires_grad_(False)
        for name, value in unet.named_parameters():
            if "norm" in name:
                value.add_(0.2 * torch.randn_like(value))
    return unet


def inputs(batch: int, config: UNetConfig = CONFIG) -> Inputs:
    generator = torch.Generator().manual_seed(batch)
    return Inputs(
        torch.randn(batch, config.in_channels, *config.image_size, generator=generator),
        999 * torch.rand(batch, generator=generator),
        Conditions(image=torch.randn(batch, config.cond_channels, *config.image_size, generator=generator)),
    )


def manifest(config: UNetConfig = CONFIG) -> Manifest:
    return Manifest("test", Networks(NetworkEntry(config)), Diffusion(linear_schedule(1000)), "00" * 32)


@pytest.fixture(scope="module")
def split_files(tmp_path_factory):
    """The network as ONNX with its weights in a second file, as for weights beyond 2 GB."""
    path = tmp_path_factory.mktemp("onnx") / "unet.onnx"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.setattr(export.onnx.onnx_file, "EXTERNAL_DATA_BYTES", 0)
        to_onnx.export_onnx(random_unet(), path)
    assert not caught
    return path


def test_external_weights(split_files):
    assert {path.name for path in split_files.parent.iterdir()} == {"unet.onnx", "unet.onnx.data"}


@pytest.mark.parametrize(("backend", "package"), [(OrtBackend, "onnxruntime"), (OpenVINOBackend, "openvino")])
def test_network_with_a_condition(split_files, backend, package):
    pytest.importorskip(package)
    run, unet = backend(manifest(), split_files, "fp32", 2), random_unet()
    for batch in (1, 2, 5):
        given = inputs(batch)
        torch.testing.assert_close(call(run, given), unet(**given.tensors()), rtol=1e-5, atol=1e-5)


def test_results_of_the_blocks(split_files):
    pytest.importorskip("onnxruntime")
    unet, given = random_unet(), inputs(1)
    expected, found = torch_layers(unet, given), OnnxLayers(split_files)(given)
    assert set(found) == set(expected) == COMPUTING
    for index in COMPUTING:
        torch.testing.assert_close(found[index], expected[index], rtol=1e-5, atol=1e-5)
    assert {path.name for path in split_files.parent.iterdir()} == {"unet.onnx", "unet.onnx.data"}
    assert not unet.blocks[0]._forward_hooks


def test_cases_are_states_of_trajectories():
    unet = random_unet()
    cases = real_cases(unet, manifest())
    assert [len(case.x_t) for case in cases] == [1] * VISITED + [VISITED] * (IMAGES - 1)
    times = [float(case.timestep) for case in cases[:VISITED]]
    assert times[0] == 999
    assert times[-1] == 0
    assert times == sorted(times, reverse=True)
    assert [float(t) for t in cases[-1].timestep] == times
    assert all(case.conditions.label is None for case in cases)
    assert all(case.conditions.image is not None and case.conditions.image.abs().max() <= 1 for case in cases)
    # DDIM with eta 0 takes each state to the next: the first is noise, the last is nearly an image.
    assert cases[0].x_t.std() > 0.8
    assert torch.equal(join_inputs([cases[0], cases[1]]).rows([1]).x_t, cases[1].x_t)


def test_a_subject_is_one_network_and_its_results(tmp_path):
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "net.pt", adm_unet(mult=(1,), attention=())), **FACTS)
    subject = make_subject(checkpoint)
    assert (subject.checkpoint, subject.manifest.checkpoint_sha256) == (checkpoint, checkpoint.sha256)
    assert len(subject.wanted) == len(subject.cases) == VISITED + IMAGES - 1
    for case, wanted in zip(subject.cases, subject.wanted, strict=True):
        assert torch.equal(wanted, subject.unet(**case.tensors()))
    classifier = load_checkpoint(write_checkpoint(tmp_path / "clf.pt", adm_classifier(mult=(1, 1))), **FACTS)
    with pytest.raises(CheckpointError, match="a U-Net checkpoint is needed here"):
        make_subject(classifier)


def test_fp16_as_a_gpu_rounds_it():
    unet = random_unet()
    half, given = typed_unet(unet, Precision.FP16), inputs(3)
    assert next(unet.parameters()).dtype == torch.float32
    with torch.no_grad():
        slow = half(**given.tensors())
        with GpuHalf():
            fast = half(**given.tensors())
        exact = unet(**given.tensors())
    error = float((fast - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    other = float((slow - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert 1e-5 < error < 1e-2
    assert error < 2 * other + 1e-4


def test_learned_frequencies_stay_in_fp32():
    time = TimeConfig(8, 16, has_frequencies=True)
    unet = random_unet(dataclasses.replace(CONFIG, time=time))
    unet.time.frequencies += 0.1234567
    half = typed_unet(unet, Precision.FP16)
    assert torch.equal(half.time.frequencies, unet.time.frequencies)
    assert half.time.linear1.weight.dtype == torch.float16


def test_fp16_overflow_is_seen():
    unet = random_unet()
    state = unet.state_dict()
    state["blocks.0.weight"] *= 1e5
    unet.load_state_dict(state)
    with GpuHalf(), torch.no_grad():
        result = typed_unet(unet, Precision.FP16)(**inputs(2).tensors())
    difference = Difference()
    difference.add(result, unet(**inputs(2).tensors()))
    assert difference.relative == float("inf")


def test_weight_beyond_fp16():
    unet = random_unet()
    unet.blocks[0].weight[0, 0, 0, 0] = 1e5
    with pytest.raises(ExportError, match=r"blocks.0.weight reaches 1e\+05, beyond fp16's 65504; .*export.to_onnx"):
        typed_unet(unet, Precision.FP16)


def test_difference():
    difference = Difference()
    difference.add(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    difference.add(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0]))
    assert difference.max_abs == 2
    assert difference.rms == pytest.approx(1.0)
    assert difference.wanted_rms == pytest.approx((21 / 4) ** 0.5)
    difference.add(torch.tensor([float("nan")]), torch.tensor([1.0]))
    difference.add(torch.tensor([1.0]), torch.tensor([1.0]))
    assert difference.max_abs != difference.max_abs
    assert difference.relative == float("inf")


GOOD = Measurement("unet.onnx", "onnxruntime cpu", "fp32", 1e-6, 1e-7, 0.5, 3e-5, "blocks.3 Attention", 2e-6)


def test_check_names_what_failed():
    check([GOOD])
    bad = dataclasses.replace(GOOD, rms=float("nan"))
    with pytest.raises(ExportError, match=r"unet.onnx on onnxruntime cpu in fp32: error nan .*; worst layer blocks.3"):
        check([GOOD, bad])
    with pytest.raises(ExportError, match="needs fp32: export it with python -m export.to_onnx"):
        check([dataclasses.replace(bad, precision="fp16", worst_layer=None, worst_layer_error=None)])


def test_description_of_a_bundle_nothing_could_run(tmp_path):
    plan = PlanEntry("unet.rtx.plan", "tensorrt_rtx", "1.7.1", ("sm86", "sm89"), (1, 8, 64), "fp16")
    files = {"unet.onnx": FileEntry("00" * 32, 3_070_000)}
    bundle = Bundle(tmp_path, dataclasses.replace(with_unet(manifest(), plans=(plan,)), files=files))
    shown = cli.describe(bundle)
    assert re.search(r"unet.onnx +3.07 MB", shown)
    assert "unet.rtx.plan: tensorrt_rtx 1.7.1, fp16, batch 1 to 64 (best 8), sm86 sm89" in shown
    assert shown.endswith("nothing was verified")
    assert cli.summary(bundle)["files"] == {"unet.onnx": 3_070_000}


@pytest.mark.parametrize(
    ("scopes", "module"),
    [("['', 'blocks.7', 'blocks.7.qkv', 'conv2d']", "blocks.7"), ("['', 'cat']", ""), ("", ""), ("broken [", "")],
)
def test_module_scope(scopes, module):
    assert module_scope(scopes) == module


def test_flags():
    assert to_trt.parse_targets("sm86, SM89,sm86") == ("sm86", "sm89")
    assert to_trt.parse_batches("1:8:64") == ((1, 8, 64),)
    assert to_trt.parse_batches("1, 8,1") == ((1, 1, 1), (8, 8, 8))
    for text in ("", "0", "1,x", "0:1:2", "4:2:8", "1:2:x", "1:2:3:4"):
        with pytest.raises(argparse.ArgumentTypeError, match="smallest:best:largest"):
            to_trt.parse_batches(text)
    with pytest.raises(argparse.ArgumentTypeError, match="sm86"):
        to_trt.parse_targets(" , ")


@pytest.mark.parametrize("main", [to_onnx.main, to_trt.main])
def test_help_shows_examples(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:\n  python -m export.to_" in shown
    assert "--num-heads" in shown


@pytest.mark.parametrize(
    "arguments", [[], ["net.pt", "--batch", "9:1:2"], ["net.pt", "--target", ""], ["net.pt", "--what"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        to_trt.main(arguments)
    assert end.value.code == 2
    assert "usage: python -m export.to_trt" in capsys.readouterr().err


def test_missing_onnx_is_said_with_the_pip_line(tmp_path, monkeypatch):
    import importlib.metadata

    real = importlib.metadata.version

    def version(name):
        if name == "onnxscript":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    from engine.errors import MissingPackageError

    with pytest.raises(MissingPackageError, match=r"needs the package onnxscript; .*pip install 'unet-rt\[onnx\]'"):
        to_onnx._check_packages()
    assert "onnxscript" not in to_onnx.library_versions()
