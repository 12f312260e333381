"""The U-Nets of denoising-diffusion-pytorch 0.27 to 1.8, from their constructor's arguments, as functions of tensors.

`make_network` gives a state dict as such a constructor makes it, with random values; `run_network` computes its forward
pass. Both are written from the differences between the releases and share nothing with the translator. Releases from
1.9 on are covered by the installed package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Arguments:
    """A release and what the constructor was given; heads and dim_head of each level."""

    version: tuple[int, int, int]
    dim: int = 8
    mults: tuple[int, ...] = (1, 2)
    channels: int = 3
    self_condition: bool = False
    groups: int = 4
    heads: tuple[int, ...] = (4, 4)
    dim_head: tuple[int, ...] = (32, 32)
    full: tuple[bool, ...] = (False, False)
    theta: float = 10000.0
    out_channels: int | None = None

    @property
    def widths(self) -> list[tuple[int, int]]:
        sizes = [self.dim, *(self.dim * m for m in self.mults)]
        return list(zip(sizes[:-1], sizes[1:], strict=True))


def make_network(arguments: Arguments, seed: int) -> dict[str, Tensor]:
    """Random tensors under the project's names, without the `model.` before them."""
    rng, state = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    time = 4 * arguments.dim

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        fan_in = math.prod(shape[1:])
        state[f"{name}.weight"] = torch.randn(shape, generator=rng) / fan_in**0.5
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=rng)

    def res(name: str, cin: int, out: int) -> None:
        layer(f"{name}.mlp.1", 2 * out, time)
        for number, width in ((1, cin), (2, out)):
            layer(f"{name}.block{number}.proj", out, width, 3, 3)
            state[f"{name}.block{number}.norm.weight"] = 1 + 0.2 * torch.randn(out, generator=rng)
            state[f"{name}.block{number}.norm.bias"] = 0.2 * torch.randn(out, generator=rng)
        if cin != out:
            layer(f"{name}.res_conv", out, cin, 1, 1)

    def attention(name: str, width: int, level: int, is_full: bool) -> None:
        wrapped = arguments.version < (1, 8, 0)
        inner, inside = arguments.heads[level] * arguments.dim_head[level], f"{name}.fn.fn" if wrapped else name
        state[f"{name}.fn.norm.g" if wrapped else f"{name}.norm.g"] = 1 + 0.2 * torch.randn(
            1, width, 1, 1, generator=rng
        )
        layer(f"{inside}.to_qkv", 3 * inner, width, 1, 1, bias=False)
        layer(f"{inside}.to_out" if is_full else f"{inside}.to_out.0", width, inner, 1, 1)
        if not is_full:
            state[f"{inside}.to_out.1.g"] = 1 + 0.2 * torch.randn(1, width, 1, 1, generator=rng)

    layer("init_conv", arguments.dim, arguments.channels * (1 + arguments.self_condition), 7, 7)
    layer("time_mlp.1", time, arguments.dim)
    layer("time_mlp.3", time, time)
    last = len(arguments.mults) - 1
    for level, (narrow, wide) in enumerate(arguments.widths):
        down, up = f"downs.{level}", f"ups.{last - level}"
        for number in (0, 1):
            res(f"{down}.{number}", narrow, narrow)
            res(f"{up}.{number}", wide + narrow, wide)
        attention(f"{down}.2", narrow, level, arguments.full[level])
        attention(f"{up}.2", wide, level, arguments.full[level])
        if level == last:
            layer(f"{down}.3", wide, narrow, 3, 3)
        elif arguments.version < (0, 32, 0):
            layer(f"{down}.3", wide, narrow, 4, 4)
        else:
            layer(f"{down}.3.1", wide, 4 * narrow, 1, 1)
        layer(f"{up}.3" if level == 0 else f"{up}.3.1", narrow, wide, 3, 3)
    wide = arguments.widths[-1][1]
    res("mid_block1", wide, wide)
    attention("mid_attn", wide, last, True)
    res("mid_block2", wide, wide)
    res("final_res_block", 2 * arguments.dim, arguments.dim)
    layer("final_conv", arguments.out_channels or arguments.channels, arguments.dim, 1, 1)
    return state


