"""A new block is one class: it is written here, named in BLOCK_TYPES, and goes everywhere that a block goes.

docs/extend/block.md follows this file.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from helpers import FP32_OTHER_ORDER, random_network, tiny_manifest
from native_cases import EMPTY_LAYER, instruction_sets
from torch import Tensor, nn

from engine.backends.native.byte_ranges import find_candidates, with_int8
from engine.backends.native.lowering import build_program
from engine.backends.native.native_backend import NativeBackend
from engine.backends.ort.ort_backend import open_session, run_session
from engine.errors import BackendError, ConfigError
from engine.json_form import decode, encode
from engine.networks import blocks
from engine.networks.blocks import Activation, Conv, Norm, Pop, Push, ResBlock
from engine.networks.blocks.base import Block, Shapes
from engine.networks.blocks.target import ONE, NormRule, Target, Then
from engine.networks.config import TimeConfig, UNetConfig
from engine.networks.inputs import Inputs
from engine.networks.layers import Normalise, activate
from engine.networks.unet import UNet
from export.fp32_parts import find_fp32_parts
from export.int8.native_int8 import calibrate as calibrate_native
from export.int8.quantise import quantise
from export.precision import Precision, typed_unet
from export.to_onnx import export_onnx

pytestmark = pytest.mark.filterwarnings(EMPTY_LAYER)


@dataclass(frozen=True, slots=True)
class FeedForward(Block):
    """h + conv2(activation(conv1(norm(h)))): conv1 is 3x3 to `hidden` channels, conv2 1x1 back.

    Weights: norm, conv1, conv2.
    """

    channels: int
    hidden: int
    groups: int = 32
    eps: float = 1e-5
    activation: Activation = Activation.GELU

    int8_convolutions: ClassVar[tuple[str, ...]] = ("conv1",)

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)
        shapes.require_groups(self.channels, self.groups)

    def module(self) -> nn.Module:
        return FeedForwardModule(self)

    def lower(self, name: str, target: Target) -> None:
        h = target.normalise(f"{name}.norm", target.h, NormRule(Norm.GROUP, self.groups, self.eps))
        h = target.conv(f"{name}.conv1", h, self.hidden)
        h = target.normalise(name, h, NormRule(Norm.NONE, 0, 0.0, self.activation))
        target.h = target.conv(f"{name}.conv2", h, self.channels, ONE, Then(add=target.h))


class FeedForwardModule(nn.Module):
    """A residual pair of convolutions."""

    def __init__(self, block: FeedForward) -> None:
        super().__init__()
        self.activation = block.activation
        self.norm = Normalise(block.channels, Norm.GROUP, block.groups, block.eps)
        self.conv1 = nn.Conv2d(block.channels, block.hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(block.hidden, block.channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> same shape."""
        return x + self.conv2(activate(self.conv1(self.norm(x)), self.activation))


@dataclass(frozen=True, slots=True)
class NotLowered(Block):
    """A block that states no more than a block must."""

    channels: int

    def check(self, shapes: Shapes) -> None:
        shapes.through(self, self.channels, self.channels)

    def module(self) -> nn.Module:
        return nn.Hardswish()


