"""denoising-diffusion-pytorch: old releases against a reference, the newest against the installed package."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from exported import assert_exports
from helpers import FP32_OTHER_ORDER
from hypothesis import given, settings
from hypothesis import strategies as st
from lucidrains_reference import Arguments, make_network, run_network
from torch import Tensor

from engine.backends.eager.eager_backend import EagerBackend
from engine.checkpoints.families.lucidrains import find_objective
from engine.checkpoints.families.lucidrains_layout import Release
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.continuous import LogSnr, MonotoneNet, time_slices
from engine.diffusion.guidance import ClassifierFreeGuidance
from engine.diffusion.ladder import visited_timesteps
from engine.diffusion.prediction import Diffusion, Prediction, Spacing, Variance
from engine.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule, named_schedule, sigmoid_schedule
from engine.diffusion.solvers import ddim_table, ddpm_table
from engine.errors import CheckpointError, ConfigError, RequestError
from engine.json_form import decode, encode
from engine.sampling.likelihood import variational_bound
from engine.sampling.sampler import Sampler

SIZE = (8, 8)
OLD = Arguments((1, 7, 7))


def buffers(betas: np.ndarray, loss_weight: np.ndarray | None = None, name: str = "loss_weight") -> dict[str, Tensor]:
    """The schedule as the project stores it; other buffers than these follow from it."""
    abar = np.cumprod(1 - betas)
    values = {"betas": betas, "alphas_cumprod": abar, name: np.ones_like(betas) if loss_weight is None else loss_weight}
    return {key: torch.tensor(value, dtype=torch.float32) for key, value in values.items()}


def old_file(
    folder: Path, arguments: Arguments, *, has_version: bool = True, schedule: dict[str, Tensor] | None = None
) -> Path:
    """A Trainer's file with raw weights of seed 1 and averaged ones of seed 2."""
    kept = buffers(linear_schedule(40).betas) if schedule is None else schedule
    raw, ema = (
        kept | {f"model.{name}": value for name, value in make_network(arguments, seed).items()} for seed in (1, 2)
    )
    averaging = {f"ema_model.{name}": value for name, value in ema.items()} | {"initted": torch.tensor(True)}
    averaging |= {f"online_model.{name}": value for name, value in raw.items()} | {"step": torch.tensor(7)}
    content = {"step": 7, "model": raw, "opt": {}, "ema": averaging, "scaler": None}
    if has_version:
        content["version"] = ".".join(map(str, arguments.version))
    torch.save(content, folder / "model-1.pt")
    return folder / "model-1.pt"


def load_old(folder: Path, arguments: Arguments = OLD, **facts: Any) -> Checkpoint:
    return load_checkpoint(
        old_file(folder, arguments, has_version=arguments.version >= (1, 0, 0)),
        **{"image_size": SIZE, "num_groups": arguments.groups} | facts,
    )


def compare_old(checkpoint: Checkpoint, arguments: Arguments, seed: int = 2) -> None:
    rng = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, arguments.channels, *SIZE, generator=rng), torch.tensor([3, 17])
    cond = torch.randn(x.shape, generator=rng) if arguments.self_condition else None
    expected = run_network(make_network(arguments, seed), arguments, x, t, cond)
    with torch.inference_mode():
        got = checkpoint.unet()(x, t.float(), None, cond)
    torch.testing.assert_close(got, expected, rtol=FP32_OTHER_ORDER, atol=FP32_OTHER_ORDER)


OLD_RELEASES = {
    "0.27": (Arguments((0, 27, 12)), {"release": "0.27"}),
    "0.28": (Arguments((0, 28, 0), self_condition=True), {"release": "0.28"}),
    "0.32": (Arguments((0, 32, 0)), {}),
    "1.6": (Arguments((1, 6, 4), groups=2, mults=(2, 1, 3), heads=(4,) * 3, dim_head=(32,) * 3, full=(False,) * 3), {}),
    "1.7.0": (Arguments((1, 7, 0)), {}),
    "1.7.2": (Arguments((1, 7, 2)), {}),
    "1.7.4": (Arguments((1, 7, 4), channels=1), {}),
    "1.8": (
        Arguments((1, 8, 15), heads=(2, 8), dim_head=(16, 4), full=(True, False), theta=500.0),
        {"level_heads": (2, 8), "time_theta": 500},
    ),
    "1.8, channels a head": (Arguments((1, 8, 15), dim_head=(8, 8), full=(False, True)), {"num_head_channels": 8}),
}


