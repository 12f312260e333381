"""A network that float16 cannot hold, from the checkpoint to the plans, and as every command tells it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import random_network

from engine.__main__ import main as engine_main
from engine.backends.ov.ov_backend import has_bf16
from engine.bundle.bundle_folder import Bundle
from engine.networks.config import ResBlock, UNetConfig
from export import to_trt
from recipes.digits_net import digits_unet
from recipes.openai_format import to_openai

CONFIG = dataclasses.replace(digits_unet(32, (1, 2), 1, 32), image_size=(8, 8))
FIRST = next(index for index, block in enumerate(CONFIG.blocks) if isinstance(block, ResBlock))
FLAGS = ["--image-size", "8", "--num-head-channels", "32"]


def wide(config: UNetConfig) -> dict[str, torch.Tensor]:
    """Values of 1e5 after one convolution, which the norm behind it takes back."""
    unet = random_network(config)
    unet.blocks[FIRST].conv1.weight.data *= 1e5
    return to_openai(unet.state_dict(), config)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save(wide(CONFIG), tmp_path / "net.pt")
    return tmp_path / "net.pt"


@pytest.fixture
def needs_rtx() -> None:
    pytest.importorskip("tensorrt_rtx", reason="plans without a GPU need TensorRT-RTX: pip install tensorrt-rtx-cu13")


@pytest.mark.trt
@pytest.mark.usefixtures("needs_rtx")
def test_a_part_that_overflows_is_told_and_stored(checkpoint, capsys):
    """Turing has no convolutions in float32, so the plan leaves it out."""
    assert to_trt.main([str(checkpoint), *FLAGS, "--batch", "1"]) == 0
    told = f"blocks.{FIRST} stays in fp32: blocks.{FIRST}.conv1 reaches "
    printed = capsys.readouterr()
    assert told in printed.out + printed.err
    assert "leaves out sm75" in printed.out + printed.err
    bundle = Bundle.open(checkpoint.with_suffix(".engine"))
    ((part, reason),) = bundle.manifest.unet.fp32_parts
    assert part == f"blocks.{FIRST}"
    assert "fp16 ends at 65504" in reason
    # OpenVINO runs the fp32 file in bf16 too where the CPU multiplies it.
    cpu_runs = {"fp32", "fp16", "bf16"} if has_bf16() else {"fp32", "fp16"}
    assert {run.precision for run in bundle.manifest.unet.verification} == cpu_runs
    (plan,) = bundle.manifest.unet.plans
    assert "sm75" not in plan.targets
    assert "sm89" in plan.targets
    assert engine_main(["info", str(bundle.path)]) == 0
    assert told in capsys.readouterr().out


@pytest.mark.trt
@pytest.mark.usefixtures("needs_rtx")
def test_turing_cannot_run_the_parts_in_fp32(checkpoint, capsys):
    assert to_trt.main([str(checkpoint), *FLAGS, "--batch", "1", "--target", "sm75,sm89"]) == 2
    assert "float32 convolutions, which sm75 cannot run" in capsys.readouterr().err
    assert {path.name for path in checkpoint.parent.iterdir()} <= {"net.pt", "cache"}
