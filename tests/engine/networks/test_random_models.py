"""Networks of published shape with random weights, and what TensorRT-RTX fuses of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.random_models import DDPM_CIFAR10, MODELS, main, write_random_model
from engine import load_checkpoint
from engine.errors import OutputError
from engine.networks.config import Attention, ResBlock
from engine.networks.half import norm_names
from engine.networks.inputs import Inputs
from export.int8.quantise import quantise
from export.onnx.onnx_file import has_wide_products
from export.precision import Precision, typed_unet
from export.to_onnx import export_onnx
from export.trt.build import PlanBuilder, find_builders
from export.trt.fusion import fusable

diffusers = pytest.importorskip("diffusers")

TARGETS = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")

SMALL = DDPM_CIFAR10 | {
    "layers_per_block": 1,
    "block_out_channels": (64, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "sample_size": 8,
}
"""DDPM's blocks with 2 or 4 channels a group, which TensorRT-RTX fuses."""


def rtx_builder(targets: tuple[str, ...] | None = ("sm86",)) -> PlanBuilder:
    pytest.importorskip("tensorrt_rtx", reason="plans without a GPU need TensorRT-RTX: pip install tensorrt-rtx-cu13")
    return next(builder for builder in find_builders(targets) if builder.library.name == "tensorrt_rtx")


def half_onnx(folder: Path, options: dict[str, Any]) -> Path:
    unet = load_checkpoint(write_random_model(folder / "model", options)).unet()
    export_onnx(typed_unet(unet, Precision.FP16), folder / "unet.fp16.onnx")
    return folder / "unet.fp16.onnx"


@pytest.mark.parametrize(("name", "parameters"), [("ddpm-cifar10", 35_746_307), ("adm-64", 295_902_918)])
def test_the_published_number_of_parameters(name, parameters):
    """DDPM, table 10: 35.7 million; ADM, table 4: 296 million."""
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**MODELS[name])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_a_seed_is_a_checkpoint(tmp_path):
    folders = [write_random_model(tmp_path / str(i), SMALL, seed) for i, seed in enumerate((1, 1, 2))]
    one, same, other = (load_checkpoint(folder).unet().state_dict() for folder in folders)
    assert all(torch.equal(one[key], same[key]) for key in one)
    # No layer starts at zero: an error in any of them shows in the output.
    assert all(value.abs().max() > 0 and not torch.equal(value, other[key]) for key, value in one.items())
    with pytest.raises(OutputError, match="exists; choose another folder"):
        write_random_model(folders[0], SMALL)


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "ddpm-cifar10", SMALL)
    assert main(["ddpm-cifar10", str(tmp_path / "net")]) == 0
    assert load_checkpoint(tmp_path / "net").config.image_size == (8, 8)
    assert main(["ddpm-cifar10", str(tmp_path / "net")]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


@pytest.mark.trt
def test_every_norm_with_silu_and_every_attention_is_fused(tmp_path):
    """Expected: both norms of a ResBlock and the last one, and every attention block."""
    path = half_onnx(tmp_path, SMALL)
    blocks = load_checkpoint(tmp_path / "model").config.blocks
    norms = 2 * sum(isinstance(block, ResBlock) for block in blocks) + 1
    attentions = sum(isinstance(block, Attention) for block in blocks)
    wanted = fusable(path)
    assert (len(wanted.norm_silu), len(wanted.attention)) == (norms, attentions)
    fusion = rtx_builder().build(path, (4, 4, 4), "fp16").fusion
    assert fusion is not None
    assert (fusion.norm_silu, fusion.attention) == (norms, attentions)
    assert fusion.unfused == fusion.fp32_activations == ()


@pytest.mark.trt
def test_norms_in_fp32_are_fused_too(tmp_path):
    """Form C: fp32 norm and SiLU, rounded once, between fp16 convolutions; and everything in bf16."""
    unet = load_checkpoint(write_random_model(tmp_path / "model", SMALL)).unet()
    for precision in (Precision.FP16, Precision.BF16):
        path = tmp_path / f"unet.{precision.value}.onnx"
        export_onnx(typed_unet(unet, precision, norm_names(unet)), path)
        wanted = fusable(path)
        fusion = rtx_builder().build(path, (4, 4, 4), precision.value).fusion
        assert fusion is not None
        assert (fusion.norm_silu, fusion.attention) == (len(wanted.norm_silu), len(wanted.attention))
        assert fusion.attention == sum(isinstance(block, Attention) for block in unet.config.blocks)
        assert fusion.unfused == ()
        assert has_wide_products(path) == (precision is Precision.BF16)


@pytest.mark.trt
def test_int8_convolutions_read_int8(tmp_path):
    """Norm, SiLU and rounding to int8 are one kernel; the convolution behind it writes fp32, which is listed."""
    unet = load_checkpoint(write_random_model(tmp_path / "model", SMALL)).unet()
    path = half_onnx(tmp_path / "int8", SMALL)
    done = quantise(path, unet, [Inputs(torch.randn(2, 3, 8, 8), torch.tensor([900.0, 10.0]))])
    fusion = rtx_builder().build(path, (4, 4, 4), "int8").fusion
    assert fusion is not None
    assert fusion.int8_convolutions == len(done) == 2 * sum(isinstance(b, ResBlock) for b in unet.config.blocks)
    assert fusion.norm_silu == len(fusable(path).norm_silu)
    assert fusion.unfused == ()
    assert len(fusion.fp32_activations) == len(done)


@pytest.mark.slow
@pytest.mark.trt
def test_the_ddpm_network_is_fused_for_every_target(tmp_path):
    """45 group norms with SiLU and 6 attentions, in plans for everything that TensorRT-RTX knows."""
    path, builder = half_onnx(tmp_path, DDPM_CIFAR10), rtx_builder(None)
    assert builder.targets == TARGETS
    fusion = builder.build(path, (16, 16, 16), "fp16").fusion
    assert fusion is not None
    assert (fusion.norm_silu, fusion.attention) == (45, 6)
    assert fusion.unfused == fusion.fp32_activations == ()
    # Measured: 907 MB. fp32 moves 1954 MB, and norms in fp32 beside the rest in fp16 1508 MB.
    assert fusion.traffic_bytes is not None
    assert fusion.traffic_bytes < 1.0e9


@pytest.mark.slow
@pytest.mark.trt
def test_the_adm_network_is_fused_for_every_target(tmp_path):
    """Norms without scale and shift, and attention at 32, 16 and 8: 9 on the way down, 1, 12 on the way up.

    Of the norms TensorRT-RTX leaves those of 6 channels a group (192 in all), and three before a resampling.
    """
    path, builder = half_onnx(tmp_path, MODELS["adm-64"]), rtx_builder(None)
    assert builder.targets == TARGETS
    wanted = fusable(path)
    assert (len(wanted.norm_silu), len(wanted.attention)) == (37, 22)
    fusion = builder.build(path, (4, 4, 4), "fp16").fusion
    assert fusion is not None
    assert fusion.attention == 22
    assert (fusion.norm_silu, len(fusion.unfused)) == (28, 9)
    assert fusion.fp32_activations == ()
