"""Configs and their parts as JSON: the same value back bit by bit, or an error that names the field."""

from __future__ import annotations

import dataclasses
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_cases import networks

from engine.diffusion.prediction import Diffusion
from engine.diffusion.schedule import linear_schedule
from engine.errors import ConfigError
from engine.json_form import decode, encode
from engine.networks import config as c

CONFIG = c.UNetConfig(
    in_channels=3,
    out_channels=3,
    image_size=(4, 8),
    time=c.TimeConfig(8, 16, c.EmbeddingOrder.SIN_COS),
    blocks=(c.Conv(3, 8), c.Push(), c.ResBlock(8, 8, True, groups=4), c.Pop(), c.Conv(16, 3)),
    num_classes=4,
    null_class=3,
)


def through_text(value: object) -> Any:
    return json.loads(json.dumps(encode(value), allow_nan=False))


@given(networks())
def test_any_network_comes_back(config: c.UNetConfig) -> None:
    assert decode(through_text(config), c.UNetConfig) == config


def test_a_network_without_time_or_labels() -> None:
    block = dataclasses.replace(CONFIG.blocks[2], has_projection=False)
    blind = c.UNetConfig(3, 3, (4, 8), None, (*CONFIG.blocks[:2], block, *CONFIG.blocks[3:]))
    data = through_text(blind)
    assert data["time"] is None
    assert not {"num_classes", "null_class"} & set(data)
    assert decode(data, c.UNetConfig) == blind


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_keeps_its_bits(number: float) -> None:
    again = decode(through_text(c.TimeConfig(2, 2, theta=number)), c.TimeConfig)
    assert struct.pack("<d", again.theta) == struct.pack("<d", number)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_neither_written_nor_read(number: float) -> None:
    with pytest.raises(ConfigError, match=rf"\$.time.theta is {number}; a finite number is needed"):
        encode(dataclasses.replace(CONFIG, time=c.TimeConfig(2, 2, theta=number)))
    data = encode(CONFIG)
    data["time"]["theta"] = number
    with pytest.raises(ConfigError, match=rf"\$.time.theta is {number}; a finite number is needed"):
        decode(data, c.UNetConfig)


def changed(path: tuple[str | int, ...], value: object) -> Any:
    """CONFIG's JSON form with another value at a place; KeyError removes the one there."""
    data = place = encode(CONFIG)
    for step in path[:-1]:
        place = place[step]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("in_channels",), "3", r"Expected `int`, got `str` - at `\$.in_channels`"),
        (("in_channels",), 3.0, r"Expected `int`, got `float` - at `\$.in_channels`"),
        (("in_channels",), True, r"Expected `int`, got `bool` - at `\$.in_channels`"),
        (("in_channels",), KeyError, r"missing required field `in_channels`"),
        (("cond_channels",), KeyError, r"\$ lacks the field 'cond_channels'"),
        (("width",), 3, r"\$ has the unknown field 'width'"),
        (("image_size",), [4], r"length 2, got 1 - at `\$.image_size`"),
        (("time",), KeyError, r"missing required field `time`"),
        (("time", "order"), "sin", r"Invalid enum value 'sin' - at `\$.time.order`"),
        (("time", "sigma"), 3, r"\$.time has the unknown field 'sigma'"),
        (("blocks",), 3, r"Expected `array`, got `int` - at `\$.blocks`"),
        (("blocks", 0), [], r"unknown block type None; known: conv, .* - at `\$.blocks\[0\]`"),
        (("blocks", 0, "type"), "convolution", r"unknown block type 'convolution'; known: conv, .*\$.blocks\[0\]"),
        (("blocks", 0, "type"), ["conv"], r"unknown block type \['conv'\]; known: conv, .*\$.blocks\[0\]"),
        (("blocks", 0, "type"), KeyError, r"unknown block type None; known: conv, .*\$.blocks\[0\]"),
        (("blocks", 2, "groups"), "4", r"block 'res_block': Expected `int`, .*`\$.groups` - at `\$.blocks\[2\]`"),
        (("blocks", 2, "out_channels"), KeyError, r"block 'res_block': .*`out_channels` - at `\$.blocks\[2\]`"),
        (("blocks", 2, "eps"), KeyError, r"\$.blocks\[2\] lacks the field 'eps'"),
        (("blocks", 2, "width"), 3, r"\$.blocks\[2\] has the unknown field 'width'"),
        (("blocks", 2, "norm"), "batch", r"block 'res_block': Invalid enum value 'batch' .*\$.blocks\[2\]"),
    ],
)
def test_an_error_names_the_field(path: tuple[str | int, ...], value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=f"this is no UNetConfig: .*{message}"):
        decode(changed(path, value), c.UNetConfig)


@pytest.mark.parametrize("data", [None, 3, "text", [], [1]])
def test_something_else(data: object) -> None:
    with pytest.raises(ConfigError, match="this is no UNetConfig: Expected `object`"):
        decode(data, c.UNetConfig)


def test_values_are_checked_as_where_they_are_made() -> None:
    with pytest.raises(ConfigError, match="null class 9 is outside the 4 classes"):
        decode(changed(("null_class",), 9), c.UNetConfig)


@pytest.mark.parametrize("betas", [["0.1"], [True], 0.1, None, [[0.1]]])
def test_an_array_of_something_else(betas: object) -> None:
    data = encode(Diffusion(linear_schedule(100)))
    data["schedule"]["betas"] = betas
    with pytest.raises(ConfigError, match=r"this is no Diffusion: .*\$.schedule.betas"):
        decode(data, Diffusion)


def test_timesteps_are_whole_numbers() -> None:
    data = encode(Diffusion(linear_schedule(100)))
    data["schedule"]["timesteps"][3] = 3.5
    with pytest.raises(ConfigError, match=r"Expected `int`, got `float`.*\$.schedule.timesteps"):
        decode(data, Diffusion)
