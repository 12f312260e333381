"""The tutorial's U-Net against a reference forward pass, its conventions, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from exported import assert_exports
from helpers import FP32_OTHER_ORDER
from torch import Tensor

from engine.checkpoints.facts import make_facts
from engine.checkpoints.families import tutorial
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.prediction import Variance
from engine.errors import CheckpointError

WIDTHS = (8, 16, 8, 24)
SIZE = (16, 8)
FACTS: dict[str, Any] = {"num_groups": 4, "image_size": SIZE}


def network(
    widths: tuple[int, ...] = WIDTHS, heads: int = 1, channels: int = 3, device: str = "cpu"
) -> dict[str, Tensor]:
    """The tutorial's state dict for these level widths and heads of full width, random."""
    state: dict[str, Tensor] = {}
    rng = torch.Generator().manual_seed(5)

    def some(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta") if device == "meta" else torch.randn(shape, generator=rng)

    def layer(name: str, *shape: int) -> None:
        state[f"{name}.weight"] = some(*shape) / math.sqrt(math.prod(shape[1:]))
        state[f"{name}.bias"] = 0.1 * some(shape[0])

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + 0.2 * some(width), 0.2 * some(width)

    def res(name: str, cin: int, out: int) -> None:
        layer(f"{name}.time_proj", out, 4 * widths[0])
        norm(f"{name}.norm1", cin)
        layer(f"{name}.conv1", out, cin, 3, 3)
        norm(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3, 3)
        if cin != out:
            layer(f"{name}.shortcut", out, cin, 1, 1)

    def attention(name: str, width: int) -> None:
        layer(f"{name}.proj", 3 * heads * width, width)
        layer(f"{name}.output", width, heads * width)
        norm(f"{name}.norm", width)

    layer("time_embedding.embed1", 4 * widths[0], widths[0])
    layer("time_embedding.embed2", 4 * widths[0], 4 * widths[0])
    layer("proj1", widths[0], channels, 3, 3)
    for level, (cin, out) in enumerate(zip((widths[0], *widths), widths, strict=False)):
        layer(f"down_{level}.down_sample", cin, cin, 3, 3)
        for part, before in ((1, cin), (2, out)):
            res(f"down_{level}.down_block{part}.residual_block", before, out)
            attention(f"down_{level}.down_block{part}.attn", out)
    for part in ("residual_block1", "residual_block2"):
        res(f"middle.{part}", widths[-1], widths[-1])
    attention("middle.attn", widths[-1])
    ups = widths[::-1]
    for level, (cin, out) in enumerate(zip(ups, (*ups[1:], ups[-1]), strict=True)):
        layer(f"up_{level}.up_sample", out, out, 4, 4)
        for part, after, skip in ((1, cin, cin), (2, cin, cin), (3, out, out)):
            res(f"up_{level}.up_block{part}.residual_block", cin + skip, after)
            attention(f"up_{level}.up_block{part}.attn", after)
    layer("proj2", channels, widths[0], 3, 3)
    return state


def run_network(p: dict[str, Tensor], x: Tensor, t: Tensor, groups: int = 4, heads: int = 1) -> Tensor:
    """The tutorial's forward pass."""

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, p[f"{name}.weight"], p[f"{name}.bias"])

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        return F.conv2d(h, p[f"{name}.weight"], p[f"{name}.bias"], stride, p[f"{name}.weight"].shape[2] // 2)

    def norm(name: str, h: Tensor) -> Tensor:
        return F.group_norm(h, groups, p[f"{name}.weight"], p[f"{name}.bias"])

    def res(name: str, h: Tensor) -> Tensor:
        out = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", h)))
        out = out + linear(f"{name}.time_proj", F.silu(emb))[..., None, None]
        out = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", out)))
        return out + (conv(f"{name}.shortcut", h) if f"{name}.shortcut.weight" in p else h)

    def attend(name: str, h: Tensor) -> Tensor:
        tokens = norm(f"{name}.norm", h).flatten(2).transpose(1, 2)
        mixed = []
        for part in linear(f"{name}.proj", tokens).chunk(heads, dim=2):
            q, k, v = part.chunk(3, dim=2)
            mixed.append((q @ k.transpose(1, 2) * q.shape[2] ** -0.5).softmax(-1) @ v)
        return (tokens + linear(f"{name}.output", torch.cat(mixed, 2))).transpose(1, 2).reshape(h.shape)

    half = p["time_embedding.embed1.weight"].shape[1] // 2
    angle = t.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / (half - 1))
    emb = linear("time_embedding.embed1", torch.cat([angle.sin(), angle.cos()], 1).float())
    emb = linear("time_embedding.embed2", F.silu(emb))
    h, saved = conv("proj1", x), []
    for level in range(4):
        h = conv(f"down_{level}.down_sample", h, stride=2) if level else h
        saved.append(h)
        for part in (1, 2):
            h = res(f"down_{level}.down_block{part}.residual_block", h)
            h = attend(f"down_{level}.down_block{part}.attn", h) if level > 1 else h
            saved.append(h)
    h = res("middle.residual_block2", attend("middle.attn", res("middle.residual_block1", h)))
    for level in range(4):
        for part in (1, 2, 3):
            h = res(f"up_{level}.up_block{part}.residual_block", torch.cat([h, saved.pop()], 1))
            h = attend(f"up_{level}.up_block{part}.attn", h) if level < 2 else h
        if level < 3:
            weight, bias = (p[f"up_{level}.up_sample.{name}"] for name in ("weight", "bias"))
            h = F.conv_transpose2d(h, weight, bias, stride=2, padding=1)
    return conv("proj2", h)


