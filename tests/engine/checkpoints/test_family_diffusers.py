"""diffusers folders against the installed library: networks, schedulers, and what a folder may hold."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from exported import assert_exports
from helpers import FP32_OTHER_ORDER, call_main
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.checkpoints.facts import Facts
from engine.checkpoints.families import diffusers as family
from engine.checkpoints.families.diffusers_options import Options
from engine.checkpoints.families.diffusers_schedule import read_scheduler
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.model_folder import FolderContent
from engine.checkpoints.types import Assumptions
from engine.diffusion.ladder import visited_timesteps
from engine.diffusion.noise import RecordedNoise
from engine.diffusion.prediction import Diffusion
from engine.diffusion.solvers import COLUMNS, StepTable, ddim_table, ddpm_table
from engine.errors import CheckpointError, ConfigError, RequestError
from engine.json_form import decode, encode
from engine.networks import config as c
from engine.networks.unet import UNet
from engine.sampling.sampler import Sampler
from kernels.reference import Coefficients, solver_update

diffusers = pytest.importorskip("diffusers")

# Ten steps of float64 sums in another order. A schedule of zero terminal SNR ends at 1e-17 instead of 0: its root.
FLOAT64_STEPS = 1e-7
# The library's betas are float32, and those of zero terminal SNR are differences of nearly equal numbers.
FLOAT32_BETAS = 1e-5

TINY: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
SKIP: dict[str, Any] = TINY | {
    "block_out_channels": [32, 32],
    "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
    "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
    "norm_num_groups": None,
    "time_embedding_type": "fourier",
}


def make_model(options: dict[str, Any], seed: int = 0) -> Any:
    """The library's network with random weights, norms too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = diffusers.UNet2DModel(**options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def make_folder(path: Any, options: dict[str, Any] | None = None, **config: Any) -> Any:
    """A model folder of TINY with changes; config: values put into config.json afterwards."""
    make_model(TINY | (options or {})).save_pretrained(path)
    if config:
        change_json(path / "config.json", **config)
    return path


