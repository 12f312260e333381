"""The programs of kernels/native/include/unetrt_native.h in plain PyTorch, one operator after the other.

It reads the words as that file describes them and shares nothing with what writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import reference

HEADER, MAP, OPERATOR = 8, 5, 24


@dataclass(frozen=True)
class Op:
    """One operator; src and extra without the places that name no map."""

    code: int
    dst: int
    src: list[int]
    add: int
    weight: int
    bias: int
    row: int
    kernel: int
    stride: int
    pad: int
    mode: int
    extra: list[int]
    extra_weight: int
    extra_bias: int
    kind: int
    groups: int
    activation: int
    heads: int
    dim: int
    memory: int
    scale: float
    eps: float


def read_operators(words: np.ndarray) -> list[Op]:
    first = HEADER + MAP * int(words[2])
    return [_read_operator(words[i : i + OPERATOR]) for i in range(first, len(words), OPERATOR)]


def _read_operator(words: np.ndarray) -> Op:
    taken = iter([*words[:22].tolist(), *words[22:].copy().view(np.float32).tolist()])
    values = {}
    for each in fields(Op):
        is_pair = each.name in ("src", "extra")
        values[each.name] = [m for m in (next(taken), next(taken)) if m != -1] if is_pair else next(taken)
    return Op(**values)


@dataclass
class Run:
    """maps: what each operator wrote, by its map. output: the network's."""

    words: np.ndarray
    weights: Tensor
    x: Tensor
    rows: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)
    output: Tensor | None = None
    log_p: Tensor | None = None

    def shape(self, index: int) -> list[int]:
        return self.words[HEADER + MAP * index :][:3].tolist()

    def bytes_of(self, index: int) -> tuple[float, int]:
        """Scale and zero of a map; (0, 0) where it holds numbers."""
        scale, zero = self.words[HEADER + MAP * index :][3:MAP]
        return float(np.array(scale, np.int32).view(np.float32)), int(zero)

    def take(self, place: int, *shape: int) -> Tensor:
        count = int(np.prod(shape))
        assert place >= 0
        assert place + count <= len(self.weights)
        return self.weights[place : place + count].reshape(shape)

    def optional(self, place: int, *shape: int) -> Tensor | float:
        return 0.0 if place == -1 else self.take(place, *shape)

    def columns(self, first: int, count: int) -> Tensor:
        assert 0 <= first <= first + count <= self.rows.shape[1]
        return self.rows[:, first : first + count, None, None]

    def cat(self, maps: list[int]) -> Tensor:
        assert maps
        return torch.cat([self.maps[m] for m in maps], dim=1)

    def added(self, result: Tensor, op: Op) -> Tensor:
        return (result if op.add == -1 else result + self.maps[op.add]) * op.scale


def run_program(words: np.ndarray, weights: np.ndarray, x: Tensor, rows: Tensor) -> Run:
    """x [B, C, H, W] and rows [B, row width]; computed in the type of x."""
    assert words[:2].tolist() == [0x54524E55, 2]
    assert len(words) == HEADER + MAP * words[2] + OPERATOR * words[3]
    assert len(weights) == words[7]
    assert rows.shape == (len(x), words[6])
    assert x.shape[1] == words[4]
    run = Run(words, torch.from_numpy(weights).to(x.dtype), x, rows.to(x.dtype))
    for op in read_operators(words):
        result = OPERATORS[op.code](run, op)
        if op.code == 1:
            assert run.output is None
            run.output = result
            continue
        assert op.dst not in run.maps, "a map is written twice"
        assert list(result.shape[1:]) == run.shape(op.dst), (op, result.shape)
        scale, zero = run.bytes_of(op.dst)
        if scale:
            assert op.code == 3
            steps = torch.round(result / scale) + zero
            result = (torch.minimum(torch.maximum(steps, steps.new_tensor(0)), steps.new_tensor(255)) - zero) * scale
        run.maps[op.dst] = result
    assert run.output is not None
    assert run.output.shape[1] == words[5]
    return run


def _output(run: Run, op: Op) -> Tensor:
    assert len(op.src) == 1
    return run.cat(op.src)


