"""The attention kernel against kernels.reference; in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, assert_as_good_as_torch

from kernels import reference

pytest.importorskip("triton")

from kernels.triton.attention import attention, plan_launch

# (batch, heads, queries, keys, head_dim) and why.
SHAPES = [
    pytest.param((2, 2, 16, 16, 16), id="least-tile"),
    pytest.param((1, 1, 64, 64, 8), id="head-dim-below-a-tile"),
    pytest.param((1, 2, 49, 49, 24), id="odd-map-and-padded-head-dim"),
    pytest.param((1, 1, 64, 68, 32), id="learned-keys-in-front"),
    pytest.param((1, 1, 1, 130, 64), id="one-query-many-key-tiles"),
    pytest.param((1, 1, 130, 200, 40), id="several-query-tiles"),
    pytest.param((1, 1, 64, 64, 256), id="ddpm-one-head"),
    pytest.param((1, 1, 33, 20, 512), id="largest-head-dim"),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def tokens(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def exact_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q.double() @ k.double().transpose(-2, -1), dim=-1) @ v.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_as_good_as_torch(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    batch, heads, queries, keys, dim = shape
    q = (tokens(batch, heads, queries, dim, seed=0) * dim**-0.5).to(dtype)
    k, v = (tokens(batch, heads, keys, dim, seed=s).to(dtype) for s in (1, 2))
    assert_as_good_as_torch(attention(q, k, v), reference.attention(q, k, v), exact_of(q, k, v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["sharp", "all equal", "large values", "one key towers"])
def test_hard_inputs(kind: str, dtype: torch.dtype) -> None:
    q, k, v = (tokens(1, 2, 40, 16, seed=s) for s in (3, 4, 5))
    if kind == "sharp":
        q = q * 30
    elif kind == "all equal":
        k = torch.ones_like(k)
    elif kind == "large values":
        v = 5e4 * v.sign()
    else:
        k[:, :, -1] = 60 * q.mean(dim=2)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    assert_as_good_as_torch(attention(q, k, v), reference.attention(q, k, v), exact_of(q, k, v))


@pytest.mark.parametrize("channels_last", [False, True])
def test_heads_of_a_projection_are_read_and_joined_without_a_copy(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    qkv = tokens(2, 3 * 2 * 16, 4, 5, seed=6).contiguous(memory_format=layout)
    parts = qkv.reshape(2, 3, 2, 16, 20).transpose(3, 4) if not channels_last else None
    if parts is None:
        parts = qkv.permute(0, 2, 3, 1).reshape(2, 20, 3, 2, 16).permute(0, 2, 3, 1, 4)
    q, k, v = parts.unbind(1)
    ours = attention(q, k, v)
    torch.testing.assert_close(ours, reference.attention(q, k, v), atol=1e-5, rtol=1e-5)
    joined = ours.transpose(1, 2).reshape(2, 20, 32) if channels_last else ours.transpose(2, 3).reshape(2, 32, 20)
    assert joined.data_ptr() == ours.data_ptr()


def test_keys_and_values_of_every_size_fit_shared_memory() -> None:
    for element_size in (2, 4):
        for dim in range(1, 513):
            launch = plan_launch(dim, 4096, 4096, element_size)
            assert 2 * launch.key_tile * launch.dim_tile * element_size * launch.num_stages <= 100 * 1024


@pytest.mark.parametrize(
    ("q", "k", "v", "text"),
    [
        ((1, 2, 4), (1, 2, 4, 8), (1, 2, 4, 8), r"q is \(1, 2, 4\)"),
        ((1, 2, 4, 8), (1, 1, 4, 8), (1, 2, 4, 8), r"k is \(1, 1, 4, 8\)"),
        ((1, 2, 4, 8), (1, 2, 6, 8), (1, 2, 4, 8), r"v is \(1, 2, 4, 8\)"),
        ((1, 2, 4, 8), (1, 2, 0, 8), (1, 2, 0, 8), "some tokens"),
        ((1, 1, 4, 513), (1, 1, 4, 513), (1, 1, 4, 513), "head_dim is 513"),
    ],
)
def test_other_inputs_are_refused(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        attention(torch.zeros(q), torch.zeros(k), torch.zeros(v))