def change_json(path: Any, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def call(model: Any, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Random inputs x_t, timestep and label, and the library's result."""
    rng, options = torch.Generator().manual_seed(seed), model.config
    size = options.sample_size if isinstance(options.sample_size, list | tuple) else (options.sample_size,) * 2
    inputs = {
        "x_t": torch.randn(3, options.in_channels, *size, generator=rng),
        "timestep": torch.tensor([1.0, 420.0, 999.0]),
    }
    if model.class_embedding is not None:
        inputs["label"] = torch.tensor([1, 2, 6])
        if options.class_embed_type == "identity":
            inputs["label"] = torch.randn(3, model.time_embedding.linear_2.out_features, generator=rng)
    with torch.inference_mode():
        return inputs, model(inputs["x_t"], inputs["timestep"].long(), inputs.get("label")).sample


def assert_same_network(model: Any, folder: Any, seed: int = 0, **facts: Any) -> None:
    inputs, expected = call(model, seed)
    with torch.inference_mode():
        got = load_checkpoint(folder, **facts).unet()(**inputs)
    assert float((got - expected).abs().max() / expected.abs().max()) < FP32_OTHER_ORDER


@st.composite
def networks(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a small UNet2DModel: every block type and every option that changes the function."""
    levels = draw(st.integers(1, 3))

    def some(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    def each(*values: Any) -> list[Any]:
        return [some(*values) for _ in range(levels)]

    channels = some(1, 3)
    options = {
        "sample_size": some(8, (8, 16)),
        "in_channels": channels,
        "out_channels": channels * some(1, 1, 2),
        "block_out_channels": each(8, 12, 16),
        "layers_per_block": some(1, 2),
        "down_block_types": each("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", "UNetResDownBlock2D"),
        "up_block_types": each("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "norm_num_groups": some(2, 4),
        "attn_norm_num_groups": some(None, 2),
        "attention_head_dim": some(None, 2, 4, 5, 8),
        "center_input_sample": some(False, True),
        "time_embedding_type": some("positional", "fourier", "learned"),
        "time_embedding_dim": some(None, 20),
        "num_train_timesteps": 1000,
        "freq_shift": some(0, 1),
        "flip_sin_to_cos": some(True, False),
        "mid_block_type": some("UNetMidBlock2D", None),
        "mid_block_scale_factor": some(1, 1.5),
        "add_attention": some(True, False),
        "downsample_padding": some(0, 1),
        "downsample_type": some("conv", "resnet"),
        "upsample_type": some("conv", "resnet"),
        "act_fn": some("silu", "swish", "mish", "gelu", "relu"),
        "norm_eps": some(1e-5, 1e-6),
        "resnet_time_scale_shift": some("default", "scale_shift"),
        "class_embed_type": some(None, "timestep", "identity"),
        "num_class_embeds": some(None, 7),
    }
    if draw(st.booleans()):
        options |= {
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": [32] * levels,
            "down_block_types": each("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": each("SkipUpBlock2D", "AttnSkipUpBlock2D"),
            "norm_num_groups": some(None, 4),
        }
    return options


@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(options=networks(), seed=st.integers(0, 99), safe=st.booleans())
def test_forward_is_the_library_s(tmp_path_factory, options, seed, safe):
    model = make_model(options, seed)
    folder = tmp_path_factory.mktemp("unet")
    model.save_pretrained(folder, safe_serialization=safe)
    assert_same_network(model, folder, seed)


@st.composite
def schedulers(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    def some(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    kind, steps = some("DDPMScheduler", "DDIMScheduler"), some(37, 100, 1000)
    schedules = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    options = {
        "num_train_timesteps": steps,
        "beta_schedule": some(*schedules, *(("sigmoid", "laplace") if kind == "DDPMScheduler" else ())),
        "beta_end": some(0.02, 0.012),
        "trained_betas": some(None, None, [round(beta, 6) for beta in np.linspace(0.001, 0.03, steps)]),
        "prediction_type": some("epsilon", "sample", "v_prediction"),
        "clip_sample": some(True, False),
        "clip_sample_range": some(1.0, 1.5),
        "thresholding": some(False, True),
        "dynamic_thresholding_ratio": some(0.995, 0.6, 1.0),
        "sample_max_value": some(1.0, 1.8, 50.0),
        "timestep_spacing": some("leading", "trailing", "linspace"),
        "steps_offset": some(0, 1),
    }
    if kind == "DDPMScheduler":
        options["variance_type"] = some("fixed_small", "fixed_small_log", "fixed_large", "learned_range")
    else:
        options["set_alpha_to_one"] = some(True, False)
    options["rescale_betas_zero_snr"] = options["prediction_type"] != "epsilon" and some(True, False)
    return kind, options


@settings(max_examples=60)
@given(scheduler=schedulers(), count=st.sampled_from([1, 2, 7, 10, 13, 33]), eta=st.sampled_from([0.0, 0.5, 1.0]))
def test_sampler_is_the_library_s(scheduler, count, eta):
    kind, options = scheduler
    theirs = getattr(diffusers, kind)(**options)
    diffusion = diffusion_of(json.loads(theirs.to_json_string()))
    assert np.abs(theirs.betas.double().numpy() - diffusion.schedule.betas).max() < FLOAT32_BETAS
    theirs.set_timesteps(count)
    visited = theirs.timesteps.numpy()
    assume(visited.min() >= 0)
    table = ddpm_table(diffusion, count) if kind == "DDPMScheduler" else ddim_table(diffusion, count, eta)
    np.testing.assert_array_equal(table.timestep, visited)
    in_float64(theirs, diffusion)
    x = mine = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    for index in range(count):
        x, mine = step_both(theirs, table, index, x, mine, eta)
        # Stretched to a zero terminal SNR, some of the library's own steps are 0 / 0.
        assume(bool(x.isfinite().all()))
        torch.testing.assert_close(mine, x, rtol=FLOAT64_STEPS, atol=FLOAT64_STEPS)


def diffusion_of(stored: dict[str, Any], **facts: Any) -> Diffusion:
    has_range = stored.get("variance_type") == "learned_range"
    return read_scheduler(Options(stored, "scheduler_config.json"), Assumptions(Facts(**facts)), has_range)


def in_float64(scheduler: Any, diffusion: Diffusion) -> None:
    """The library's own steps on our betas: it computes in the type of its schedule."""
    scheduler.betas = torch.from_numpy(diffusion.schedule.betas.copy())
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.ones((), dtype=torch.float64)
    if hasattr(scheduler, "final_alpha_cumprod"):
        is_one = scheduler.config.set_alpha_to_one
        scheduler.final_alpha_cumprod = scheduler.one if is_one else scheduler.alphas_cumprod[0]


def step_both(
    scheduler: Any, table: StepTable, index: int, x: Tensor, mine: Tensor, eta: float
) -> tuple[Tensor, Tensor]:
    """One step of the library and of the table with the same network result and noise."""
    rng = torch.Generator().manual_seed(1000 + index)
    channels = 2 if getattr(scheduler, "variance_type", None) == "learned_range" else 1
    out = torch.randn(2, channels, 4, 4, dtype=torch.float64, generator=rng)
    z = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=rng)
    timestep = scheduler.timesteps[index]
    if isinstance(scheduler, diffusers.DDPMScheduler):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *args, **named: z)
            theirs = scheduler.step(out, timestep, x).prev_sample
    else:
        noise = z if eta > 0 else None
        theirs = scheduler.step(out, int(timestep), x, eta=eta, variance_noise=noise).prev_sample
    row = torch.from_numpy(table.to_array())[index]
    of_row = {name: value.expand(2, 1, 1, 1) for name, value in zip(COLUMNS, row, strict=True)}
    columns = {field.name: of_row[field.name] for field in dataclasses.fields(Coefficients)}
    return theirs, solver_update(Coefficients(**columns), mine, out, noise=z)[0]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_step_count_visits_the_library_s_timesteps(spacing):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing)
    diffusion = diffusion_of(json.loads(theirs.to_json_string()))
    for count in range(1, 1001):
        theirs.set_timesteps(count)
        expected = theirs.timesteps.numpy()[::-1]
        got = visited_timesteps(diffusion, count)
        # The library's trailing spacing sometimes rounds to one entry too many, timestep -1.
        np.testing.assert_array_equal(got, expected[expected >= 0])
        assert len(got) == count


