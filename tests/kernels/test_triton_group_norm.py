"""The GroupNorm+SiLU kernels against kernels.reference; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, assert_as_good_as_torch

from kernels import reference

pytest.importorskip("triton")

from kernels.triton.group_norm_silu import group_norm_silu, plan_launch

# (batch, channels, groups, height, width) and why.
SHAPES = [
    pytest.param((2, 64, 32, 4, 4), id="two-channels-a-group"),
    pytest.param((1, 32, 32, 5, 3), id="one-channel-a-group-odd-map"),
    pytest.param((2, 24, 8, 4, 4), id="three-channels-a-group-is-no-power-of-two"),
    pytest.param((3, 32, 1, 4, 4), id="one-group"),
    pytest.param((1, 8, 2, 1, 1), id="one-pixel"),
    pytest.param((1, 16, 2, 48, 48), id="split-over-programs"),
    pytest.param((1, 6, 2, 61, 67), id="split-with-a-ragged-end"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [
    pytest.param(torch.contiguous_format, id="nchw"),
    pytest.param(torch.channels_last, id="channels-last"),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact_of(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    return reference.group_norm_silu(x.double(), weight.double(), bias.double(), groups, eps)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_torch(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    batch, channels, groups, height, width = shape
    x = (normal(batch, channels, height, width) * 3 + 0.5).to(dtype).contiguous(memory_format=layout)
    weight, bias = normal(channels, seed=1).to(dtype), normal(channels, seed=2).to(dtype)
    ours = group_norm_silu(x, weight, bias, groups, 1e-5)
    torchs = reference.group_norm_silu(x, weight, bias, groups, 1e-5)
    assert_as_good_as_torch(ours, torchs, exact_of(x, weight, bias, groups))
    assert ours.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [pytest.param(8, id="one-tile"), pytest.param(96, id="split")])
@pytest.mark.parametrize("kind", ["mean 1e3", "constant groups", "near 6e4"])
def test_hard_inputs(kind: str, size: int, dtype: torch.dtype) -> None:
    noise = normal(1, 8, size, size)
    hard = {
        "mean 1e3": noise + 1e3,
        "constant groups": torch.full_like(noise, 0.7),
        "near 6e4": 6e4 * noise.sign() + noise,
    }
    x = hard[kind].to(dtype)
    weight, bias = torch.ones(8, device=DEVICE, dtype=dtype), normal(8).to(dtype)
    ours = group_norm_silu(x, weight, bias, 2, 1e-5)
    torchs = reference.group_norm_silu(x, weight, bias, 2, 1e-5)
    assert_as_good_as_torch(ours, torchs, exact_of(x, weight, bias, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [pytest.param(4, id="one-tile"), pytest.param(72, id="split")])
def test_scale_and_shift_are_rows_of_one_projection(size: int, layout: torch.memory_format) -> None:
    x = normal(2, 16, size, size).contiguous(memory_format=layout)
    weight, bias = normal(16, seed=1), normal(16, seed=2)
    scale, shift = normal(2, 32, seed=3).chunk(2, dim=1)
    ours = group_norm_silu(x, weight, bias, 4, 1e-6, scale=scale, shift=shift)
    h = reference.group_norm(x, weight, bias, 4, 1e-6)
    exact = reference.group_norm(x.double(), weight.double(), bias.double(), 4, 1e-6)
    assert_as_good_as_torch(
        ours,
        reference.scale_shift_silu(h, scale, shift),
        reference.scale_shift_silu(exact, scale.double(), shift.double()),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [pytest.param(4, id="one-tile"), pytest.param(80, id="split")])
def test_a_second_map_is_read_as_a_concatenation(size: int, layout: torch.memory_format) -> None:
    # 12 + 8 channels in 4 groups of 5: a group straddles both maps.
    first = normal(2, 12, size, size).contiguous(memory_format=layout)
    second = normal(2, 8, size, size, seed=4).contiguous(memory_format=layout)
    weight, bias = normal(20, seed=1), normal(20, seed=2)
    ours = group_norm_silu(first, weight, bias, 4, 1e-5, second=second)
    both = torch.cat([first, second], dim=1)
    assert_as_good_as_torch(
        ours, reference.group_norm_silu(both, weight, bias, 4, 1e-5), exact_of(both, weight, bias, 4)
    )


def test_without_silu_it_is_group_norm() -> None:
    x, weight, bias = normal(2, 16, 4, 4), normal(16, seed=1), normal(16, seed=2)
    ours = group_norm_silu(x, weight, bias, 4, 1e-5, silu=False)
    torch.testing.assert_close(ours, reference.group_norm(x, weight, bias, 4, 1e-5), atol=1e-5, rtol=1e-5)


def test_a_group_is_split_only_where_there_are_few() -> None:
    assert plan_launch(1, 32, 4, 32 * 32, False).splits == 1
    assert plan_launch(1, 32, 8, 64 * 64, False).splits == 8
    assert plan_launch(64, 32, 8, 64 * 64, False).splits == 1
    assert plan_launch(1, 32, 4, 64 * 64, True).group_tile == 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": torch.zeros(1, 8, 4)}, r"shape \(1, 8, 4\)"),
        ({"x": torch.zeros(1, 8, 4, 4, dtype=torch.float64)}, "float64"),
        ({"x": torch.zeros(1, 8, 4, 4).transpose(1, 2)}, "contiguous"),
        ({"num_groups": 3}, "3 groups"),
        ({"weight": torch.ones(7)}, r"weight \(7,\)"),
        ({"scale": torch.zeros(1, 8)}, "come together"),
        ({"scale": torch.zeros(2, 8), "shift": torch.zeros(2, 8)}, r"scale is \(2, 8\)"),
        ({"second": torch.zeros(1, 8, 2, 4)}, r"second is \(1, 8, 2, 4\)"),
    ],
)
def test_other_inputs_are_refused(change: dict[str, object], text: str) -> None:
    good = {"x": torch.zeros(1, 8, 4, 4), "weight": torch.ones(8), "bias": torch.zeros(8), "num_groups": 2, "eps": 1e-5}
    with pytest.raises(ValueError, match=text):
        group_norm_silu(**(good | change))