@pytest.mark.parametrize("name", OLD_RELEASES)
def test_old_release(tmp_path: Path, name: str) -> None:
    arguments, facts = OLD_RELEASES[name]
    compare_old(load_old(tmp_path, arguments, **facts), arguments)


def test_averaged_weights_unless_raw_ones_are_asked_for(tmp_path: Path) -> None:
    compare_old(load_old(tmp_path, weights="raw"), OLD, seed=1)


@pytest.mark.parametrize("prefix", ["", "model.", "ema_model.model."])
def test_bare_state_dicts(tmp_path: Path, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in make_network(OLD, 2).items()}
    torch.save(state, tmp_path / "net.pt")
    checkpoint = load_checkpoint(tmp_path / "net.pt", image_size=SIZE, num_groups=OLD.groups, prediction="x0")
    compare_old(checkpoint, OLD)
    made = {a.name for a in checkpoint.assumptions}
    assert {"release", "num_train_timesteps", "noise_schedule", "num_heads", "auto_normalize"} <= made
    np.testing.assert_array_equal(checkpoint.diffusion.schedule.betas, sigmoid_schedule(1000).betas)
    assert checkpoint.diffusion.prediction is Prediction.X0


def test_what_releases_before_1_0_leave_open(tmp_path: Path) -> None:
    checkpoint = load_old(tmp_path, Arguments((0, 27, 12)))
    compare_old(checkpoint, Arguments((0, 27, 12)))
    assert "release = 0.27 (without a version entry" in "\n".join(map(str, checkpoint.assumptions))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(tmp_path: Path, dtype: torch.dtype) -> None:
    schedule = sigmoid_schedule(100)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    path = old_file(tmp_path, OLD, schedule=buffers(schedule.betas, snr / (snr + 1)))
    content = torch.load(path, weights_only=True)
    content["ema"] = {n: v.to(dtype) if v.is_floating_point() else v for n, v in content["ema"].items()}
    torch.save(content, path)
    checkpoint = load_checkpoint(path, image_size=SIZE, num_groups=4)
    np.testing.assert_array_equal(checkpoint.diffusion.schedule.betas, schedule.betas)
    assert checkpoint.diffusion.prediction is Prediction.V
    assert all(value.dtype == torch.float32 for value in checkpoint.weights.values())


TRAITS = {
    "0.27.12": (True, True, True, True),
    "0.28": (True, True, False, True),
    "1.4.1": (True, True, False, True),
    "1.4.2": (True, True, False, False),
    "1.6.4": (True, True, False, False),
    "1.7.1": (True, True, False, False),
    "1.7.3": (False, True, False, False),
    "1.7.4": (False, False, False, False),
    "2.3.4": (False, False, False, False),
}


@pytest.mark.parametrize("version", TRAITS)
def test_traits_of_releases(version: str) -> None:
    traits = Release.of(version)
    got = (traits.standardises_weights, traits.divides_values, traits.normalises_over_pixels, traits.keeps_eps)
    assert got == TRAITS[version]


WRONG_FACTS: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"release": "1.6"}, r"written by version 1\.7\.7, --release says 1\.6"),
    "unreadable version": ({"release": "latest"}, "cannot read 'latest' as a version"),
    "image size": ({"image_size": None}, r"give it with --image-size HxW \(a multiple of 2"),
    "groups": ({"num_groups": 3}, "8 channels cannot have 3 groups"),
    "heads": ({"num_heads": 5}, "128 channels, which 5 heads of 25 do not make"),
    "levels": ({"level_heads": (1, 2, 3)}, "level_heads has 3 numbers and the network 2 levels"),
    "schedule": ({"noise_schedule": "cosine"}, "are not the cosine schedule's"),
    "length": ({"num_train_timesteps": 1000}, "the file has 40 betas, not 1000"),
    "objective": ({"prediction": "v"}, "of a network that predicts eps, --prediction says v"),
    "several": ({"level_heads": "1,x"}, "level_heads is '1,x'; expected whole numbers from 1 up, like 4,4,8"),
}