def test_the_library_s_eps_and_last_noise():
    plain = diffusion_of({"timestep_spacing": "trailing", "variance_type": "fixed_large"})
    table = ddpm_table(plain, 10)
    assert (table.timestep[-1], table.S[-1]) == (99, 1)
    assert table.L0[-1] == pytest.approx(np.log(1 - plain.schedule.alphas_cumprod[99]))
    assert ddpm_table(diffusion_of({}), 10).S[-1] == 0
    # Classifier-free of any clip both forms of eps are one; with it the E column carries the network's own.
    assert np.all(ddim_table(plain, 10).E[:-1] != 0)


class TestFiles:
    """What a folder may hold, and what is refused."""

    def test_pipeline_folder(self, tmp_path):
        model = make_model(TINY | {"num_class_embeds": 7})
        scheduler = diffusers.DDIMScheduler(prediction_type="sample", clip_sample_range=2.0, steps_offset=1)
        diffusers.DDPMPipeline(model, scheduler).save_pretrained(tmp_path)
        assert_same_network(model, tmp_path)
        checkpoint = load_checkpoint(tmp_path)
        assert checkpoint.family == "diffusers"
        assert [a.name for a in checkpoint.assumptions] == ["null_class"]
        assert (checkpoint.diffusion.clip, checkpoint.diffusion.prediction.value) == (2.0, "x0")
        assert "diffusers U-Net" in call_main("info", tmp_path).out
        # The same pipeline as the first releases stored it: all files in one folder.
        for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"):
            shutil.move(tmp_path / name, tmp_path / os.path.basename(name))
        assert load_checkpoint(tmp_path).diffusion.clip == 2.0

    @pytest.mark.parametrize("safe", [True, False])
    def test_shards_and_variants(self, tmp_path, safe):
        model = make_model(TINY)
        model.save_pretrained(tmp_path / "shards", safe_serialization=safe, max_shard_size="20KB")
        assert len(list((tmp_path / "shards").iterdir())) > 3
        assert_same_network(model, tmp_path / "shards")
        model.save_pretrained(tmp_path / "fp16", safe_serialization=safe, variant="fp16")
        assert_same_network(model, tmp_path / "fp16")
        model.save_pretrained(tmp_path / "both", safe_serialization=safe, variant="fp16", max_shard_size="20KB")
        assert_same_network(model, tmp_path / "both")
        model.save_pretrained(tmp_path / "both", safe_serialization=safe, variant="bf16")
        with pytest.raises(CheckpointError, match=r"holds the variants bf16, fp16 and no plain diffusion_pytorch_mod"):
            load_checkpoint(tmp_path / "both")
        make_model(TINY, 1).save_pretrained(tmp_path / "both", safe_serialization=safe)
        assert_same_network(make_model(TINY, 1), tmp_path / "both")

    def test_averaged_and_raw_weights(self, tmp_path):
        raw, ema = make_model(TINY, 1), make_model(TINY, 2)
        raw.save_pretrained(tmp_path / "unet")
        with pytest.raises(CheckpointError, match="holds one set of weights, not averaged and raw ones"):
            load_checkpoint(tmp_path, weights="raw")
        ema.save_pretrained(tmp_path / "unet_ema")
        change_json(tmp_path / "unet_ema" / "config.json", decay=0.999, optimization_step=500, min_decay=0.1)
        assert_same_network(ema, tmp_path)
        assert_same_network(raw, tmp_path, weights="raw")
        raw.save_pretrained(tmp_path / "unet_ema", variant="non_ema")
        shutil.move(tmp_path / "unet_ema", tmp_path / "model")
        assert_same_network(ema, tmp_path / "model")
        assert_same_network(raw, tmp_path / "model", weights="raw")

    def test_old_names(self, tmp_path):
        options = TINY | {"down_block_types": ["AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D"]}
        model = make_model(options)
        model.save_pretrained(tmp_path, safe_serialization=False)
        path = tmp_path / "diffusion_pytorch_model.bin"
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
        state = torch.load(path)
        for new, name in old.items():
            state = {key.replace(new, name): value for key, value in state.items()}
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
        assert_same_network(model, tmp_path)

    def test_the_hash_covers_every_file_that_was_read(self, tmp_path):
        make_folder(tmp_path / "a")
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        before = load_checkpoint(tmp_path / "a").sha256
        (tmp_path / "b" / "README.md").write_text("text")
        assert load_checkpoint(tmp_path / "b").sha256 == before
        change_json(tmp_path / "b" / "config.json", dropout=0.5)
        assert load_checkpoint(tmp_path / "b").sha256 != before

    def test_nothing_outside_the_folder_is_read(self, tmp_path):
        folder, other = make_folder(tmp_path / "a"), make_folder(tmp_path / "other")
        weights = folder / "diffusion_pytorch_model.safetensors"
        weights.unlink()
        weights.symlink_to(other / weights.name)
        with pytest.raises(CheckpointError, match=r"is a link to .*other.*, outside the folder; copy the folder with"):
            load_checkpoint(folder)
        weights.unlink()
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        for name in (f"../other/{weights.name}", str(other / weights.name), "a.safetensors", 3):
            index.write_text(json.dumps({"weight_map": {"conv_in.weight": name}}))
            with pytest.raises(CheckpointError, match="must list files named diffusion_pytorch_model-"):
                load_checkpoint(folder)
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": "diffusion_pytorch_model-1.safetensors"}}))
        with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model-1.safetensors is missing; copy the folder"):
            load_checkpoint(folder)
        index.unlink()
        with pytest.raises(CheckpointError, match="holds no diffusion_pytorch_model.safetensors or .bin"):
            load_checkpoint(folder)
        shutil.rmtree(folder)
        folder.symlink_to(other)
        load_checkpoint(folder)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", r"config.json is no valid JSON \(.*\); copy the folder again"),
            (b"\xff", r"config.json is no valid JSON"),
            (b"[" * 100000, r"config.json is no valid JSON"),
            (b"[]", r"config.json holds a list, not a JSON object"),
            (b" " * (16 * 2**20 + 1), r"config.json has 16777217 bytes; a configuration has far fewer"),
        ],
    )
    def test_broken_json(self, tmp_path, content, message):
        (make_folder(tmp_path) / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)

    def test_other_content(self, tmp_path):
        folder = make_folder(tmp_path)
        (folder / "diffusion_pytorch_model.safetensors").unlink()
        torch.save([1], folder / "diffusion_pytorch_model.bin")
        with pytest.raises(CheckpointError, match="is no dictionary of tensors; it is not what save_pretrained writes"):
            load_checkpoint(folder)
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"without config.json or unet/config.json \(found: diffusion_pyto"):
            load_checkpoint(folder)
        (folder / "manifest.json").write_text("{}")
        with pytest.raises(CheckpointError, match="is a bundle, which was already made from a checkpoint"):
            load_checkpoint(folder)