def _conv(run: Run, op: Op) -> Tensor:
    x, (out, *size), k = run.cat(op.src), run.shape(op.dst), op.kernel
    assert 1 <= k <= 7
    if op.mode == 2:
        assert (k, op.stride, op.pad) == (4, 2, 1)
        result = F.conv_transpose2d(x, run.take(op.weight, x.shape[1], out, 4, 4), stride=2, padding=1)
    else:
        if op.mode == 1:
            assert (k, op.stride, op.pad) == (3, 1, 1)
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        bottom, right = ((n - 1) * op.stride + k - op.pad - m for n, m in zip(size, x.shape[2:], strict=True))
        assert op.stride in (1, 2)
        assert max(bottom, right) < k
        padded = F.pad(x, (op.pad, right, op.pad, bottom))
        weight = run.take(op.weight, out, x.shape[1], k, k)
        if run.bytes_of(op.src[0])[0]:
            assert (op.mode, op.stride, len(op.src)) == (0, 1, 1)
            largest = weight.abs().flatten(1).max(1).values.clamp(min=1e-30)[:, None, None, None]
            weight = torch.round(weight / largest * 127) * largest / 127
        result = F.conv2d(padded, weight, stride=op.stride)
    result = result + run.optional(op.bias, out, 1, 1)
    if op.row != -1:
        result = result + run.columns(op.row, out)
    if op.extra:
        assert (op.mode, op.stride) == (0, 1)
        extra = run.cat(op.extra)
        result = result + F.conv2d(extra, run.take(op.extra_weight, out, extra.shape[1], 1, 1))
        result = result + run.optional(op.extra_bias, out, 1, 1)
    return run.added(result, op)


def _group(x: Tensor, op: Op) -> Tensor:
    grouped = x.reshape(len(x), op.groups, -1)
    mean = grouped.mean(2, keepdim=True)
    var = (grouped - mean).square().mean(2, keepdim=True)
    return ((grouped - mean) / (var + op.eps).sqrt()).reshape(x.shape)


def _rms(x: Tensor, op: Op) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12) * x.shape[1] ** 0.5


def _layer(x: Tensor, op: Op) -> Tensor:
    centred = x - x.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + op.eps).sqrt()


NORMS: list[Callable[[Tensor, Op], Tensor]] = [_group, _rms, _layer, lambda x, op: x, lambda x, op: x]
ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x * torch.sigmoid(x),
    lambda x: x.clamp(min=0),
    lambda x: x * torch.tanh(torch.log1p(torch.exp(x))),
    lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
]


def _norm(run: Run, op: Op) -> Tensor:
    x = run.cat(op.src)
    channels = x.shape[1]
    h = NORMS[op.kind](x, op)
    if op.kind != 4:
        h = h * run.take(op.weight, channels, 1, 1)
    h = h + run.optional(op.bias, channels, 1, 1)
    if op.row != -1:
        h = h * (1 + run.columns(op.row, channels)) + run.columns(op.row + channels, channels)
    return run.added(ACTIVATIONS[op.activation](h), op)


