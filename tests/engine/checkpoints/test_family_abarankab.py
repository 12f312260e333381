"""abarankab/DDPM: every option of its U-Net against a reference forward pass, and what its translator says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from chain_reference import ABARANKAB, Arguments, angles, make_network, run_network
from exported import FP32_OTHER_LIBRARY, assert_exports, call, network_inputs
from helpers import FP32_OTHER_ORDER, adm_unet
from torch import Tensor

from engine.backends.registry import open_backend
from engine.checkpoints.facts import make_facts
from engine.checkpoints.families import abarankab
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.prediction import Prediction, Variance
from engine.diffusion.schedule import cosine_schedule
from engine.errors import CheckpointError, ConfigError
from engine.networks.config import Norm, ResBlock, UNetConfig
from engine.networks.inputs import Inputs
from engine.sampling.sampler import Sampler
from export.precision import Precision
from export.to_onnx import export_bundle

PLAIN = Arguments(ABARANKAB)
FACTS: dict[str, Any] = {"image_size": (8, 8), "num_groups": 4}


def content(arguments: Arguments, betas: Any = None, device: str = "cpu") -> dict[str, Tensor]:
    """A diffusion object's state dict: raw weights of seed 1, averaged ones of seed 2, float32 buffers."""
    betas = np.linspace(0.005, 0.4, 20) if betas is None else betas
    abar = np.cumprod(1 - betas)
    buffers = {
        "betas": betas,
        "alphas": 1 - betas,
        "alphas_cumprod": abar,
        "sqrt_alphas_cumprod": np.sqrt(abar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - abar),
        "reciprocal_sqrt_alphas": np.sqrt(1 / (1 - betas)),
        "remove_noise_coeff": betas / np.sqrt(1 - abar),
        "sigma": np.sqrt(betas),
    }
    state = {name: torch.tensor(value, dtype=torch.float32) for name, value in buffers.items()}
    for seed, prefix in enumerate(("model", "ema_model"), start=1):
        state |= {f"{prefix}.{name}": value for name, value in make_network(arguments, seed, device).items()}
    return state


def load(folder: Path, state: dict[str, Tensor], **facts: Any) -> Checkpoint:
    torch.save(state, folder / "model.pth")
    return load_checkpoint(folder / "model.pth", **FACTS | facts)


def compare(checkpoint: Checkpoint, arguments: Arguments, seed: int) -> None:
    """The checkpoint's network against the reference with the weights of a seed."""
    size = checkpoint.config.image_size
    x, t = torch.randn(2, arguments.channels, *size, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 17])
    y = None if arguments.classes is None else torch.tensor([0, arguments.classes - 1])
    angle = angles(t * arguments.time_scale, arguments.base)
    embedding = torch.cat([angle.sin(), angle.cos()], 1).float()
    expected = run_network(make_network(arguments, seed), arguments, embedding, x, y)
    with torch.inference_mode():
        got = checkpoint.unet()(x, t.float(), y)
    torch.testing.assert_close(got, expected, rtol=FP32_OTHER_ORDER, atol=FP32_OTHER_ORDER)


