"""softmax(q k^T) v without the matrix of scores in memory, for the head sizes and token counts of U-Nets.

A program takes one head of one image and a tile of queries, and goes over the keys with a running maximum and sum in
float32 (Milakov & Gimelshein, Online normalizer calculation for softmax, 2018; Dao et al., FlashAttention, 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST_TILE = 16
"""The least side of a tensor core's product."""
MOST_HEAD_DIM = 512


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    """Tiles of queries and keys, head_dim padded to a power of two, warps and pipeline stages."""

    query_tile: int
    key_tile: int
    dim_tile: int
    num_warps: int
    num_stages: int


def plan_launch(head_dim: int, queries: int, keys: int, element_size: int) -> AttentionLaunch:
    """Tiles whose accumulators fit the registers and whose keys and values fit 100 KiB of shared memory.

    element_size: bytes, 2 or 4. Raises ValueError for a head_dim that no tile fits.
    """
    if not 1 <= head_dim <= MOST_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, expected 1 to {MOST_HEAD_DIM}; use kernels.reference.attention")
    dim_tile = _padded(head_dim)
    if element_size == 4:
        query_tile, key_tile = 32 if dim_tile <= 64 else 16, 16
        warps, stages = (4 if dim_tile <= 128 else 8), 1
    elif dim_tile <= 128:
        query_tile, key_tile, warps, stages = 64, 32, 4, 2
    elif dim_tile == 256:
        query_tile, key_tile, warps, stages = 64, 32, 8, 2
    else:
        query_tile, key_tile, warps, stages = 32, 16, 8, 2
    return AttentionLaunch(min(query_tile, _padded(queries)), min(key_tile, _padded(keys)), dim_tile, warps, stages)


def _padded(size: int) -> int:
    return max(_LEAST_TILE, int(triton.next_power_of_2(size)))


@triton.jit
def attention_forward(q, k, v, y, heads, queries, keys, q_image, q_head, q_token, q_dim, k_image, k_head, k_token,
                      k_dim, v_image, v_head, v_token, v_dim, y_image, y_head, y_token, y_dim, HEAD_DIM: tl.constexpr,
                      QUERY_TILE: tl.constexpr, KEY_TILE: tl.constexpr, DIM_TILE: tl.constexpr,
                      WIDENED: tl.constexpr):  # fmt: skip
    """Program (tile of queries, image and head); *_image, *_head, *_token, *_dim are strides in elements.

    WIDENED: products of the tiles' values in float32, where they are exact, for hardware without their own.
    """
    image = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    query = tl.program_id(0) * QUERY_TILE + tl.arange(0, QUERY_TILE)
    dim = tl.arange(0, DIM_TILE)
    key_line = tl.arange(0, KEY_TILE)
    is_query = (query < queries)[:, None] & (dim < HEAD_DIM)[None, :]
    q_at = q + image * q_image + head * q_head + query[:, None] * q_token + dim[None, :] * q_dim
    k_at = k + image * k_image + head * k_head + dim[:, None] * k_dim
    v_at = v + image * v_image + head * v_head + dim[None, :] * v_dim
    q_tile = tl.load(q_at, mask=is_query, other=0.0)
    if WIDENED:
        q_tile = q_tile.to(tl.float32)
    largest = tl.full((QUERY_TILE,), float("-inf"), tl.float32)
    total = tl.zeros((QUERY_TILE,), tl.float32)
    mixed = tl.zeros((QUERY_TILE, DIM_TILE), tl.float32)
    for start in range(0, keys, KEY_TILE):
        key = start + key_line
        is_key = key < keys
        k_tile = tl.load(k_at + key[None, :] * k_token, mask=is_key[None, :] & (dim < HEAD_DIM)[:, None], other=0.0)
        if WIDENED:
            k_tile = k_tile.to(tl.float32)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee")
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        raised = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - raised[:, None])
        kept = tl.exp(largest - raised)
        total = total * kept + tl.sum(weights, axis=1)
        v_tile = tl.load(v_at + key[:, None] * v_token, mask=is_key[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        weights = weights.to(v_tile.dtype)
        if WIDENED:
            weights, v_tile = weights.to(tl.float32), v_tile.to(tl.float32)
        mixed = tl.dot(weights, v_tile, mixed * kept[:, None], input_precision="ieee")
        largest = raised
    y_at = y + image * y_image + head * y_head + query[:, None] * y_token + dim[None, :] * y_dim
    tl.store(y_at, (mixed / total[:, None]).to(y.dtype.element_ty), mask=is_query)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v; q [B, heads, N, head_dim], k and v [B, heads, M, head_dim], any strides -> as q.

    float32, float16 or bfloat16; 1/sqrt(head_dim) is part of q, as in kernels.reference.attention. The result lies in
    memory as q does: with tokens or with channels next to each other. Raises ValueError for other inputs.
    """
    _check(q, k, v)
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    launch = plan_launch(head_dim, queries, keys, q.element_size())
    # Triton's interpreter multiplies the bit patterns of bfloat16.
    widened = q.dtype is torch.bfloat16 and not isinstance(attention_forward, triton.JITFunction)
    y = _like(q)
    grid = (triton.cdiv(queries, launch.query_tile), batch * heads)
    attention_forward[grid](
        q, k, v, y, heads, queries, keys, *q.stride(), *k.stride(), *v.stride(), *y.stride(),
        head_dim, launch.query_tile, launch.key_tile, launch.dim_tile, widened,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return y


def _like(q: Tensor) -> Tensor:
    """Memory in the order [B, heads, head_dim, N] or [B, N, heads, head_dim], so that joining heads copies nothing."""
    batch, heads, tokens, dim = q.shape
    if q.stride(2) == 1:
        return torch.empty((batch, heads, dim, tokens), dtype=q.dtype, device=q.device).transpose(2, 3)
    return torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device).transpose(1, 2)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.ndim != 4 or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q is {tuple(q.shape)} {q.dtype}, expected [B, heads, N, head_dim] of 32 or 16 bits")
    expected = (*q.shape[:2], k.shape[2] if k.ndim == 4 else -1, q.shape[3])
    for name, tokens in (("k", k), ("v", v)):
        if tokens.shape != expected or tokens.dtype != q.dtype or tokens.shape[2] == 0:
            raise ValueError(
                f"{name} is {tuple(tokens.shape)} {tokens.dtype}, expected {expected} {q.dtype}, some tokens"
            )