def _tokens(run: Run, op: Op) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, dim, pixels] and memory [2, heads, dim, memory]."""
    x = run.cat(op.src)
    q, k, v = x.reshape(len(x), 3, op.heads, op.dim, -1).unbind(1)
    memory = x.new_zeros(2, op.heads, op.dim, 0)
    if op.memory:
        memory = run.take(op.weight, 2, op.heads, op.memory, op.dim).transpose(2, 3)
    return q, k, v, memory.expand(len(x), -1, -1, -1, -1).transpose(0, 1)


def _attention(run: Run, op: Op) -> Tensor:
    q, k, v, memory = _tokens(run, op)
    k, v = torch.cat([memory[0], k], 3), torch.cat([memory[1], v], 3)
    if op.scale != 0:
        q, k = (each / each.norm(dim=3, keepdim=True).clamp(min=1e-12) for each in (q, k))
    scores = torch.einsum("bhdn,bhdm->bhnm", q, k) * (op.scale or 1.0)
    mixed = torch.einsum("bhnm,bhdm->bhdn", scores.softmax(3), v)
    return mixed.reshape(len(q), *run.shape(op.dst))


def _linear_attention(run: Run, op: Op) -> Tensor:
    q, k, v, memory = _tokens(run, op)
    k, v = torch.cat([memory[0], k], 3), torch.cat([memory[1], v * op.eps], 3)
    context = torch.einsum("bhdm,bhem->bhde", k.softmax(3), v)
    mixed = torch.einsum("bhdn,bhde->bhen", q.softmax(2), context) * op.scale
    return mixed.reshape(len(q), *run.shape(op.dst))


def _average(x: Tensor) -> Tensor:
    height, width = x.shape[2] // 2, x.shape[3] // 2
    return x[:, :, : 2 * height, : 2 * width].unflatten(3, (width, 2)).unflatten(2, (height, 2)).mean((3, 5))


def _space_to_depth(x: Tensor) -> Tensor:
    return torch.stack([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 2).flatten(1, 2)


RESAMPLINGS: list[Callable[[Tensor, int], Tensor]] = [
    lambda x, pad: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
    lambda x, pad: _average(x),
    lambda x, pad: reference.fir_upsample(x),
    lambda x, pad: reference.fir_downsample(x),
    lambda x, pad: _space_to_depth(x),
    lambda x, pad: F.pad(x, (pad,) * 4),
]


def _resample(run: Run, op: Op) -> Tensor:
    assert len(op.src) == 1
    return run.added(RESAMPLINGS[op.kind](run.cat(op.src), op.pad), op)


def _to_tokens(run: Run, op: Op) -> Tensor:
    assert len(op.src) == 1
    pixels = run.cat(op.src).flatten(2)
    tokens = torch.cat([pixels.mean(2, keepdim=True), pixels], 2)
    return (tokens + run.optional(op.weight, *tokens.shape[1:]))[:, :, None]


def _to_pixels(run: Run, op: Op) -> Tensor:
    assert len(op.src) == 1
    tokens = run.cat(op.src)[:, :, 0]
    pixels = tokens[:, :, 1:] + tokens[:, :, :1] / (tokens.shape[2] - 1)
    return pixels.reshape(len(tokens), *run.shape(op.dst))


def _classify(run: Run, op: Op) -> Tensor:
    assert len(op.src) == 1
    assert run.log_p is None
    x = run.cat(op.src)
    weight = run.take(op.weight, op.groups, x.shape[1])
    log_p = (x[:, :, 0, 0] @ weight.T + run.take(op.bias, op.groups)).log_softmax(1)
    label, factor = run.rows[:, op.row].long(), run.rows[:, op.row + 1]
    run.log_p = log_p[torch.arange(len(x)), label]
    cotangent = F.one_hot(label, op.groups) - log_p.exp()
    result = torch.zeros_like(x)
    result[:, :, 0, 0] = (cotangent * factor[:, None]) @ weight
    return result


def _gradient(run: Run, op: Op, forward: Callable[[Run, Op], Tensor]) -> Tensor:
    """By autograd, of the operator `forward` with src[0] alone."""
    given, cotangent = op.src
    x = run.maps[given].detach().requires_grad_(True)
    kept = run.maps
    run.maps = kept | {given: x}
    made = forward(run, replace(op, src=[given], add=-1, scale=1.0 if op.code == 12 else 0.0))
    run.maps = kept
    return run.added(torch.autograd.grad(made, x, kept[cotangent])[0], op)


def _norm_gradient(run: Run, op: Op) -> Tensor:
    assert op.kind == 0
    return _gradient(run, op, _norm)


def _attention_gradient(run: Run, op: Op) -> Tensor:
    assert (op.memory, op.scale) == (0, 0)
    inner = op.heads * op.dim

    def mix(run: Run, op: Op) -> Tensor:
        x = run.cat(op.src)
        q, k, v = x.reshape(len(x), 3, op.heads, op.dim, -1).unbind(1)
        scores = torch.einsum("bhdn,bhdm->bhnm", q, k)
        return torch.einsum("bhnm,bhdm->bhdn", scores.softmax(3), v).reshape(len(x), inner, *x.shape[2:])

    return _gradient(run, replace(op, scale=1.0), mix)


OPERATORS: list[Callable[[Run, Op], Tensor]] = [
    lambda run, op: run.x,
    _output,
    _conv,
    _norm,
    _attention,
    _linear_attention,
    _resample,
    lambda run, op: (run.maps[op.src[0]] + run.maps[op.src[1]]) * op.scale,
    lambda run, op: run.cat(op.src),
    _to_tokens,
    _to_pixels,
    _classify,
    _norm_gradient,
    _attention_gradient,
]
