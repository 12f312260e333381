"""The OpenAI translator: what it infers from a file's keys and shapes, and how it answers facts that do not fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from helpers import FP32_OTHER_ORDER, adm_classifier, adm_unet, openai_state, random_network, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.prediction import Prediction, Variance
from engine.errors import CheckpointError, ConfigError
from engine.json_form import decode, encode
from engine.networks import config as c


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(config: c.UNetConfig | c.ClassifierConfig) -> list[Tensor | None]:
    size = config.image_size
    given = [some(2, config.in_channels, *size), torch.tensor([3.0, 811.5])]
    if isinstance(config, c.UNetConfig):
        y = torch.tensor([0, config.num_classes - 1]) if config.num_classes else None
        cond = some(2, config.cond_channels, *size, seed=1) if config.cond_channels else None
        given += [y, cond]
    return given


def assert_loads(path: Any, config: c.UNetConfig | c.ClassifierConfig, **facts: Any) -> Checkpoint:
    """The file's network is `config`, and computes what the network that was written computes."""
    checkpoint = load_checkpoint(path, **facts)
    assert checkpoint.config == config
    network = checkpoint.classifier() if checkpoint.is_classifier else checkpoint.unet()
    with torch.inference_mode():
        got, expected = network(*inputs(config)), random_network(config)(*inputs(config))
    assert expected.std() > 0.05
    torch.testing.assert_close(got, expected, atol=FP32_OTHER_ORDER, rtol=FP32_OTHER_ORDER)
    return checkpoint


@st.composite
def unets(draw: st.DrawFn) -> c.UNetConfig:
    mult = draw(st.sampled_from([(1,), (1, 2), (1, 1), (2, 1), (1, 2, 2)]))
    height, width = (2 ** (len(mult) - 1) * draw(st.integers(2, 4)) for _ in range(2))
    updown = draw(st.booleans())
    num_classes = draw(st.sampled_from([None, 3]))
    return adm_unet(
        channels=draw(st.sampled_from([1, 3])),
        size=(height, width),
        mult=mult,
        depth=draw(st.integers(1, 2)),
        attention=draw(st.sets(st.integers(0, len(mult) - 1))),
        head_dim=draw(st.sampled_from([8, 32])),
        scale_shift=draw(st.booleans()),
        updown=updown,
        conv_resample=updown or draw(st.booleans()),
        num_classes=num_classes,
        null_class=draw(st.sampled_from([None, 2])) if num_classes else None,
        learn_sigma=draw(st.booleans()),
        super_resolution=draw(st.booleans()),
    )


@settings(max_examples=8)
@given(unets())
def test_unets_of_any_shape(tmp_path_factory, config):
    path = write_checkpoint(tmp_path_factory.mktemp("unet") / "ema.pt", config)
    facts: dict[str, Any] = {"image_size": config.image_size, "num_head_channels": head_dim(config)}
    if config.cond_channels:
        facts["super_resolution"] = True
    if config.null_class is not None:
        facts["null_class"] = config.null_class
    checkpoint = assert_loads(path, config, **facts)
    has_channels = config.out_channels == 2 * config.in_channels
    assert checkpoint.diffusion.variance is (Variance.LEARNED_RANGE if has_channels else Variance.FIXED_LARGE)


def head_dim(config: c.UNetConfig | c.ClassifierConfig) -> int:
    return next(block.head_dim for block in config.blocks if isinstance(block, c.Attention))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize(
    "resampling",
    [{}, {"conv_resample": False}, {"updown": True}],
    ids=["convolutions", "without weights", "resblock_updown"],
)
def test_each_depth_and_resampling(tmp_path, depth, resampling):
    config = adm_unet(depth=depth, mult=(1, 2, 2), **resampling)
    assert_loads(write_checkpoint(tmp_path / "ema.pt", config), config, image_size=8, num_head_channels=32)


def test_head_count_instead_of_head_width(tmp_path):
    config = adm_unet(heads=4, attention=(0, 1))
    widths = {block.head_dim for block in config.blocks if isinstance(block, c.Attention)}
    assert widths == {8, 16}
    assert_loads(write_checkpoint(tmp_path / "ema.pt", config), config, image_size=8, num_heads=4)


def test_another_head_count_on_the_way_up(tmp_path):
    config = adm_unet(heads=4, heads_up=2, attention=(0, 1))
    path = write_checkpoint(tmp_path / "ema.pt", config)
    assert_loads(path, config, image_size=8, num_heads=4, num_heads_upsample=2)
    # 4 is the default, even where widths are multiples of 64: a count was given, so the training counted heads.
    wide = adm_unet(width=64, mult=(1, 1), heads=4, heads_up=2)
    assert_loads(write_checkpoint(tmp_path / "wide.pt", wide), wide, image_size=8, num_heads_upsample=2)


