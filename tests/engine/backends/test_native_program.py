"""Programs for the CPU engine: run by an interpreter, they are the network they were built from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from exported import in_float64, network_inputs
from helpers import adm_unet, random_network
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import ADM, BLOCKS, EMPTY_LAYER, FAMILIES, between, network, networks, res
from native_interpreter import read_operators, run_program

from engine.backends.native.lowering import build_program
from engine.backends.native.program import Code, Program
from engine.errors import BackendError
from engine.networks import config as c

pytestmark = pytest.mark.filterwarnings(EMPTY_LAYER)

# Both run in float64; the network itself rounds root mean squares and softmaxes to float32 once.
FLOAT32_PARTS = 2e-6


def assert_same(config: c.UNetConfig, seed: int = 0) -> None:
    program, unet, inputs = (
        build_program(config),
        random_network(config, seed),
        in_float64(network_inputs(config, 2, 100, seed)),
    )
    weights = program.gather(unet.state_dict())
    unet = unet.double()
    x, timestep, image = inputs.x_t, inputs.timestep, inputs.conditions.image
    projected = unet.time(timestep, inputs.conditions.label)
    rows = torch.cat(projected, dim=1) if projected else x.new_empty(len(x), 0)
    if image is not None:
        x = torch.cat([image, x] if config.cond_first else [x, image], dim=1)
    got, expected = run_program(program.words(), weights, x, rows).output, unet(**inputs.tensors())
    if config.divides_by_timestep:
        expected = expected * timestep[:, None, None, None]
    assert got.shape == expected.shape
    assert expected.std() > 1e-3 or expected.numel() < 8
    assert float((got - expected).abs().max()) <= FLOAT32_PARTS * float(expected.abs().max())


@pytest.mark.parametrize("name", BLOCKS)
def test_each_block_and_option(name: str) -> None:
    assert_same(BLOCKS[name])


@pytest.mark.parametrize("name", ADM)
def test_networks_of_guided_diffusion(name: str) -> None:
    assert_same(ADM[name])


@pytest.mark.parametrize("name", FAMILIES)
def test_networks_of_each_family(tmp_path: Path, name: str) -> None:
    assert_same(FAMILIES[name](tmp_path))


@settings(max_examples=60)
@given(config=networks(), seed=st.integers(0, 99))
def test_networks_of_any_blocks(config: c.UNetConfig, seed: int) -> None:
    assert_same(config, seed)


def codes(program: Program) -> list[Code]:
    return [operator.code for operator in program.operators]


def test_what_is_fused() -> None:
    """Per ResBlock two norms and two convolutions and nothing else: projection, residual and shortcut are in them."""
    program = build_program(BLOCKS["shortcut"])
    assert codes(program) == [Code.INPUT, Code.CONV, *[Code.NORM, Code.CONV] * 2, Code.CONV, Code.OUTPUT]
    skip = build_program(between(c.Push(), c.Conv(8, 8), c.Pop(), res(16, 8)))
    assert Code.CONCAT not in codes(skip)
    last = skip.operators[-3]
    assert (last.src, last.extra) != (last.extra, last.src)
    assert len(last.extra) == 2
    doubled = build_program(between(res(8, 12, resample=c.Resample.UP), end=12))
    assert codes(doubled).count(Code.RESAMPLE) == 1


def test_a_copy_is_made_once_and_only_where_one_map_is_needed() -> None:
    three = build_program(between(c.Push(), c.Push(), c.Conv(8, 4), c.Pop(), c.Pop(), res(20, 8)))
    assert codes(three).count(Code.CONCAT) == 1
    twice = build_program(between(c.Push(), c.Pop(), *[c.Attention(16, 2, 4, 4)] * 2, end=16))
    assert codes(twice).count(Code.CONCAT) == 1


def test_the_words_are_those_of_the_header() -> None:
    config = adm_unet(mult=(1,), num_classes=3)
    program = build_program(config)
    words = program.words()
    assert words.dtype == np.int32
    assert words[:8].tolist() == [
        0x54524E55, 2, len(program.maps), len(program.operators), 1, 1, sum(config.projection_channels),
        program.weight_count,
    ]  # fmt: skip
    for read, written in zip(read_operators(words), program.operators, strict=True):
        assert read.code == written.code
        assert tuple(read.src) == written.src
        assert read.scale == np.float32(written.scale)
        assert read.eps == np.float32(written.eps)
    assert np.array_equal(build_program(config).words(), words)


def test_every_weight_but_the_time_embedding_s_is_there_once() -> None:
    config = adm_unet(updown=True)
    weights = build_program(config).weights
    expected = {name for name in random_network(config).state_dict() if not name.startswith("time.")}
    assert {weight.name for weight in weights} == expected
    assert len(weights) == len(expected)


def test_weights_that_do_not_fit() -> None:
    config = adm_unet(mult=(1,))
    program, state = build_program(config), dict(random_network(config).state_dict())
    taken = state.pop("blocks.0.bias")
    with pytest.raises(BackendError, match=r"blocks.0.bias needs shape \(32,\), got nothing; build the bundle again"):
        program.gather(state)
    with pytest.raises(BackendError, match=r"blocks.0.bias needs shape \(32,\), got \(31,\)"):
        program.gather(state | {"blocks.0.bias": taken[:31]})


def test_blocks_that_the_engine_does_not_have() -> None:
    with pytest.raises(BackendError, match="blocks.0 has a kernel of 9; the native engine has 1 to 7"):
        build_program(network(c.Conv(3, 3, 9)))
    with pytest.raises(BackendError, match="blocks.1 resamples behind its convolution"):
        build_program(between(res(conv_first=True, resample=c.Resample.DOWN)))
    pooled = replace(between(c.AveragePool(8, 8)), blocks=(c.AveragePool(3, 3),))
    with pytest.raises(BackendError, match="the native engine has no AveragePool; choose another backend"):
        build_program(pooled)