def run_network(state: dict[str, Tensor], arguments: Arguments, x: Tensor, t: Tensor, cond: Tensor | None) -> Tensor:
    """The network's result for x [B, C, H, W], t [B], and the previous x0 where it takes one."""
    version = arguments.version

    def conv(h: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        if name.endswith(".proj") and version < (1, 7, 2):
            flat = weight.flatten(1)
            scaled = (flat - flat.mean(1, keepdim=True)) / (flat.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            weight = scaled.reshape(weight.shape)
        return F.conv2d(h, weight, state.get(f"{name}.bias"), stride=stride, padding=(weight.shape[-1] - 1) // 2)

    def norm(h: Tensor, name: str) -> Tensor:
        if version < (1, 7, 0):
            centred = h - h.mean(1, keepdim=True)
            return centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.g"]
        return h / h.square().sum(1, keepdim=True).sqrt() * h.shape[1] ** 0.5 * state[f"{name}.g"]

    def res(h: Tensor, name: str) -> Tensor:
        projected = F.linear(F.silu(embedding), state[f"{name}.mlp.1.weight"], state[f"{name}.mlp.1.bias"])
        scale, shift = projected[:, :, None, None].chunk(2, dim=1)
        y = h
        for number in (1, 2):
            prefix = f"{name}.block{number}"
            y = conv(y, f"{prefix}.proj")
            y = F.group_norm(y, arguments.groups, state[f"{prefix}.norm.weight"], state[f"{prefix}.norm.bias"])
            y = F.silu(y * (scale + 1) + shift if number == 1 else y)
        return y + (conv(h, f"{name}.res_conv") if f"{name}.res_conv.weight" in state else h)

    def attention(h: Tensor, name: str, level: int) -> Tensor:
        wrapped = version < (1, 8, 0)
        inside, heads, dim = f"{name}.fn.fn" if wrapped else name, arguments.heads[level], arguments.dim_head[level]
        batch, _, height, width = h.shape
        qkv = conv(norm(h, f"{name}.fn.norm" if wrapped else f"{name}.norm"), f"{inside}.to_qkv")
        # [3, B, heads, dim, pixels]
        q, k, v = qkv.reshape(batch, 3, heads, dim, height * width).transpose(0, 1)
        if f"{inside}.to_out.0.weight" in state:
            v = v / (height * width) if version < (1, 7, 4) else v
            context = torch.einsum("bhdn,bhen->bhde", k.softmax(3), v)
            out = torch.einsum("bhde,bhdn->bhen", context, q.softmax(2) * dim**-0.5)
            y = conv(out.reshape(batch, heads * dim, height, width), f"{inside}.to_out.0")
            return h + norm(y, f"{inside}.to_out.1")
        if version < (0, 28, 0):
            q, k, factor = F.normalize(q, dim=3), F.normalize(k, dim=3), 10.0
        else:
            factor = dim**-0.5
        scores = torch.einsum("bhdi,bhdj->bhij", q, k) * factor
        out = torch.einsum("bhij,bhdj->bhdi", scores.softmax(3), v)
        return h + conv(out.reshape(batch, heads * dim, height, width), f"{inside}.to_out")

    half = arguments.dim // 2
    angle = t[:, None].float() * torch.exp(torch.arange(half) * (-math.log(arguments.theta) / (half - 1)))
    embedding = torch.cat([angle.sin(), angle.cos()], dim=1)
    embedding = F.gelu(F.linear(embedding, state["time_mlp.1.weight"], state["time_mlp.1.bias"]))
    embedding = F.linear(embedding, state["time_mlp.3.weight"], state["time_mlp.3.bias"])

    h = conv(x if cond is None else torch.cat([cond, x], dim=1), "init_conv")
    skips, last = [h], len(arguments.mults) - 1
    for level in range(last + 1):
        name = f"downs.{level}"
        h = res(h, f"{name}.0")
        skips.append(h)
        h = attention(res(h, f"{name}.1"), f"{name}.2", level)
        skips.append(h)
        if f"{name}.3.1.weight" in state:
            h = conv(F.pixel_unshuffle(h, 2), f"{name}.3.1")
        else:
            h = conv(h, f"{name}.3", stride=1 if level == last else 2)
    h = res(attention(res(h, "mid_block1"), "mid_attn", last), "mid_block2")
    for number in range(last + 1):
        name = f"ups.{number}"
        for part in (0, 1):
            h = res(torch.cat([h, skips.pop()], dim=1), f"{name}.{part}")
        h = attention(h, f"{name}.2", last - number)
        is_doubled = f"{name}.3.1.weight" in state
        h = conv(F.interpolate(h, scale_factor=2.0), f"{name}.3.1") if is_doubled else conv(h, f"{name}.3")
    return conv(res(torch.cat([h, skips.pop()], dim=1), "final_res_block"), "final_conv")