def test_the_new_attention_order(tmp_path):
    """Their new order keeps q, k and v apart; theirs and ours differ by the scale in q only."""
    config = adm_unet(attention=(1,), head_dim=16)
    state = openai_state(config)
    for key in [key for key in state if ".qkv." in key]:
        rows = state[key].reshape(-1, 3, 16, *state[key].shape[1:])
        state[key] = rows.transpose(0, 1).reshape(state[key].shape).contiguous()
    torch.save(state, tmp_path / "ema.pt")
    assert_loads(tmp_path / "ema.pt", config, image_size=8, num_head_channels=16, attention_order="new")
    with pytest.raises(AssertionError, match="not close"):
        assert_loads(tmp_path / "ema.pt", config, image_size=8, num_head_channels=16)


@pytest.mark.parametrize("num_classes", [None, 5])
@pytest.mark.parametrize("attention_pool", [False, True], ids=["adaptive", "attention"])
@pytest.mark.parametrize("conv_resample", [False, True])
def test_classifiers(tmp_path, attention_pool, conv_resample, num_classes):
    config = adm_classifier(
        attention_pool=attention_pool, conv_resample=conv_resample, num_classes=num_classes or 10, scale_shift=True
    )
    assert_loads(write_checkpoint(tmp_path / "c.pt", config), config, image_size=8, num_head_channels=32)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_classifiers_that_resample_in_their_res_blocks(tmp_path, depth):
    config = adm_classifier(mult=(1, 2, 4), depth=depth, updown=True, attention=(1, 2))
    path = write_checkpoint(tmp_path / "c.pt", config)
    checkpoint = assert_loads(path, config, image_size=8, num_head_channels=32)
    assert "num_res_blocks" not in {a.name for a in checkpoint.assumptions}


@pytest.mark.parametrize(("depth", "mult", "others"), [(2, (1, 1, 1), [8]), (5, (1, 1), [1, 2, 3]), (1, (1, 1), [3])])
def test_classifier_whose_depth_the_file_leaves_open(tmp_path, depth, mult, others):
    """Equal widths and no attention: a guess must show among the assumptions, and the fact must settle it."""
    config = adm_classifier(mult=mult, depth=depth, updown=True, attention=(), size=(16, 16), attention_pool=False)
    path = write_checkpoint(tmp_path / "c.pt", config)
    facts: dict[str, Any] = {"image_size": 16, "num_head_channels": 32}
    assert_loads(path, config, **facts, num_res_blocks=depth)
    groups = len(mult) * (depth + 1)
    possible = [n for n in range(1, groups) if groups % (n + 1) == 0]
    if 2 not in possible:
        with pytest.raises(CheckpointError, match=r"leaves open how many ResBlocks a level has .*--num-res-blocks"):
            load_checkpoint(path, **facts)
        return
    guess = next(a for a in load_checkpoint(path, **facts).assumptions if a.name == "num_res_blocks")
    assert guess.value == 2
    assert all(str(n) in guess.reason for n in possible if n != 2)
    with pytest.raises(CheckpointError, match=r"leaves open how many ResBlocks a level has \(none fits what was given"):
        load_checkpoint(path, **facts, num_res_blocks=groups)


def test_an_attention_pool_tells_the_image_size_and_the_depth(tmp_path):
    config = adm_classifier(mult=(1, 1), depth=2, updown=True, attention=(), size=(16, 16))
    checkpoint = assert_loads(
        write_checkpoint(tmp_path / "c.pt", config), config, num_head_channels=32, num_res_blocks=2
    )
    assert str(next(a for a in checkpoint.assumptions if a.name == "image_size")).startswith(
        "image_size = 16x16 (64 positions in the attention pool; change it with --image-size"
    )
    by_size = assert_loads(tmp_path / "c.pt", config, num_head_channels=32, image_size=16)
    assert "num_res_blocks" not in {a.name for a in by_size.assumptions}


def test_published_widths_tell_the_image_size(tmp_path):
    config = adm_unet(mult=(1, 2, 3, 4), size=(64, 64))
    checkpoint = load_checkpoint(write_checkpoint(tmp_path / "ema.pt", config), num_head_channels=32)
    assert checkpoint.config == config
    assert "image_size" in {a.name for a in checkpoint.assumptions}


def test_what_is_assumed_is_said(tmp_path):
    path = write_checkpoint(tmp_path / "ema.pt", adm_unet(width=64, mult=(1,), num_classes=3))
    assumed = {a.name: a.value for a in load_checkpoint(path, image_size=8).assumptions}
    assert assumed == {
        "family": "openai-guided",
        "num_head_channels": 64,
        "attention_order": "legacy",
        "null_class": None,
        "num_train_timesteps": 1000,
        "noise_schedule": "linear",
        "rescale_timesteps": False,
        "variance": "fixed_large",
        "prediction": "eps",
        "clip_denoised": True,
    }
    given = {**assumed, "null_class": 2, "image_size": 8}
    assert not load_checkpoint(path, **given).assumptions
    improved = {a.name: a.value for a in load_checkpoint(path, image_size=8, family="openai-improved").assumptions}
    assert improved["rescale_timesteps"] is True
    assert improved["num_heads"] == 4