OPTIONS: dict[str, tuple[Arguments, dict[str, Any]]] = {
    "relu": (replace(PLAIN, activation=F.relu), {"activation": "relu"}),
    "mish": (replace(PLAIN, activation=F.mish), {"activation": "mish"}),
    "instance norm": (replace(PLAIN, norm="in"), {"norm": "instance"}),
    "batch norm": (replace(PLAIN, norm="bn"), {}),
    "batch norm, said": (replace(PLAIN, norm="bn", activation=F.relu), {"norm": "batch", "activation": "relu"}),
    "no norm": (replace(PLAIN, norm=None), {}),
    "time scale": (replace(PLAIN, time_scale=0.25), {"time_scale": 0.25}),
    "padding": (replace(PLAIN, pad=2), {"initial_pad": 2, "image_size": (12, 4)}),
    "classes": (replace(PLAIN, classes=3, activation=F.mish), {"activation": "mish"}),
    "no time": (replace(PLAIN, time_dim=None), {}),
    "no time, classes": (replace(PLAIN, time_dim=None, classes=3), {}),
    "one level": (replace(PLAIN, mults=(1,), attention=(), channels=1), {}),
    "three levels": (replace(PLAIN, mults=(2, 1, 3), depth=2, attention=(0, 2)), {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_of_the_network(tmp_path: Path, name: str) -> None:
    arguments, facts = OPTIONS[name]
    compare(load(tmp_path, content(arguments), **facts), arguments, seed=2)


def test_instance_norm_without_weights(tmp_path: Path) -> None:
    arguments = replace(PLAIN, norm="in")
    state = {name: value for name, value in content(arguments).items() if "norm" not in name}
    unit = load(tmp_path, state, norm="instance")
    with_ones = {n: torch.ones_like(v) if n.endswith("weight") else 0 * v for n, v in content(arguments).items()}
    compared = load(tmp_path, {n: state.get(n, v) for n, v in with_ones.items()}, norm="instance")
    for name, value in compared.weights.items():
        assert torch.equal(unit.weights[name], value), name


def test_averaged_weights_unless_raw_ones_are_asked_for(tmp_path: Path) -> None:
    state = content(PLAIN)
    compare(load(tmp_path, state, weights="raw"), PLAIN, seed=1)
    compare(load(tmp_path, state, weights="ema"), PLAIN, seed=2)
    raw_only = {name: value for name, value in state.items() if not name.startswith("ema_model.")}
    checkpoint = load(tmp_path, raw_only)
    compare(checkpoint, PLAIN, seed=1)
    assert "weights = raw (the file has no averaged weights" in "\n".join(map(str, checkpoint.assumptions))
    with pytest.raises(CheckpointError, match="no averaged weights; give --weights raw"):
        load(tmp_path, raw_only, weights="ema")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_stand_for_the_same_schedule(tmp_path: Path, dtype: torch.dtype) -> None:
    state = content(PLAIN, np.linspace(1e-4, 0.02, 1000))
    halved = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
    checkpoint = load(tmp_path, halved)
    np.testing.assert_array_equal(checkpoint.diffusion.schedule.betas, np.linspace(1e-4, 0.02, 1000))
    assert all(value.dtype == torch.float32 for value in checkpoint.weights.values())


ODD_BETAS = np.array([0.001, 0.05, 0.02, 0.3])


@pytest.mark.parametrize(
    ("betas", "expected"),
    [
        (np.linspace(1e-4, 0.02, 1000), np.linspace(1e-4, 0.02, 1000)),
        (np.linspace(1e-4 / 0.3, 0.02 / 0.3, 300), np.linspace(1e-4 / 0.3, 0.02 / 0.3, 300)),
        (np.linspace(3e-4, 0.015, 77), np.linspace(3e-4, 0.015, 77)),
        (cosine_schedule(200).betas, cosine_schedule(200).betas),
        (ODD_BETAS, ODD_BETAS.astype(np.float32).astype(np.float64)),
        (np.array([0.01]), np.array([0.01])),
    ],
    ids=["linear", "scaled linear", "other ends", "cosine", "none", "one step"],
)
def test_schedule_is_what_its_float32_betas_were_rounded_from(tmp_path: Path, betas: Any, expected: Any) -> None:
    schedule = load(tmp_path, content(PLAIN, betas)).diffusion.schedule
    np.testing.assert_allclose(schedule.betas, expected, rtol=1e-15)


def test_conventions_and_assumptions(tmp_path: Path) -> None:
    torch.save(content(replace(PLAIN, base=32)), tmp_path / "model.pth")
    checkpoint = load_checkpoint(tmp_path / "model.pth")
    assert checkpoint.family == "abarankab"
    assert checkpoint.config.image_size == (32, 32)
    assert checkpoint.diffusion.clip is None
    assert checkpoint.diffusion.variance is Variance.FIXED_LARGE
    assert checkpoint.diffusion.prediction is Prediction.EPS
    made = {a.name for a in checkpoint.assumptions}
    assert made == {"initial_pad", "activation", "norm", "num_groups", "image_size", "time_scale", "clip_denoised"}


def test_default_cifar10_network_is_inferred_from_shapes() -> None:
    arguments = Arguments(ABARANKAB, base=128, mults=(1, 2, 2, 2), depth=2, attention=(1,), time_dim=512)
    config = abarankab.translate(content(arguments, device="meta"), make_facts({})).config
    expected = adm_unet(
        channels=3, size=(32, 32), width=128, mult=(1, 2, 2, 2), depth=2, attention=(1,), heads=1, scale_shift=False
    )
    assert config.blocks == expected.blocks
    assert (config.time.embed_channels, config.time.channels) == (128, 512)


def test_batch_norm_is_folded() -> None:
    config = abarankab.translate(content(replace(PLAIN, norm="bn")), make_facts(FACTS)).config
    assert {block.norm for block in config.blocks if isinstance(block, ResBlock)} == {Norm.AFFINE}


def refused(state: dict[str, Tensor], **facts: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        abarankab.translate(state, make_facts(FACTS | facts))
    return str(caught.value)


def test_what_does_not_fit_is_refused() -> None:
    state = content(PLAIN)
    assert "cannot have 32 groups; give the training's number with --num-groups" in refused(state, num_groups=32)
    assert "group or instance by their tensors, and --norm says batch" in refused(state, norm="batch")
    assert "20 betas, and --num-train-timesteps says 30" in refused(state, num_train_timesteps=30)
    assert "mystery is no buffer of this project" in refused(state | {"mystery": torch.zeros(1)})
    assert "extra.weight" in refused(state | {"ema_model.extra.weight": torch.zeros(1)})
    assert "ups.0 is no ResBlock" in refused({n: v for n, v in state.items() if ".ups.0.conv_1" not in n})
    assert "lacks mid.1.norm_2.bias" in refused({n: v for n, v in state.items() if "mid.1.norm_2.bias" not in n})
    # Of a network that sees the timestep, every block does.
    assert "lacks time_mlp.1.weight" in refused({n: v for n, v in state.items() if ".time_mlp.1.weight" not in n})
    assert "lacks mid.1.time_bias.bias" in refused({n: v for n, v in state.items() if "mid.1.time_bias.bias" not in n})
    assert ".time_bias." in refused({n: v for n, v in state.items() if ".time_mlp." not in n})
    blind = content(replace(PLAIN, time_dim=None))
    assert "made with time_emb_dim None), and --time-scale says 2.0; leave it out" in refused(blind, time_scale=2.0)
    labelled = content(replace(PLAIN, time_dim=None, classes=3))
    assert "lacks mid.1.class_bias" in refused({n: v for n, v in labelled.items() if "mid.1.class_bias" not in n})


def test_export(tmp_path: Path) -> None:
    arguments = replace(PLAIN, classes=3, norm="in", activation=F.mish, pad=2)
    facts = {"norm": "instance", "activation": "mish", "initial_pad": 2, "image_size": (12, 4)}
    assert_exports(load(tmp_path, content(arguments), **facts), tmp_path)


@pytest.mark.parametrize("classes", [None, 3])
def test_network_without_time(tmp_path: Path, classes: int | None) -> None:
    """Nothing of it depends on the timestep, which its ONNX file has no input for, and every backend agrees."""
    arguments = replace(PLAIN, time_dim=None, classes=classes)
    checkpoint = load(tmp_path, content(arguments))
    config = checkpoint.config
    assert isinstance(config, UNetConfig)
    assert config.time is None
    assert config.projection_channels == (() if classes is None else (8, 16, 16, 16, 16, 16, 8, 8))
    assert {name.split(".")[0] for name in checkpoint.weights} == (
        {"blocks"} if classes is None else {"blocks", "time"}
    )
    assert "time_scale" not in {assumption.name for assumption in checkpoint.assumptions}
    bundle = export_bundle(checkpoint, tmp_path / "net.engine", precision=Precision.FP16)
    graph = onnx.load(bundle.path / "unet.onnx").graph
    assert [value.name for value in graph.input] == ["x_t", *([] if classes is None else ["label"])]
    inputs = network_inputs(config, 3, 20)
    with torch.inference_mode():
        wanted = checkpoint.unet()(**inputs.tensors())
    for name, precision, limit in (
        ("eager", "fp32", FP32_OTHER_ORDER),
        ("ort", "fp32", FP32_OTHER_LIBRARY),
        ("ort", "fp16", 1e-2),
        ("ov", "fp32", FP32_OTHER_LIBRARY),
        ("native", "fp32", FP32_OTHER_LIBRARY),
    ):
        backend = open_backend(bundle, name, precision, threads=1)
        got = call(backend, inputs)
        assert torch.equal(got, call(backend, Inputs(inputs.x_t, inputs.timestep + 1, inputs.conditions)))
        assert float((got - wanted).abs().max()) <= limit * float(wanted.abs().max()), (name, precision)
        images = Sampler(backend).sample(2, steps=3, seed=1)
        assert bool(torch.isfinite(images).all())
        backend.close()


def test_config_without_time_that_contradicts_itself() -> None:
    config = abarankab.translate(content(replace(PLAIN, time_dim=None, classes=3)), make_facts(FACTS)).config
    assert isinstance(config, UNetConfig)
    with pytest.raises(ConfigError, match="labels are added to the time embedding, and the network has none"):
        replace(config, label_projection=False)
    with pytest.raises(ConfigError, match="blocks take a projection of the timestep or a label, and the network sees"):
        replace(config, num_classes=None, label_projection=False)
    with pytest.raises(ConfigError, match="the network has no table of labels"):
        replace(config, num_classes=None)