@pytest.mark.parametrize("name", WRONG_FACTS)
def test_facts_that_contradict_the_file(tmp_path: Path, name: str) -> None:
    facts, message = WRONG_FACTS[name]
    with pytest.raises(CheckpointError, match=message):
        load_old(tmp_path, **facts)


def test_networks_that_are_not_supported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="takes 3 channels and gives 8; .* Weighted objectives"):
        load_old(tmp_path, replace(OLD, out_channels=8))
    with pytest.raises(CheckpointError, match="has 64 channels, which are not the default 4 heads of 32"):
        load_old(tmp_path, Arguments((1, 8, 0), dim_head=(16, 16)))
    state = {name: value[..., 0] if value.ndim == 4 else value for name, value in make_network(OLD, 1).items()}
    torch.save(state, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="only networks of images"):
        load_checkpoint(tmp_path / "net.pt", image_size=SIZE)
    extra = {f"model.{name}": value for name, value in make_network(OLD, 1).items()} | {"odd": torch.zeros(1)}
    torch.save(extra, tmp_path / "net.pt")
    with pytest.raises(CheckpointError, match="1 tensors do not belong .* odd"):
        load_checkpoint(tmp_path / "net.pt", image_size=SIZE, num_groups=4)


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("objective", list(Prediction)[:3])
@pytest.mark.parametrize("limits", [(0.0, np.inf), (0.0, 5.0), (5.0, np.inf)])
def test_objective_and_schedule_come_from_the_buffers(
    tmp_path: Path, name: str, objective: Prediction, limits: tuple[float, float]
) -> None:
    schedule = named_schedule(name, 50)
    snr = schedule.alphas_cumprod / (1 - schedule.alphas_cumprod)
    factor = {Prediction.EPS: snr, Prediction.X0: np.ones_like(snr), Prediction.V: snr + 1}[objective]
    stored = buffers(schedule.betas, np.clip(snr, *limits) / factor)
    found = find_objective(stored["loss_weight"], schedule)
    assert found is not None
    assert found[0] is objective
    np.testing.assert_allclose(np.clip(snr, *found[1:]), np.clip(snr, *limits), rtol=1e-5)
    checkpoint = load_checkpoint(old_file(tmp_path, OLD, schedule=stored), image_size=SIZE, num_groups=4)
    assert checkpoint.diffusion.prediction is objective
    np.testing.assert_array_equal(checkpoint.diffusion.schedule.betas, schedule.betas)
    assert checkpoint.diffusion.spacing is Spacing.TRUNCATED
    assert checkpoint.diffusion.data_range == (0.0, 1.0)
    assert checkpoint.diffusion.keeps_eps is False


def test_loss_weights_that_tell_nothing(tmp_path: Path) -> None:
    betas = linear_schedule(40).betas
    odd = old_file(tmp_path, OLD, schedule=buffers(betas, np.linspace(1, 2, 40)))
    with pytest.raises(CheckpointError, match="fits no known objective; give --prediction"):
        load_checkpoint(odd, image_size=SIZE, num_groups=4)
    assert load_checkpoint(odd, image_size=SIZE, num_groups=4, prediction="v").diffusion.prediction is Prediction.V
    p2 = old_file(tmp_path, Arguments((1, 1, 0)), schedule=buffers(betas, name="p2_loss_weight"))
    checkpoint = load_checkpoint(p2, image_size=SIZE, num_groups=4, auto_normalize=False)
    assert "prediction = eps (the default of releases as old" in "\n".join(map(str, checkpoint.assumptions))
    assert checkpoint.diffusion.data_range == (-1.0, 1.0)
    assert checkpoint.diffusion.keeps_eps is True


def test_a_schedule_has_a_known_name() -> None:
    with pytest.raises(ConfigError, match="no discrete schedule named 'learned'; known: linear, cosine, sigmoid"):
        named_schedule("learned", 10)


# Continuous time ------------------------------------------------------------------------------------------------------

NET = MonotoneNet(0.7, 0.1, (0.5, 2.0), (0.3, 0.0), (0.2, 0.4), 0.05)
LOG_SNRS = [LogSnr("linear"), LogSnr("cosine"), LogSnr("learned", NET)]


