"""The update kernel against kernels.reference.solver_update, and its noise against engine.diffusion.noise."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import adm_unet
from torch import Tensor
from triton_cases import DEVICE

from benchmarks.core.timing import device_for
from engine.diffusion.noise import INPAINTING, NOISE, normal
from engine.diffusion.solvers import COLUMNS
from engine.networks.config import UNetConfig
from engine.sampling.device_state import SlotState, allocate_state
from engine.sampling.fused_update import fused_update
from engine.sampling.step_program import Variant, torch_update

pytest.importorskip("triton")

from kernels.triton import update as triton_update

SLOTS, CHANNELS = 3, 3
# Sums in another order, in float32; a normal may be rounded to its neighbour (see engine.diffusion.noise).
SAME = {"atol": 2e-6, "rtol": 2e-6}


@pytest.fixture(params=[(4, 4), (14, 18)], ids=["fewer-elements-than-a-program", "two-programs-ragged"])
def config(request: Any) -> UNetConfig:
    height, width = request.param
    return adm_unet(channels=CHANNELS, size=(height, width))


def random_state(config: UNetConfig, seed: int = 0) -> SlotState:
    state = allocate_state(device_for(DEVICE == "cuda"), config, SLOTS)
    make = torch.Generator().manual_seed(seed)
    for values in (state.x_t, state.x0, state.older, state.known):
        values.copy_(torch.randn(values.shape, generator=make))
    state.mask.copy_(torch.rand(state.mask.shape, generator=make))
    state.mask[0] = 1.0
    state.mask[1, :, :2] = 0.0
    arena = state.arena[1:8]
    arena.copy_(torch.randn(arena.shape, generator=make))
    arena[:, COLUMNS.index("clip")] = 1.5
    arena[:, COLUMNS.index("percentile")] = torch.tensor([0.0, 0.995, 0.5, 1.0, 0.0, 0.31, 0.0])
    arena[:, COLUMNS.index("push")] = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    state.row.copy_(torch.tensor([2, 7, 5]))
    state.last.copy_(torch.tensor([7, 7, 7]))
    state.seed_low.copy_(torch.tensor([1, -5, 2**31 - 1]))
    state.seed_high.copy_(torch.tensor([0, -1, 77]))
    state.draw.copy_(torch.tensor([1, 4, 1000]))
    return state


def outputs(config: UNetConfig, variance: bool, seed: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    size = config.image_size
    out = torch.randn(SLOTS, CHANNELS * (2 if variance else 1), *size, generator=make)
    grad, raw = (torch.randn(SLOTS, CHANNELS, *size, generator=make).to(DEVICE) for _ in range(2))
    return out.to(DEVICE), grad, raw


def assert_states_equal(ours: SlotState, expected: SlotState) -> None:
    for name in ("x_t", "x0", "older"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), **SAME)
    assert torch.equal(ours.ints, expected.ints)
    assert not ours.arrived.any()


@pytest.mark.parametrize(("noise", "gradient", "variance"), list(itertools.product([False, True], repeat=3)))
def test_a_step_is_the_references(config: UNetConfig, noise: bool, gradient: bool, variance: bool) -> None:
    ours, expected = random_state(config), random_state(config)
    variant = Variant(gradient=gradient, noise=noise)
    for step in range(2):
        out, grad, _ = outputs(config, variance, seed=step)
        for update, state in ((fused_update, ours), (torch_update, expected)):
            update(state, out, grad if gradient else None, None, variant)
    assert_states_equal(ours, expected)


@pytest.mark.parametrize("has_raw", [False, True])
def test_extras_are_the_references(config: UNetConfig, has_raw: bool) -> None:
    """Dynamic thresholds, outs of rows before, a known part, and another out behind E."""
    ours, expected = random_state(config), random_state(config)
    variant = Variant(gradient=True, noise=True, thresholds=True, multistep=True, known=True)
    for step in range(3):
        out, grad, raw = outputs(config, True, seed=step)
        for update, state in ((fused_update, ours), (torch_update, expected)):
            update(state, out, grad, raw if has_raw else None, variant)
    assert_states_equal(ours, expected)


def test_an_operand_without_coefficient_is_not_read(config: UNetConfig) -> None:
    state = random_state(config)
    state.arena[2:8] = 0.0
    state.arena[2:8, COLUMNS.index("Q")] = 1.0
    state.arena[2:8, COLUMNS.index("clip")] = torch.inf
    before = state.x_t.clone()
    for values in (state.x0, state.older, state.known):
        values.fill_(torch.nan)
    state.mask.fill_(1.0)
    out, grad, raw = (torch.full_like(values, torch.nan) for values in outputs(config, False))
    fused_update(state, out, grad, raw, Variant(gradient=True, noise=True, thresholds=True, multistep=True, known=True))
    assert torch.equal(state.x_t, before)


@pytest.mark.parametrize("percentile", [1e-6, 0.25, 0.5, 0.995, 1.0])
def test_the_quantile_is_exact(config: UNetConfig, percentile: float) -> None:
    state = random_state(config)
    state.arena[:8, COLUMNS.index("percentile")] = percentile
    state.arena[:8, COLUMNS.index("A")] = 0.0
    state.arena[:8, COLUMNS.index("B")] = 1.0
    out, _, _ = outputs(config, False)
    out[1] = out[1].round()
    fused_update(state, out, None, None, Variant(thresholds=True, multistep=True, known=True))
    held = np.float64(np.float32(percentile))
    exact = np.quantile(out.abs().flatten(1).double().cpu().numpy(), held, axis=1)
    np.testing.assert_allclose(state.threshold.cpu().numpy(), exact, rtol=1e-7)


@pytest.mark.parametrize("stream", [NOISE, INPAINTING])
def test_the_noise_is_the_engines(stream: int) -> None:
    """As a row gives it alone: S alone, or N where everything is known."""
    config = adm_unet(channels=CHANNELS, size=(32, 32))
    state = random_state(config)
    state.arena[2:8] = 0.0
    state.arena[2:8, COLUMNS.index("S" if stream == NOISE else "N")] = 1.0
    state.mask.fill_(1.0 if stream == NOISE else 0.0)
    seeds = [
        (int(h) & 0xFFFFFFFF) << 32 | int(w) & 0xFFFFFFFF for h, w in zip(state.seed_high, state.seed_low, strict=True)
    ]
    expected = normal(seeds, state.draw.tolist(), (CHANNELS, 32, 32), stream)
    out, _, _ = outputs(config, False)
    fused_update(state, out, None, None, Variant(noise=True, known=stream == INPAINTING))
    np.testing.assert_allclose(state.x_t.cpu().numpy(), expected, rtol=2e-7, atol=0)


def test_the_arenas_columns_are_the_kernels() -> None:
    assert triton_update.ROW == COLUMNS
    assert (triton_update.NOISE_STREAM.value, triton_update.KNOWN_STREAM.value) == (NOISE, INPAINTING)


@pytest.mark.parametrize("change", ["out", "grad", "raw_out", "layout"])
def test_other_shapes_are_refused(config: UNetConfig, change: str) -> None:
    state = random_state(config)
    values = dict(zip(("out", "grad", "raw_out"), outputs(config, False), strict=True))
    if change == "layout":
        values["out"] = values["out"].contiguous(memory_format=torch.channels_last)
    else:
        values[change] = values[change][:2]
    with pytest.raises(ValueError, match="out has strides" if change == "layout" else change):
        fused_update(state, values["out"], values["grad"], values["raw_out"], Variant(gradient=True))