class TestConfig:
    """Values of the JSON files."""

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"_class_name": "UNet2DConditionModel"}, "_class_name is 'UNet2DConditionModel'; expected one of UNet2DM"),
            ({"act_fn": "tanh"}, "act_fn is 'tanh'; expected one of silu, swish, mish, gelu, relu"),
            ({"attention_head_dim": 32, "add_attention": True}, "attention_head_dim is 32; expected at most 8"),
            ({"block_out_channels": 8}, "block_out_channels is 8; expected a list of whole numbers"),
            ({"class_embed_type": "simple"}, "class_embed_type is 'simple'; expected one of null, timestep, identity"),
            ({"down_block_types": ["KDownBlock2D"]}, r"down_block_types is \['KDownBlock2D'\]; expected a list of Do"),
            ({"up_block_types": []}, "up_block_types is .*; expected 1 block types"),
            ({"downsample_padding": 2}, "downsample_padding is 2; expected 0 or 1"),
            ({"freq_shift": 4}, "freq_shift is 4; expected less than 4"),
            ({"mid_block_scale_factor": 0}, "mid_block_scale_factor is 0; expected a number above 0"),
            ({"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type is .*; expected one of UNetMidBlock2D, nu"),
            ({"norm_num_groups": None}, r"norm_num_groups is None; expected a whole number \(null is for networks of"),
            ({"out_channels": 4}, "out_channels is 4; expected at most the 3 of in_channels, or twice them"),
            ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift is 'spatial'; expected one of default"),
            ({"sample_size": [8]}, r"sample_size is \[8\]; expected a whole number or a pair of them"),
            ({"time_embedding_type": "learned"}, "num_train_timesteps is None; expected a whole number, the rows"),
            ({"gated": True}, "unknown key gated = True; known: act_fn, .*Remove it from the file if the network does"),
            ({"sample_size": None}, "sample_size is null; give the image size with --image-size HxW"),
            ({"norm_eps": True}, "norm_eps is True; expected a number above 0"),
            ({"center_input_sample": 1}, "center_input_sample is 1; expected true or false"),
            ({"num_class_embeds": 3}, "the file lacks class_embedding.weight"),
        ],
    )
    def test_unsupported_values_are_named(self, tmp_path, values, message):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(make_folder(tmp_path, None, **values))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]}, "in one run, before every other"),
            ({"up_block_types": ["SkipUpBlock2D", "UpBlock2D", "UpBlock2D"]}, "in one run, up to the last"),
            ({"in_channels": 1}, "in_channels is 1; expected 3, which Skip blocks need"),
            ({"out_channels": 6}, "out_channels is 6; expected 3, which Skip blocks need"),
        ],
    )
    def test_skip_blocks_that_cannot_run(self, changes, message):
        options = SKIP | {
            "block_out_channels": [32] * 3,
            "norm_num_groups": 4,
            "down_block_types": ["SkipDownBlock2D"] * 3,
            "up_block_types": ["SkipUpBlock2D"] * 3,
        }
        content = FolderContent(options | changes, None, None, {}, "")
        with pytest.raises(CheckpointError, match=message):
            family.translate(content, Facts())

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"_class_name": "PNDMScheduler"}, "_class_name is 'PNDMScheduler'; expected one of DDPMScheduler, DDIMS"),
            ({"beta_schedule": "exp"}, "beta_schedule is 'exp'; expected one of linear, scaled_linear"),
            ({"prediction_type": "flow"}, "prediction_type is 'flow'; expected one of epsilon, sample, v_prediction"),
            ({"variance_type": "learned"}, "variance_type is 'learned'; expected one of fixed_small, fixed_small_log"),
            (
                {"thresholding": True, "dynamic_thresholding_ratio": 1.5},
                "dynamic_thresholding_ratio is 1.5; expected a number above 0, at most 1",
            ),
            (
                {"thresholding": True, "sample_max_value": 0.5},
                "sample_max_value is 0.5; expected a number of at least 1",
            ),
            ({"timestep_spacing": "even"}, "timestep_spacing is 'even'; expected one of leading, trailing, linspace"),
            ({"trained_betas": [0.1, 0.2]}, "trained_betas holds 2 numbers and num_train_timesteps is 1000"),
            ({"trained_betas": ["a"]}, r"trained_betas is \['a'\]; expected null or a list of numbers"),
            ({"steps_offset": -1}, "steps_offset is -1; expected a whole number from 0 up"),
        ],
    )
    def test_unsupported_scheduler_values_are_named(self, values, message):
        with pytest.raises(CheckpointError, match=message):
            diffusion_of(values)

    def test_scheduler_against_network_and_facts(self, tmp_path):
        make_folder(tmp_path)
        diffusers.DDPMScheduler(variance_type="learned_range").save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match="out_channels|variance"):
            load_checkpoint(tmp_path)
        options = Options({"variance_type": "fixed_large"}, "scheduler_config.json")
        with pytest.raises(CheckpointError, match="expected learned_range: the network has variance channels"):
            read_scheduler(options, Assumptions(Facts()), True)
        assert diffusion_of({"predict_epsilon": False}).prediction.value == "x0"
        with pytest.raises(CheckpointError, match=r"prediction is given as 'v', but scheduler_config.json says 'eps'"):
            diffusion_of({}, prediction="v")
        assert diffusion_of({}, prediction="eps").prediction.value == "eps"

    def test_a_folder_without_scheduler_says_what_was_assumed(self, tmp_path):
        folder = make_folder(tmp_path)
        checkpoint = load_checkpoint(folder)
        assert {a.name: a.value for a in checkpoint.assumptions} == {
            "num_train_timesteps": 1000,
            "noise_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
            "variance": "fixed_small",
            "prediction": "eps",
            "clip_denoised": True,
        }
        assert load_checkpoint(folder, noise_schedule="cosine").diffusion.schedule.betas[-1] == 0.999
        with pytest.raises(CheckpointError, match="noise_schedule is 'sigmoid'; diffusers has linear and cosine"):
            load_checkpoint(folder, noise_schedule="sigmoid")
        with pytest.raises(CheckpointError, match="found: a folder with config.json of a UNet2DModel"):
            load_checkpoint(folder, family="openai-guided")

    def test_latent_pipelines_are_refused(self):
        content = FolderContent(TINY, None, {"vqvae": ["diffusers", "VQModel"], "vae": [None, None]}, {}, "")
        with pytest.raises(CheckpointError, match="model_index.json names vqvae: a latent or text pipeline is not sup"):
            family.translate(content, Facts())

    def test_condition_channels_and_another_size(self, tmp_path):
        folder = make_folder(tmp_path, {"in_channels": 5, "out_channels": 3})
        config = load_checkpoint(folder, image_size=(16, 8)).config
        assert isinstance(config, c.UNetConfig)
        assert (config.in_channels, config.cond_channels, config.image_size) == (3, 2, (16, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SKIP | {"block_out_channels": [32, 36]}, "block 9: 36 channels cannot be split into 32 groups"),
        (SKIP | {"sample_size": 9}, "image size 9x9 does not fit a network that halves it 1 times; give a multiple of"),
        (SKIP | {"down_block_types": ["SkipDownBlock2D"] * 2, "sample_size": 9}, "image size 9x9 does not fit"),
    ],
)
def test_networks_that_contradict_themselves(options, message):
    with pytest.raises(ConfigError, match=message):
        family.translate(FolderContent(options, None, None, {}, ""), Facts())