def continuous(log_snr: LogSnr, prediction: Prediction = Prediction.EPS) -> Diffusion:
    slices = NoiseSchedule(time_slices(log_snr, 50).betas)
    return Diffusion(slices, prediction, Variance.FIXED_SMALL, log_snr=log_snr)


@pytest.mark.parametrize("log_snr", LOG_SNRS, ids=lambda s: s.name)
@pytest.mark.parametrize("count", [1, 12])
def test_rows_in_continuous_time(log_snr: LogSnr, count: int) -> None:
    """x_s = alpha_s ((1 - c) x_t / alpha_t + c x0) + sigma_s sqrt(c) z, c = 1 - snr_t / snr_s: VDM (2021), eq. 32."""
    table = ddpm_table(continuous(log_snr), count)
    values = log_snr(np.linspace(1.0, 0.0, count + 1))
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-values))), np.sqrt(1 / (1 + np.exp(values)))
    c = -np.expm1(values[:-1] - values[1:])
    np.testing.assert_allclose(table.timestep, values[:-1], rtol=1e-12)
    np.testing.assert_allclose(table.A, 1 / alpha[:-1], rtol=1e-9)
    np.testing.assert_allclose(table.B, -sigma[:-1] / alpha[:-1], rtol=1e-9)
    np.testing.assert_allclose(table.P, alpha[1:] * c, rtol=1e-9)
    np.testing.assert_allclose(table.Q, alpha[1:] * (1 - c) / alpha[:-1], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(np.exp(table.L0 / 2)[:-1], (sigma[1:] * np.sqrt(c))[:-1], rtol=1e-9)
    assert list(table.S) == [1.0] * (count - 1) + [0.0]


@pytest.mark.parametrize("log_snr", LOG_SNRS, ids=lambda s: s.name)
def test_log_snr_falls_and_survives_json(log_snr: LogSnr) -> None:
    t = np.linspace(0, 1, 101)
    assert np.all(np.diff(log_snr(t)) < 0)
    diffusion = decode(encode(continuous(log_snr, Prediction.V)), Diffusion)
    assert diffusion.log_snr == log_snr
    np.testing.assert_array_equal(ddim_table(diffusion, 7).P, ddim_table(continuous(log_snr, Prediction.V), 7).P)


def test_continuous_time_takes_a_count() -> None:
    for steps in ("ddim5", [1, 2], 0):
        with pytest.raises(RequestError, match="trained in continuous time; give a number of steps"):
            ddpm_table(continuous(LogSnr("linear")), steps)
    for name, net in (("learned", None), ("cosine", NET), ("odd", None)):
        with pytest.raises(ConfigError, match="no log-SNR schedule"):
            LogSnr(name, net)


# The installed package ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> ModuleType:
    """The package; a torchvision that is not installed is stood in for while it is imported."""
    pytest.importorskip("ema_pytorch")
    parts = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.utils")}
    parts["torchvision"].__dict__.update(transforms=parts["torchvision.transforms"], utils=parts["torchvision.utils"])
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name, module in parts.items():
                patch.setitem(sys.modules, name, module)
        package = pytest.importorskip("denoising_diffusion_pytorch")
        for name in ("classifier_free_guidance", "continuous_time_gaussian_diffusion", "learned_gaussian_diffusion"):
            importlib.import_module(f"denoising_diffusion_pytorch.{name}")
    return package


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Arguments of the package's constructors, and the facts that a file of theirs does not hold."""

    kind: str
    network: dict[str, Any]
    diffusion: dict[str, Any]
    facts: dict[str, Any]


@st.composite
def configurations(
    draw: st.DrawFn, kinds: tuple[str, ...] = ("plain", "learned", "classes", "time", "v-time")
) -> Drawn:
    kind = draw(st.sampled_from(kinds))
    levels = draw(st.integers(1, 3))
    some = {name: draw(st.sampled_from(values)) for name, values in {"size": (8, 12), "heads": (1, 4)}.items()}
    network: dict[str, Any] = {
        "dim": draw(st.sampled_from([4, 8])),
        "init_dim": draw(st.sampled_from([None, 6])),
        "dim_mults": tuple(draw(st.integers(1, 3)) for _ in range(levels)),
        "channels": draw(st.sampled_from([1, 3])),
    }
    diffusion: dict[str, Any] = {"image_size": some["size"]}
    facts: dict[str, Any] = {"image_size": some["size"]}
    if kind == "classes":
        network |= {"num_classes": draw(st.integers(1, 5)), "attn_heads": some["heads"], "attn_dim_head": 16}
        facts |= {"num_heads": some["heads"], "num_head_channels": 16}
    else:
        network["full_attn"] = (*(draw(st.booleans()) for _ in range(levels - 1)), True)
        network["attn_heads"] = tuple(draw(st.sampled_from([1, 2])) for _ in range(levels))
        network["attn_dim_head"] = tuple(draw(st.sampled_from([4, 8])) for _ in range(levels))
    if kind in ("time", "v-time"):
        network |= {draw(st.sampled_from(["learned_sinusoidal_cond", "random_fourier_features"])): True}
        network["learned_sinusoidal_dim"] = draw(st.sampled_from([4, 8]))
    elif kind != "classes":
        network["sinusoidal_pos_emb_theta"] = facts["time_theta"] = draw(st.sampled_from([10000, 300]))
    if kind == "time":
        diffusion["noise_schedule"] = facts["noise_schedule"] = draw(st.sampled_from(["linear", "cosine", "learned"]))
    elif kind == "v-time":
        facts["prediction"] = "v"
    else:
        schedules = ["linear", "cosine"] if kind == "classes" else ["linear", "cosine", "sigmoid"]
        diffusion |= {"timesteps": 30, "beta_schedule": draw(st.sampled_from(schedules))}
        diffusion["objective"] = draw(st.sampled_from(["pred_noise", "pred_x0", "pred_v"]))
        diffusion["min_snr_loss_weight"] = draw(st.booleans())
    if kind == "plain":
        network["self_condition"] = draw(st.booleans())
        diffusion["auto_normalize"] = facts["auto_normalize"] = draw(st.booleans())
    if kind == "learned":
        network["learned_variance"] = True
    return Drawn(kind, network, diffusion, facts)


def make_peer(drawn: Drawn, seed: int, folder: Path) -> tuple[Any, Any, Path]:
    """Their diffusion object, its averaged copy, and the file that their Trainer would write."""
    ema_pytorch = importlib.import_module("ema_pytorch")
    modules = {
        "plain": "denoising_diffusion_pytorch",
        "learned": "learned_gaussian_diffusion",
        "classes": "classifier_free_guidance",
        "time": "continuous_time_gaussian_diffusion",
        "v-time": "v_param_continuous_time_gaussian_diffusion",
    }
    names = {"learned": "Learned", "time": "ContinuousTime", "v-time": "VParamContinuousTime"}
    home = importlib.import_module(f"denoising_diffusion_pytorch.{modules[drawn.kind]}")
    nets = (
        home if drawn.kind == "classes" else importlib.import_module(f"denoising_diffusion_pytorch.{modules['plain']}")
    )
    torch.manual_seed(seed)
    network = nets.Unet(**drawn.network)
    arguments = drawn.diffusion | ({"channels": drawn.network["channels"]} if "time" in drawn.kind else {})
    diffusion = getattr(home, f"{names.get(drawn.kind, '')}GaussianDiffusion")(network, **arguments)
    averaging = ema_pytorch.EMA(diffusion)
    for model in (diffusion, averaging.ema_model):
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    content = {"step": 1, "model": diffusion.state_dict(), "opt": {}, "ema": averaging.state_dict(), "scaler": None}
    torch.save(content | {"version": importlib.metadata.version("denoising-diffusion-pytorch")}, folder / "model-1.pt")
    return diffusion.eval(), averaging.ema_model.eval(), folder / "model-1.pt"


def call_peer(drawn: Drawn, network: Any, x: Tensor, t: Tensor, y: Tensor, cond: Tensor) -> Tensor:
    if drawn.kind == "classes":
        null = drawn.network["num_classes"]
        with_class = network(x, t, y.clamp(max=null - 1), cond_drop_prob=0.0)
        return torch.where((y == null)[:, None, None, None], network(x, t, y * 0, cond_drop_prob=1.0), with_class)
    return network(x, t, cond) if drawn.network.get("self_condition") else network(x, t)


@settings(max_examples=12)
@given(drawn=configurations(), seed=st.integers(0, 2**16))
def test_forward_of_the_installed_package(
    peer: ModuleType, tmp_path_factory: pytest.TempPathFactory, drawn: Drawn, seed: int
) -> None:
    raw, averaged, path = make_peer(drawn, seed, tmp_path_factory.mktemp("peer"))
    x = torch.randn(3, drawn.network["channels"], *[drawn.diffusion["image_size"]] * 2)
    t = torch.tensor([-3.3, 0.1, 5.0]) if "time" in drawn.kind else torch.tensor([0, 7, 29])
    y = torch.tensor([0, 1, 1]) * drawn.network.get("num_classes", 0)
    cond = torch.randn_like(x)
    for weights, model in (("ema", averaged), ("raw", raw)):
        checkpoint = load_checkpoint(path, weights=weights, **drawn.facts)
        config = checkpoint.config
        with torch.inference_mode():
            expected = call_peer(drawn, model.model, x, t, y, cond)
            got = checkpoint.unet()(
                x, t.float(), y if drawn.kind == "classes" else None, cond if config.cond_channels else None
            )
        limit = FP32_OTHER_ORDER * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got, expected, rtol=0, atol=limit)
        if drawn.kind in ("plain", "classes"):
            assert (
                checkpoint.diffusion.prediction.value
                == {
                    "pred_noise": "eps",
                    "pred_x0": "x0",
                    "pred_v": "v",
                }[drawn.diffusion["objective"]]
            )