FEED, PLACE = FeedForward(8, 20, 4), 3
CONFIG = UNetConfig(
    3, 3, (6, 10), TimeConfig(8, 12), (Conv(3, 8), Push(), ResBlock(8, 8, True, groups=4), FEED, Pop(), Conv(16, 3))
)


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a new block adds to engine/networks/blocks/__init__.py."""
    monkeypatch.setitem(blocks.BLOCK_TYPES, "feed_forward", FeedForward)


@pytest.fixture
def unet() -> UNet:
    network = random_network(CONFIG)
    assert isinstance(network, UNet)
    return network


def inputs(batch: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "x_t": torch.randn(batch, 3, 6, 10, generator=generator),
        "timestep": torch.tensor([999.0, 500.0, 3.0])[:batch],
    }


def largest_error(result: Tensor, wanted: Tensor) -> float:
    return float((result - wanted).abs().max() / wanted.abs().max())


def test_a_list_with_it_is_checked() -> None:
    def with_block(block: Block) -> UNetConfig:
        changed = (*CONFIG.blocks[:PLACE], block, *CONFIG.blocks[PLACE + 1 :])
        return dataclasses.replace(CONFIG, blocks=changed)

    with pytest.raises(ConfigError, match=r"block 3 \(FeedForward\) takes 12 channels, got 8"):
        with_block(FeedForward(12, 20, 4))
    with pytest.raises(ConfigError, match="block 3: 8 channels cannot be split into 3 groups"):
        with_block(FeedForward(8, 20, 3))


def test_the_reference_is_its_equation(unet: UNet) -> None:
    module = unet.blocks[PLACE]
    x = torch.randn(2, 8, 6, 10, generator=torch.Generator().manual_seed(6))
    normed = F.group_norm(x, 4, module.norm.weight, module.norm.bias, 1e-5)
    hidden = F.conv2d(normed, module.conv1.weight, module.conv1.bias, padding=1)
    wanted = x + F.conv2d(F.gelu(hidden), module.conv2.weight, module.conv2.bias)
    torch.testing.assert_close(module(x), wanted)
    changed = unet(**inputs())
    module.conv2.weight.zero_()
    assert not torch.equal(unet(**inputs()), changed)


@pytest.mark.parametrize("block", [FEED, FeedForward(8, 12, 2, 1e-3, Activation.MISH)])
def test_it_survives_json(block: FeedForward) -> None:
    config = dataclasses.replace(CONFIG, blocks=(*CONFIG.blocks[:PLACE], block, *CONFIG.blocks[PLACE + 1 :]))
    assert decode(json.loads(json.dumps(encode(config))), UNetConfig) == config


@pytest.mark.parametrize(("precision", "limit"), [(Precision.FP32, FP32_OTHER_ORDER), (Precision.FP16, 5e-3)])
def test_onnx_runtime_runs_it(unet: UNet, tmp_path: Path, precision: Precision, limit: float) -> None:
    export_onnx(typed_unet(unet, precision), tmp_path / "unet.onnx")
    result = run_session(open_session(tmp_path / "unet.onnx", None), inputs())[0]
    assert largest_error(result, unet(**inputs())) <= limit


def test_its_convolution_is_quantised_in_onnx(unet: UNet, tmp_path: Path) -> None:
    path = tmp_path / "unet.onnx"
    export_onnx(typed_unet(unet, Precision.FP16), path)
    assert f"blocks.{PLACE}.conv1" in quantise(path, unet, [Inputs(**inputs())])
    assert 1e-4 < largest_error(run_session(open_session(path, None), inputs())[0], unet(**inputs())) < 5e-2


def test_fp16_takes_it_into_account(unet: UNet) -> None:
    assert find_fp32_parts(unet, [Inputs(**inputs())]) == ()
    unet.blocks[PLACE].conv1.weight *= 1e6
    parts = {part.name: part.reason for part in find_fp32_parts(unet, [Inputs(**inputs())])}
    assert f"blocks.{PLACE}.conv1 reaches" in parts[f"blocks.{PLACE}"]


def test_fp16_keeps_the_writers_of_what_its_norm_reads(unet: UNet) -> None:
    unet.blocks[PLACE - 1].conv2.bias += 3000
    parts = {part.name: part.reason for part in find_fp32_parts(unet, [Inputs(**inputs())])}
    reason = f"rounding the input of blocks.{PLACE}.norm to fp16 moves"
    assert reason in parts[f"blocks.{PLACE - 1}"]
    assert reason in parts[f"blocks.{PLACE}"]


@pytest.mark.skipif(not instruction_sets(), reason="no library of the CPU engine")
def test_the_cpu_engine_runs_it(unet: UNet) -> None:
    backend = NativeBackend.from_weights(tiny_manifest(CONFIG), unet.state_dict(), threads=1)
    assert largest_error(backend(**inputs()), unet(**inputs())) <= FP32_OTHER_ORDER
    backend.close()


def test_its_convolution_may_be_int8_on_the_cpu_engine(unet: UNet) -> None:
    program, name = build_program(CONFIG), f"blocks.{PLACE}.conv1"
    assert name in find_candidates(program)
    ranges = calibrate_native(unet, [name], [Inputs(**inputs())])
    read = find_candidates(program)[name]
    assert with_int8(program, ranges).maps[read].scale == ranges[name].scale
    for isa in (isa for isa in instruction_sets() if isa.precision == "bf16"):
        backend = NativeBackend.from_weights(tiny_manifest(CONFIG), unet.state_dict(), 1, isa, ranges)
        assert backend.precision == "int8"
        assert largest_error(backend(**inputs()), unet(**inputs())) < 5e-2
        backend.close()


def test_what_it_does_not_state_is_refused_by_name() -> None:
    config = UNetConfig(3, 3, (4, 4), TimeConfig(8, 12), (NotLowered(3),))
    with pytest.raises(BackendError, match="the native engine has no NotLowered; choose another backend"):
        build_program(config)
    unet, x_t = UNet(config), torch.randn(1, 3, 4, 4)
    assert torch.equal(unet(x_t, torch.ones(1)), F.hardswish(x_t))
    with pytest.raises(ConfigError, match="NotLowered is not named in engine.networks.blocks.BLOCK_TYPES"):
        encode(config)


def test_a_class_that_lacks_what_a_block_must_state() -> None:
    @dataclass(frozen=True, slots=True)
    class Unfinished(Block):
        channels: int

    with pytest.raises(TypeError, match=r"abstract methods '?check'?, '?module'?"):
        Unfinished(3)
