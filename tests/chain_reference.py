"""The U-Nets of abarankab/DDPM and w86763777/pytorch-ddpm, from their constructors' arguments, as functions of tensors.

`make_network` gives the state dict that such a constructor makes, with random values; `run_network` computes what its
forward pass computes. Both are written from the projects' descriptions and share nothing with the translators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Project:
    """A project's key names."""

    head: str
    down: str
    middle: str
    up: str
    tail: tuple[str, str]
    block: tuple[str, str, str, str]
    time: str
    shortcut: str
    attention: str
    attention_norm: str
    qkv: tuple[str, ...]
    out: str
    halve: str
    double: str
    mlp: tuple[str, str]


ABARANKAB = Project(
    "init_conv", "downs", "mid", "ups", ("out_norm", "out_conv"), ("norm_1", "conv_1", "norm_2", "conv_2.1"),
    "time_bias", "residual_connection", "attention", "norm", ("to_qkv",), "to_out", "downsample", "upsample.1",
    ("time_mlp.1", "time_mlp.3"),
)  # fmt: skip
W86 = Project(
    "head", "downblocks", "middleblocks", "upblocks", ("tail.0", "tail.2"),
    ("block1.0", "block1.2", "block2.0", "block2.3"), "temb_proj.1", "shortcut", "attn", "group_norm",
    ("proj_q", "proj_k", "proj_v"), "proj", "main", "main",
    ("time_embedding.timembedding.1", "time_embedding.timembedding.3"),
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """What a constructor was given; attention: levels with it. norm: gn, in, bn or None. time_dim: None for a network
    that does not see the timestep, which only abarankab's constructor can make."""

    project: Project
    base: int = 8
    mults: tuple[int, ...] = (1, 2)
    depth: int = 1
    attention: tuple[int, ...] = (1,)
    time_dim: int | None = 16
    classes: int | None = None
    norm: str | None = "gn"
    channels: int = 3
    # of the forward pass
    groups: int = 4
    activation: Callable[[Tensor], Tensor] = F.silu
    time_scale: float = 1.0
    pad: int = 0


class _Maker:
    """Fills a state dict in the order in which the layers are made."""

    def __init__(self, arguments: Arguments, seed: int, device: str) -> None:
        self.a, self.p, self.device = arguments, arguments.project, device
        self.state: dict[str, Tensor] = {}
        self._rng = torch.Generator().manual_seed(seed)

    def some(self, *shape: int) -> Tensor:
        if self.device == "meta":
            return torch.empty(shape, device="meta")
        return torch.randn(shape, generator=self._rng)

    def layer(self, name: str, out: int, fan_in: int, kernel: int = 0) -> None:
        shape = (out, fan_in, kernel, kernel) if kernel else (out, fan_in)
        self.state[f"{name}.weight"] = self.some(*shape) / math.sqrt(fan_in * max(kernel, 1) ** 2)
        self.state[f"{name}.bias"] = 0.1 * self.some(out)

    def norm(self, name: str, width: int) -> None:
        if self.a.norm is None:
            return
        self.state[f"{name}.weight"] = 1 + 0.2 * self.some(width)
        self.state[f"{name}.bias"] = 0.2 * self.some(width)
        if self.a.norm == "bn":
            self.state[f"{name}.running_mean"] = 0.3 * self.some(width)
            self.state[f"{name}.running_var"] = 0.5 + self.some(width) ** 2
            self.state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def res(self, name: str, cin: int, out: int, attends: bool) -> None:
        p = self.p
        norm1, conv1, norm2, conv2 = (f"{name}.{part}" for part in p.block)
        self.norm(norm1, cin)
        self.layer(conv1, out, cin, 3)
        self.norm(norm2, out)
        self.layer(conv2, out, out, 3)
        if self.a.time_dim is not None:
            self.layer(f"{name}.{p.time}", out, self.a.time_dim)
        if self.a.classes is not None:
            self.state[f"{name}.class_bias.weight"] = self.some(self.a.classes, out)
        if cin != out:
            self.layer(f"{name}.{p.shortcut}", out, cin, 1)
        if attends:
            self.norm(f"{name}.{p.attention}.{p.attention_norm}", out)
            for qkv in p.qkv:
                self.layer(f"{name}.{p.attention}.{qkv}", 3 * out // len(p.qkv), out, 1)
            self.layer(f"{name}.{p.attention}.{p.out}", out, out, 1)


def make_network(arguments: Arguments, seed: int = 0, device: str = "cpu") -> dict[str, Tensor]:
    """The state dict of one network, random."""
    make, p, now = _Maker(arguments, seed, device), arguments.project, arguments.base
    if arguments.time_dim is not None:
        make.layer(p.mlp[0], arguments.time_dim, arguments.base)
        make.layer(p.mlp[1], arguments.time_dim, arguments.time_dim)
    make.layer(p.head, now, arguments.channels, 3)
    widths, index = [now], 0
    for level, mult in enumerate(arguments.mults):
        for _ in range(arguments.depth):
            make.res(f"{p.down}.{index}", now, mult * arguments.base, level in arguments.attention)
            now, index = mult * arguments.base, index + 1
            widths.append(now)
        if level < len(arguments.mults) - 1:
            make.layer(f"{p.down}.{index}.{p.halve}", now, now, 3)
            index += 1
            widths.append(now)
    for part in (0, 1):
        make.res(f"{p.middle}.{part}", now, now, part == 0)
    index = 0
    for level, mult in reversed(list(enumerate(arguments.mults))):
        for _ in range(arguments.depth + 1):
            make.res(f"{p.up}.{index}", widths.pop() + now, mult * arguments.base, level in arguments.attention)
            now, index = mult * arguments.base, index + 1
        if level:
            make.layer(f"{p.up}.{index}.{p.double}", now, now, 3)
            index += 1
    make.norm(p.tail[0], now)
    make.layer(p.tail[1], arguments.channels, now, 3)
    return make.state


def run_network(
    state: dict[str, Tensor], arguments: Arguments, embedding: Tensor, x: Tensor, y: Tensor | None = None
) -> Tensor:
    """The forward pass on x [B, C, H, W] with the sinusoidal embedding [B, base] of its timesteps."""
    a, p, act = arguments, arguments.project, arguments.activation

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(h, weight, state[f"{name}.bias"], stride, weight.shape[2] // 2)

    def norm(name: str, h: Tensor) -> Tensor:
        if a.norm is None:
            return h
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if a.norm == "in":
            return F.instance_norm(h, None, None, weight, bias)
        if a.norm == "bn":
            return F.batch_norm(h, state[f"{name}.running_mean"], state[f"{name}.running_var"], weight, bias)
        return F.group_norm(h, a.groups, weight, bias)

    def attend(name: str, h: Tensor) -> Tensor:
        normed = norm(f"{name}.{p.attention_norm}", h)
        rows = torch.cat([conv(f"{name}.{part}", normed) for part in p.qkv], 1).flatten(2)
        q, k, v = rows.chunk(3, dim=1)
        scores = torch.einsum("bci,bcj->bij", q, k) / math.sqrt(q.shape[1])
        mixed = torch.einsum("bij,bcj->bci", scores.softmax(-1), v)
        return h + conv(f"{name}.{p.out}", mixed.unflatten(2, h.shape[2:]))

    def res(name: str, h: Tensor) -> Tensor:
        norm1, conv1, norm2, conv2 = (f"{name}.{part}" for part in p.block)
        out = conv(conv1, act(norm(norm1, h)))
        if emb is not None:
            out = out + linear(f"{name}.{p.time}", act(emb))[..., None, None]
        if a.classes is not None:
            assert y is not None
            out = out + state[f"{name}.class_bias.weight"][y][..., None, None]
        out = conv(conv2, act(norm(norm2, out)))
        has_shortcut = f"{name}.{p.shortcut}.weight" in state
        out = out + (conv(f"{name}.{p.shortcut}", h) if has_shortcut else h)
        return attend(f"{name}.{p.attention}", out) if f"{name}.{p.attention}.{p.out}.weight" in state else out

    def count(part: str) -> int:
        return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(part + "."))

    emb = None if a.time_dim is None else linear(p.mlp[1], F.silu(linear(p.mlp[0], embedding)))
    h = conv(p.head, F.pad(x, (a.pad,) * 4))
    saved = [h]
    for index in range(count(p.down)):
        halve = f"{p.down}.{index}.{p.halve}"
        h = conv(halve, h, stride=2) if f"{halve}.weight" in state else res(f"{p.down}.{index}", h)
        saved.append(h)
    for index in range(2):
        h = res(f"{p.middle}.{index}", h)
    for index in range(count(p.up)):
        double = f"{p.up}.{index}.{p.double}"
        if f"{double}.weight" in state:
            h = conv(double, h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        else:
            h = res(f"{p.up}.{index}", torch.cat([h, saved.pop()], 1))
    h = conv(p.tail[1], act(norm(p.tail[0], h)))
    return h[:, :, a.pad : h.shape[2] - a.pad, a.pad : h.shape[3] - a.pad]


def angles(t: Tensor, channels: int) -> Tensor:
    """[B, channels / 2] in float64: t * 10000^(-2 i / channels)."""
    return t.double()[:, None] * 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