@pytest.mark.parametrize("name", ["linear", "cosine", "learned"])
def test_log_snr_of_the_installed_package(peer: ModuleType, tmp_path: Path, name: str) -> None:
    network = {"dim": 4, "dim_mults": (1,), "learned_sinusoidal_cond": True, "channels": 1, "attn_heads": 1}
    drawn = Drawn("time", network, {"image_size": 4, "noise_schedule": name}, {"image_size": 4})
    raw, _, path = make_peer(drawn, 0, tmp_path)
    said = {} if name == "learned" else {"noise_schedule": name}
    diffusion = load_checkpoint(path, image_size=4, weights="raw", **said).diffusion
    t = torch.linspace(0, 1, 21)
    assert diffusion.log_snr is not None
    # The original's float32 loses digits in 1 - cos^2 near t = 0.
    np.testing.assert_allclose(diffusion.log_snr(t.double().numpy()), raw.log_snr(t).detach().numpy(), atol=2e-3)
    if name == "learned":
        with pytest.raises(CheckpointError, match="holds a learned schedule"):
            load_checkpoint(path, image_size=4, noise_schedule="linear")
    else:
        for wrong, message in (("learned", "holds no learned schedule"), ("sigmoid", "no sigmoid schedule")):
            with pytest.raises(CheckpointError, match=message):
                load_checkpoint(path, image_size=4, noise_schedule=wrong)