def load(folder: Path, state: dict[str, Tensor], **facts: Any) -> Checkpoint:
    torch.save(state, folder / "unet.pt")
    return load_checkpoint(folder / "unet.pt", **FACTS | facts)


@pytest.mark.parametrize(
    ("widths", "full_heads", "heads", "channels"),
    [(WIDTHS, 1, 1, 3), (WIDTHS, 3, 3, 1), ((8, 8, 16, 16), 2, 2, 3), (WIDTHS, 1, 4, 3)],
)
def test_network(tmp_path: Path, widths: tuple[int, ...], full_heads: int, heads: int, channels: int) -> None:
    """heads: of full width where full_heads is as many, else of a part of it."""
    state = network(widths, full_heads, channels)
    checkpoint = load(tmp_path, state, num_heads=heads)
    x, t = torch.randn(2, channels, *SIZE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 998])
    with torch.inference_mode():
        got = checkpoint.unet()(x, t.float())
    expected = run_network(state, x, t, heads=heads)
    torch.testing.assert_close(got, expected, rtol=FP32_OTHER_ORDER, atol=FP32_OTHER_ORDER)


def test_conventions_and_assumptions(tmp_path: Path) -> None:
    torch.save(network((32, 32, 64, 64)), tmp_path / "unet.pt")
    checkpoint = load_checkpoint(tmp_path / "unet.pt")
    diffusion = checkpoint.diffusion
    assert checkpoint.config.image_size == (32, 32)
    np.testing.assert_array_equal(diffusion.schedule.betas, np.linspace(1e-4, 0.02, 1000))
    assert (diffusion.clip, diffusion.variance) == (None, Variance.FIXED_LARGE)
    assert {a.name for a in checkpoint.assumptions} == {
        "num_groups", "num_heads", "image_size", "num_train_timesteps", "beta_start", "beta_end", "clip_denoised",
        "variance",
    }  # fmt: skip
    said = load_checkpoint(
        tmp_path / "unet.pt", num_train_timesteps=50, beta_start=1e-3, beta_end=0.1, variance="fixed_small"
    ).diffusion
    np.testing.assert_array_equal(said.schedule.betas, np.linspace(1e-3, 0.1, 50))
    assert said.variance is Variance.FIXED_SMALL


def test_full_size_network_is_inferred_from_shapes() -> None:
    translation = tutorial.translate(network((64, 128, 256, 1024), device="meta"), make_facts({}))
    assert translation.config.time.embed_channels == 64
    assert translation.config.time.channels == 256
    attentions = [block for block in translation.config.blocks if type(block).__name__ == "Attention"]
    assert [block.channels for block in attentions] == [256, 256, 1024, 1024, 1024, 1024, 1024, 256, 256, 256, 128]


def refused(state: dict[str, Tensor], **facts: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        tutorial.translate(state, make_facts(FACTS | facts))
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    state = network()
    assert "2 heads of full width; leave --num-heads out" in refused(network(heads=2), num_heads=1)
    assert "cannot have 32 groups; give the training's number with --num-groups" in refused(state, num_groups=32)
    assert "linear schedule only" in refused(state, noise_schedule="cosine")
    assert "extra" in refused(state | {"extra": torch.zeros(1)})
    assert "lacks up_3.up_block3" in refused({n: v for n, v in state.items() if not n.startswith("up_3.up_block3")})


def test_export(tmp_path: Path) -> None:
    assert_exports(load(tmp_path, network()), tmp_path)