@pytest.mark.parametrize("block", [c.ImageOut(6, 3, 4, is_first=True), c.ResBlock(6, 6, False, groups=2, groups_out=4)])
def test_every_norm_s_channels_split(block):
    blocks = (c.ImageSave(), c.Conv(3, 6), block, c.Conv(6, 3))
    with pytest.raises(ConfigError, match="block 2: 6 channels cannot be split into 4 groups"):
        c.UNetConfig(3, 3, (8, 8), c.TimeConfig(8, 32), blocks)


def test_label_vectors_reach_the_network(tmp_path):
    from engine.backends.eager.eager_backend import EagerBackend

    checkpoint = load_checkpoint(make_folder(tmp_path, {"class_embed_type": "identity"}))
    sampler = Sampler(EagerBackend.from_checkpoint(checkpoint))
    noise = RecordedNoise(np.ones((2, 3, 8, 8), np.float32), np.zeros((0, 2, 3, 8, 8), np.float32))
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    got = sampler.sample(2, steps=[500], labels=vectors.tolist(), seeds=[0, 1], noise=noise)
    out = checkpoint.unet()(torch.ones(2, 3, 8, 8), torch.full((2,), 500.0), vectors)
    abar = checkpoint.diffusion.schedule.alphas_cumprod[500]
    torch.testing.assert_close(got, ((1 - (1 - abar) ** 0.5 * out) / abar**0.5).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    for labels in (None, 1, [0, 1], vectors[:, :5].tolist()):
        with pytest.raises(RequestError, match="takes a vector of 32 numbers as each image's label; pass labels as 2"):
            sampler.sample(2, labels=labels)


# Published networks, from their public config.json: parameters, where published, and how often the image is halved.
PUBLISHED: dict[str, tuple[int | None, int, dict[str, Any]]] = {
    "ddpm-cifar10-32": (
        35_746_307,
        3,
        {
            "sample_size": 32,
            "block_out_channels": [128, 256, 256, 256],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "downsample_padding": 0,
        },
    ),
    "ddpm-church-256": (
        113_673_219,
        5,
        {
            "sample_size": 256,
            "block_out_channels": [128, 128, 256, 256, 512, 512],
            "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
            "downsample_padding": 0,
        },
    ),
    "ncsnpp-church-256": (
        None,
        6,
        {
            "sample_size": 256,
            "block_out_channels": [128, 128, 256, 256, 256, 256, 256],
            "down_block_types": [*["SkipDownBlock2D"] * 4, "AttnSkipDownBlock2D", *["SkipDownBlock2D"] * 2],
            "up_block_types": [*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", *["SkipUpBlock2D"] * 4],
            "norm_num_groups": None,
            "mid_block_scale_factor": 1.41421356237,
            "time_embedding_type": "fourier",
        },
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks(name):
    parameters, halvings, options = PUBLISHED[name]
    old = {"attention_head_dim": None, "freq_shift": 1, "flip_sin_to_cos": False, "norm_eps": 1e-6} | options
    with torch.device("meta"):
        theirs = diffusers.UNet2DModel(**old)
        translated = family.translate(FolderContent(old, None, None, theirs.state_dict(), ""), Facts())
        assert isinstance(translated.config, c.UNetConfig)
        ours = UNet(translated.config).state_dict()
    assert {k: v.shape for k, v in translated.weights.items()} == {k: v.shape for k, v in ours.items()}
    assert decode(json.loads(json.dumps(encode(translated.config))), c.UNetConfig) == translated.config
    assert parameters in (None, sum(value.numel() for value in theirs.state_dict().values()))
    assert sum(isinstance(b, c.Downsample) or getattr(b, "resample", None) is c.Resample.DOWN
               for b in translated.config.blocks) == halvings  # fmt: skip


LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {
        "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "UpBlock2D"],
        "block_out_channels": [8, 8],
        "mid_block_type": None,
        "center_input_sample": True,
        "downsample_padding": 0,
        "resnet_time_scale_shift": "scale_shift",
        "time_embedding_type": "learned",
        "num_train_timesteps": 1000,
        "act_fn": "gelu",
        "class_embed_type": "identity",
    },
    # At this size no random timestep is 0, of which a Fourier embedding takes the logarithm.
    "skip": SKIP | {"mid_block_type": None, "num_class_embeds": 3, "sample_size": (8, 16)},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_export(tmp_path, name):
    assert_exports(load_checkpoint(make_folder(tmp_path, LAYOUTS[name])), tmp_path)