def test_facts_about_the_diffusion(tmp_path):
    path = write_checkpoint(tmp_path / "ema.pt", adm_unet())
    facts = {"image_size": 8, "num_heads": 2, "num_train_timesteps": 400, "noise_schedule": "cosine"}
    facts |= {"rescale_timesteps": True, "prediction": "v", "variance": "fixed_small", "clip_denoised": False}
    d = load_checkpoint(path, **facts).diffusion
    assert (len(d.schedule), d.timestep_scale, d.clip) == (400, 2.5, None)
    assert (d.prediction, d.variance) == (Prediction.V, Variance.FIXED_SMALL)
    assert d.schedule.betas[-1] == 0.999


def test_super_resolution_is_seen_or_assumed(tmp_path):
    plain = adm_unet(channels=3, super_resolution=True)
    path = write_checkpoint(tmp_path / "plain.pt", plain)
    assert_loads(path, plain, image_size=8, num_head_channels=32)
    learned = adm_unet(channels=3, super_resolution=True, learn_sigma=True)
    path = write_checkpoint(tmp_path / "learned.pt", learned)
    checkpoint = assert_loads(path, learned, image_size=8, num_head_channels=32)
    assert "6 channels in and out" in next(a for a in checkpoint.assumptions if a.name == "super_resolution").reason
    assert load_checkpoint(path, image_size=8, num_head_channels=32, super_resolution=False).config.cond_channels == 0


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_heads": 3}, "an attention of 64 channels cannot have 3 heads; give the training's number with --num-h"),
        (
            {"num_head_channels": 48},
            "64 channels cannot have heads of 48 channels; .*--num-head-channels or --num-heads",
        ),
        ({"num_head_channels": 0}, "num_head_channels is 0; expected a whole number from 1 up"),
        ({"num_heads": -2}, "num_heads is -2; expected a whole number"),
        ({"num_heads": 2.5}, "num_heads is 2.5; expected a whole number"),
        ({"num_heads": True}, "num_heads is True; expected a whole number"),
        ({"num_heads": "four"}, "num_heads is 'four'; expected a whole number"),
        ({"num_heads": float("nan")}, "num_heads is nan; expected a whole number"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; expected a whole number from 1 up"),
        ({"num_train_timesteps": 20}, r"every beta must lie in \(0, 1\).*20 steps or fewer"),
        ({"rescale_timesteps": "false"}, "rescale_timesteps is 'false'; expected True or False"),
        ({"noise_schedule": "steep"}, "noise_schedule is 'steep'; expected one of linear, cosine"),
        (
            {"image_size": 7},
            "image size 7x7 does not fit a network that halves it 1 times; give a multiple of 2 with --i",
        ),
        ({"image_size": (8, 9)}, "image size 8x9 does not fit"),
        ({"image_size": 0}, "image_size is 0; expected a height and a width in pixels, like 64x48"),
        ({"image_size": "64by48"}, "image_size is '64by48'; expected a height and a width"),
        ({"image_size": (8, 8, 8)}, r"image_size is \(8, 8, 8\); expected a height and a width"),
        ({"image_size": 8.5}, "image_size is 8.5; expected a height and a width"),
        (
            {"null_class": 3},
            "null class 3 is outside the 3 classes of this network; give a row of its label table with --",
        ),
        ({"null_class": -1}, "null_class is -1; expected a whole number from 0 up"),
        ({"heads": 4}, "unknown checkpoint fact heads; known: family, image_size, num_heads"),
        ({"family": "adm"}, "unknown family 'adm'; known: .*openai-guided, openai-improved"),
        ({"family": "openai-improved", "attention_order": "new"}, "improved-diffusion has the legacy attention order"),
        ({"super_resolution": True}, "2 channels in and 2 out fit neither|1 channels in and 1 out fit neither"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_facts_that_do_not_fit(tmp_path_factory, facts, message):
    path = write_checkpoint(tmp_path_factory.mktemp("facts") / "ema.pt", adm_unet(num_classes=3))
    with pytest.raises((CheckpointError, ConfigError), match=message):
        load_checkpoint(path, **({"image_size": 8, "num_heads": 2} | facts))


def test_image_sizes_as_text_and_number(tmp_path):
    path = write_checkpoint(tmp_path / "ema.pt", adm_unet())
    for size, expected in (("8", (8, 8)), ("8x12", (8, 12)), (16, (16, 16)), ([8, 4], (8, 4))):
        assert load_checkpoint(path, image_size=size, num_heads=2).config.image_size == expected


def test_missing_image_size_names_the_flag(tmp_path):
    path = write_checkpoint(tmp_path / "ema.pt", adm_unet())
    with pytest.raises(CheckpointError, match=r"image size is not in the file; give it with --image-size HxW \(a mult"):
        load_checkpoint(path, num_heads=2)


def test_classifier_of_another_image_size(tmp_path):
    path = write_checkpoint(tmp_path / "c.pt", adm_classifier())
    with pytest.raises(
        ConfigError, match=r"image of 16x16 leaves 64 pixels for an attention pool of 16 positions; give"
    ):
        load_checkpoint(path, image_size=16, num_head_channels=32)


def test_the_wrong_kind_of_network(tmp_path):
    unet = load_checkpoint(write_checkpoint(tmp_path / "u.pt", adm_unet()), image_size=8, num_heads=2)
    classifier = load_checkpoint(write_checkpoint(tmp_path / "c.pt", adm_classifier()), num_head_channels=32)
    with pytest.raises(CheckpointError, match="this checkpoint is a U-Net; a noise-conditioned classifier is needed"):
        unet.classifier()
    with pytest.raises(CheckpointError, match="this checkpoint is a classifier; a U-Net checkpoint is needed here"):
        classifier.unet()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("middle_block.1.qkv.bias"), "the file lacks middle_block.1.qkv.bias; it is incomplete"),
        (lambda s: s.pop("out.2.weight"), "the file lacks out.2.weight"),
        (lambda s: s.pop("input_blocks.1.0.in_layers.2.weight"), "the file lacks input_blocks.1.0.in_layers.2.weight"),
        (
            lambda s: s.update(extra=torch.ones(1)),
            "1 tensors do not belong to the network .*: extra; .*modified version",
        ),
        (lambda s: s.update({"input_blocks.first.weight": torch.ones(1)}), "do not belong .*input_blocks.first.weight"),
        (
            lambda s: s.update({"time_embed.0.bias": torch.ones(3)}),
            r"time.linear1.bias needs shape \(128,\), got \(3,\)",
        ),
        (
            lambda s: s.update({"input_blocks.1.0.out_layers.3.weight": torch.ones(32, 32, 5, 5)}),
            r"needs shape \(32, 32, 3, 3\), got \(32, 32, 5, 5\)",
        ),
        (
            lambda s: s.update({"input_blocks.3.0.skip_connection.weight": torch.ones(64, 32, 3, 3)}),
            r"input_blocks.3.0 has a 3x3 skip convolution \(use_conv\)",
        ),
        (lambda s: s["out.2.bias"].fill_(float("nan")), r"holds 1 NaN or infinite values of 1; the training diverged"),
        (lambda s: s["out.0.bias"].__setitem__(3, -torch.inf), r"holds 1 NaN or infinite values of 32"),
    ],
    ids=["no bias", "no head", "no conv", "extra", "no number", "short bias", "kernel", "use_conv", "NaN", "inf"],
)
def test_files_that_are_not_whole(tmp_path, change, message):
    state = openai_state(adm_unet())
    change(state)
    torch.save(state, tmp_path / "ema.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "ema.pt", image_size=8, num_heads=2)


def test_a_pool_that_is_not_supported(tmp_path):
    state = openai_state(adm_classifier(attention_pool=False))
    state = {key: value for key, value in state.items() if not key.startswith("out.")}
    state |= {
        "out.0.weight": torch.ones(2048, 96),
        "out.0.bias": torch.ones(2048),
        "out.2.weight": torch.ones(10, 2048),
    }
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match='pools in the "spatial" way; "attention" and "adaptive" are supported'):
        load_checkpoint(tmp_path / "c.pt", image_size=8, num_head_channels=32)


@settings(max_examples=15)
@given(unets())
def test_configs_survive_json(config):
    assert decode(encode(config), c.UNetConfig) == config


def test_a_config_that_contradicts_itself():
    config = adm_unet()
    for blocks, message in (
        (config.blocks[1:], "takes 32 channels, got 1"),
        (config.blocks[:-1], "ends with 32 channels and 0 unused skip connections; expected 1 and none"),
        ((c.Pop(), *config.blocks), "block 0 takes a skip connection and none is left"),
        ((*config.blocks, c.Push()), "1 unused skip connections"),
        ((*config.blocks[:2], c.ResBlock(32, 40, True), *config.blocks[3:]), "takes 32 channels, got 40"),
        (
            (*config.blocks[:-2], c.NormSiLU(32, groups=5), config.blocks[-1]),
            "32 channels cannot be split into 5 groups",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, blocks=blocks)