@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_schedules_and_spacing_of_the_installed_package(peer: ModuleType, steps: int) -> None:
    module = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    np.testing.assert_allclose(sigmoid_schedule(steps).betas, module.sigmoid_beta_schedule(steps).numpy(), rtol=1e-10)
    np.testing.assert_allclose(cosine_schedule(steps).betas, module.cosine_beta_schedule(steps).numpy(), rtol=1e-9)
    diffusion = Diffusion(cosine_schedule(steps), spacing=Spacing.TRUNCATED)
    for count in range(1, steps, 7):
        expected = torch.linspace(-1, steps - 1, steps=count + 1).int().tolist()[1:]
        assert visited_timesteps(diffusion, count).tolist() == expected


def test_self_conditioning_of_the_installed_package(peer: ModuleType, tmp_path: Path) -> None:
    """The slots give the network the x0 of the step before, clipped: DDIM without noise as their sampler runs it."""
    network = {"dim": 4, "dim_mults": (1, 2), "channels": 1, "self_condition": True, "attn_heads": 1}
    arguments = {"image_size": 8, "timesteps": 30, "sampling_timesteps": 7, "beta_schedule": "cosine"}
    _, averaged, path = make_peer(Drawn("plain", network, arguments, {}), 0, tmp_path)
    torch.manual_seed(5)
    expected = averaged.ddim_sample((2, 1, 8, 8))
    torch.manual_seed(5)
    start = torch.randn(2, 1, 8, 8)
    checkpoint = load_checkpoint(path, image_size=8)
    images = Sampler(EagerBackend.from_checkpoint(checkpoint)).sample(
        2, steps=7, noise=lambda seeds, _draws, _shape, _stream=0: start[list(seeds)].numpy()
    )
    torch.testing.assert_close((images + 1) / 2, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
def test_plus_plus_of_the_installed_package(peer: ModuleType, tmp_path: Path, objective: str) -> None:
    """CFG++ as its classifier-free sampler runs it, for each of the three things that a network may predict."""
    network = {"dim": 4, "dim_mults": (1, 2), "channels": 1, "num_classes": 3}
    arguments = {"image_size": 8, "timesteps": 30, "sampling_timesteps": 7, "objective": objective}
    arguments |= {"use_cfg_plus_plus": True, "ddim_sampling_eta": 0.0}
    _, averaged, path = make_peer(Drawn("classes", network, arguments, {}), 1, tmp_path)
    classes, scale, rescale = torch.tensor([2, 0]), 1.7, 0.4
    torch.manual_seed(6)
    expected = averaged.ddim_sample(classes, (2, 1, 8, 8), cond_scale=scale, rescaled_phi=rescale)
    torch.manual_seed(6)
    start = torch.randn(2, 1, 8, 8)
    checkpoint = load_checkpoint(path, image_size=8)
    images = Sampler(EagerBackend.from_checkpoint(checkpoint)).sample(
        2,
        steps=7,
        labels=classes.tolist(),
        guidance_scale=ClassifierFreeGuidance(scale, rescale, parallel=0.0, plus_plus=True),
        noise=lambda seeds, _draws, _shape, _stream=0: start[list(seeds)].numpy(),
    )
    torch.testing.assert_close((images + 1) / 2, expected.clamp(0, 1), rtol=0, atol=1e-4)


def test_continuous_time_has_no_bound(peer: ModuleType, tmp_path: Path) -> None:
    network = {"dim": 4, "dim_mults": (1,), "channels": 1, "learned_sinusoidal_cond": True, "attn_heads": 1}
    *_, path = make_peer(Drawn("time", network, {"image_size": 4}, {}), 0, tmp_path)
    backend = EagerBackend.from_checkpoint(load_checkpoint(path, image_size=4))
    assert torch.isfinite(Sampler(backend).sample(2, steps=4)).all()
    with pytest.raises(RequestError, match="trained in continuous time"):
        variational_bound(backend, torch.zeros(1, 1, 4, 4), 4)


# Export: one a layout -------------------------------------------------------------------------------------------------


def test_oldest_layout_exports(tmp_path: Path) -> None:
    assert_exports(load_old(tmp_path, Arguments((0, 27, 12), dim=4, groups=2)), tmp_path)


def test_newest_layout_exports(peer: ModuleType, tmp_path: Path) -> None:
    """Space to depth, memory keys, RMS norms and Fourier features of the log-SNR."""
    network = {"dim": 4, "dim_mults": (1, 2), "channels": 1, "attn_heads": 2, "learned_sinusoidal_cond": True}
    *_, path = make_peer(Drawn("time", network, {"image_size": 8}, {}), 0, tmp_path)
    checkpoint = load_checkpoint(path, image_size=8)
    assert checkpoint.diffusion.log_snr is not None
    few = replace(checkpoint.diffusion, schedule=time_slices(checkpoint.diffusion.log_snr, 10))
    assert_exports(replace(checkpoint, diffusion=few), tmp_path)


@pytest.mark.slow
def test_class_conditional_layout_exports(peer: ModuleType, tmp_path: Path) -> None:
    network = {"dim": 4, "dim_mults": (1,), "channels": 1, "num_classes": 3, "attn_heads": 1, "attn_dim_head": 32}
    *_, path = make_peer(Drawn("classes", network, {"image_size": 8, "timesteps": 30}, {}), 0, tmp_path)
    assert_exports(load_checkpoint(path, image_size=8, num_heads=1), tmp_path)
