"""diffusers' own pipelines on the same network: a UNet2DModel of the same blocks, filled with the same weights.

Any UNetConfig that diffusers' blocks can state is stated: options are guessed from the block list, and the guess must
read back as that very list. Weights go back by what the translator of diffusers folders does to numbered tensors, so
that no table of names is written twice. A folder that diffusers wrote is used as it is.

DDIMPipeline gives no labels and DDIMScheduler does not split off a learned variance: `LabelledUNet` does both, as a
user would. DDIM re-derives eps from the clipped x0 (use_clipped_model_output) where the checkpoint's sampler does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_loops import Setting, Task
from benchmarks.peer_networks import compile_call, torch_precision
from benchmarks.peer_turns import Gate, open_gate
from engine.checkpoints.facts import Facts
from engine.checkpoints.families.diffusers import translate
from engine.checkpoints.families.diffusers_options import Options
from engine.checkpoints.families.diffusers_unet import read_unet
from engine.checkpoints.folder import FolderContent
from engine.diffusion.prediction import Diffusion, Prediction, Spacing
from engine.errors import CheckpointError, MissingPackageError, RequestError
from engine.networks import config as c

_ACTIVATIONS = {c.Activation.SILU: "silu", c.Activation.MISH: "mish", c.Activation.GELU: "gelu"}
_PREDICTIONS = {Prediction.EPS: "epsilon", Prediction.X0: "sample", Prediction.V: "v_prediction"}
_DIGITS = 2**20
"""Numbers below it survive float32 and a factor."""

Blocks = Sequence[c.Block]


def unet_options(config: c.UNetConfig) -> dict[str, Any]:
    """The arguments of the UNet2DModel that is this network; raises RequestError where none is."""
    try:
        options = _guess(config)
        builder, fields = read_unet(Options(options, "the guess"))
    except (CheckpointError, ValueError, IndexError) as error:
        raise RequestError(f"diffusers' blocks cannot state this network: {error}") from error
    stated = tuple(block for block, _ in builder.layout)
    if stated != config.blocks:
        pairs = zip(stated, config.blocks, strict=False)
        found = next((pair for pair in pairs if pair[0] != pair[1]), (len(stated), len(config.blocks)))
        raise RequestError(f"diffusers' blocks cannot state this network: they give {found[0]}, it has {found[1]}")
    for name, value in fields.items():
        if name != "num_classes" and getattr(config, name) != value:
            raise RequestError(
                f"diffusers' blocks cannot state this network: its {name} is {getattr(config, name)}, theirs {value}"
            )
    return options


def _guess(config: c.UNetConfig) -> dict[str, Any]:
    blocks = config.blocks
    first_pop = next(i for i, block in enumerate(blocks) if isinstance(block, c.Pop))
    last_push = max(i for i, block in enumerate(blocks[:first_pop]) if isinstance(block, c.Push))
    down, middle = _levels(blocks[2 : last_push + 1], c.Downsample), blocks[last_push + 1 : first_pop]
    up = _levels(blocks[first_pop:-2], c.Upsample)
    residuals = [block for block in blocks if isinstance(block, c.ResBlock)]
    attentions = [block for block in blocks if isinstance(block, c.Attention)]
    middle_norms = [b for b in middle if isinstance(b, c.Attention) and b.norm is c.Norm.GROUP]
    resampling = [block for block in residuals if block.resample is not None]
    first = residuals[0]
    depths = {sum(isinstance(b, c.ResBlock) and b.resample is None for b in level) for level in down}
    if len(depths) != 1 or first.activation not in _ACTIVATIONS:
        raise ValueError(f"ResBlocks a level: {sorted(depths)}, activation {first.activation.value}")
    is_whole = all(block.heads == 1 for block in attentions)
    pads_end = any(isinstance(block, c.Downsample) and block.pads_end for block in blocks)
    return {
        "sample_size": list(config.image_size),
        "in_channels": config.in_channels + config.cond_channels,
        "out_channels": config.out_channels,
        "down_block_types": [_kind(level, "Down") for level in down],
        "up_block_types": [_kind(level, "Up") for level in up],
        "block_out_channels": [_width(level) for level in down],
        "layers_per_block": depths.pop(),
        "downsample_padding": 0 if pads_end else 1,
        "downsample_type": "resnet" if resampling else "conv",
        "upsample_type": "resnet" if resampling else "conv",
        "act_fn": _ACTIVATIONS[first.activation],
        "attention_head_dim": None if is_whole else attentions[0].head_dim,
        "norm_num_groups": first.groups,
        "attn_norm_num_groups": middle_norms[0].groups if middle_norms else None,
        "norm_eps": first.eps,
        "resnet_time_scale_shift": "scale_shift" if first.scale_shift else "default",
        "add_attention": any(isinstance(block, c.Attention) for block in middle),
        "time_embedding_dim": config.time_channels,
        "freq_shift": config.time.shift,
        "flip_sin_to_cos": config.time.order is c.EmbeddingOrder.COS_SIN,
        "num_class_embeds": config.num_classes,
    }


def _levels(blocks: Blocks, kind: type[c.Block]) -> list[list[c.Block]]:
    """The blocks of each resolution; what changes it ends one."""
    levels: list[list[c.Block]] = [[]]
    is_open = True
    for block in blocks:
        if not is_open and not isinstance(block, c.Push):
            levels.append([])
            is_open = True
        levels[-1].append(block)
        if isinstance(block, kind) or (isinstance(block, c.ResBlock) and block.resample is not None):
            is_open = False
    return levels


def _kind(level: Blocks, way: str) -> str:
    if any(isinstance(block, c.Attention) for block in level):
        return f"Attn{way}Block2D"
    if any(isinstance(block, c.ResBlock) and block.resample is not None for block in level):
        return f"Resnet{way}sampleBlock2D"
    return f"{way}Block2D"


def _width(level: Blocks) -> int:
    return next(block.out_channels for block in level if isinstance(block, c.ResBlock))


def untranslated(options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]) -> (
    dict[str, Tensor]
):  # fmt: skip
    """Tensors of a UNet2DModel, of these shapes by name, that engine.checkpoints.families.diffusers translates to
    `weights`.

    The translator only moves and scales numbers. What it makes of ones is each place's scale, and what it makes of the
    places' numbers, whose two digits go through apart, says where each number came from.
    """
    sizes = {name: int(torch.Size(shape).numel()) for name, shape in shapes.items()}
    number = torch.arange(sum(sizes.values()))

    def translated(flat: Tensor) -> dict[str, Tensor]:
        parts = zip(shapes.items(), flat.split(list(sizes.values())), strict=True)
        tensors = {name: part.reshape(shape) for (name, shape), part in parts}
        content = FolderContent({"_class_name": "UNet2DModel", **options}, None, None, tensors, "")
        return translate(content, Facts()).weights

    scales, low, high = (
        translated(values.float())
        for values in (torch.ones_like(number), number % _DIGITS, torch.div(number, _DIGITS, rounding_mode="floor"))
    )
    flat = torch.full((len(number),), torch.nan)
    for name, scale in scales.items():
        place = (high[name] / scale).round().long() * _DIGITS + (low[name] / scale).round().long()
        flat[place.flatten()] = (weights[name].float() / scale).flatten()
    parts = zip(shapes.items(), flat.split(list(sizes.values())), strict=True)
    return {name: part.reshape(shape) for (name, shape), part in parts}


def as_diffusers(config: c.UNetConfig, weights: Mapping[str, Tensor]) -> Any:
    """A UNet2DModel that is this network; raises RequestError where there is none, MissingPackageError."""
    diffusers = _diffusers()
    options = unet_options(config)
    with torch.device("meta"):
        model = diffusers.UNet2DModel(**options)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = untranslated(options, shapes, weights)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def read_model(folder: Path) -> Any:
    """The UNet2DModel of a folder that diffusers wrote, the averaged one where there are two."""
    places = (folder / name for name in ("unet_ema", "unet", "") if (folder / name / "config.json").is_file())
    place = next(places, folder)
    return _diffusers().UNet2DModel.from_pretrained(str(place), local_files_only=True).eval().requires_grad_(False)


class LabelledUNet(nn.Module):
    """A UNet2DModel with labels, as a pipeline calls it. channels: of the result that are given on, None for all.

    gate, labels: of the sampling call in progress.
    """

    def __init__(self, unet: Any, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.unet, self.call = unet, call
        self.gate: Gate = open_gate
        self.labels: Tensor | None = None
        self.channels: int | None = None

    @property
    def config(self) -> Any:
        return self.unet.config

    @property
    def dtype(self) -> torch.dtype:
        """Of the images, whatever the network computes in."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.unet.device

    def forward(self, sample: Tensor, timestep: Tensor) -> SimpleNamespace:
        """An object with the network's result as `sample`."""
        out = self.gate(partial(self.call, sample, timestep, self.labels))
        return SimpleNamespace(sample=out[:, : self.channels])


class DiffusersContender:
    """DDIMPipeline and DDPMPipeline; see benchmarks.peer_contenders.Contender."""

    def __init__(
        self, unet: Any, config: c.UNetConfig, diffusion: Diffusion, device: torch.device, is_compiled: bool
    ) -> None:
        self.name = "diffusers + torch.compile" if is_compiled else "diffusers"
        self.precision, self.is_compiled = torch_precision(device, is_compiled), is_compiled
        self._config, self._diffusion, self._device = config, diffusion, device
        if device.type == "cuda":
            unet = unet.to(device, torch.float16).to(memory_format=torch.channels_last)

        def call(sample: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
            result: Tensor = unet(sample.to(unet.dtype), timestep, labels, return_dict=False)[0]
            return result.float()

        self._unet = LabelledUNet(unet, compile_call(call, device, self.precision) if is_compiled else call)
        self._pipelines: dict[str, Any] = {}

    def reason_against(self, task: Task) -> str | None:
        """Why its pipelines cannot do a task, or None."""
        if task.guided:
            return "diffusers has no pipeline with classifier guidance"
        if self._diffusion.timestep_scale != 1:
            return "diffusers' pipelines give the network timesteps as they are, and this one takes scaled ones"
        return None

    def run(self, task: Task, gate: Gate) -> Tensor:
        """Images [B, C, H, W] in [-1, 1], on the CPU."""
        sampler, unet = task.setting.sampler, self._unet
        if sampler not in self._pipelines:
            self._pipelines[sampler] = self._pipeline(task.setting)
        labels = task.labels(self._config)
        unet.gate = gate
        unet.labels = None if labels is None else torch.tensor(labels, device=self._device)
        unet.channels = self._config.in_channels if sampler == "ddim" else None
        arguments = {} if sampler == "ddpm" else {"use_clipped_model_output": not self._diffusion.keeps_eps}
        try:
            (images,) = self._pipelines[sampler](
                batch_size=task.batch,
                generator=task.generator(self._device),
                num_inference_steps=task.setting.steps,
                output_type="pt",
                return_dict=False,
                **arguments,
            )
        finally:
            unet.gate = open_gate
        return 2 * images.float().cpu() - 1

    def _pipeline(self, setting: Setting) -> Any:
        diffusers = _diffusers()
        pipelines = {"ddim": diffusers.DDIMPipeline, "ddpm": diffusers.DDPMPipeline}
        made = pipelines[setting.sampler](unet=self._unet, scheduler=make_scheduler(self._diffusion, setting.sampler))
        made.set_progress_bar_config(disable=True)
        return made


def make_scheduler(diffusion: Diffusion, sampler: str) -> Any:
    """A DDIMScheduler or DDPMScheduler with a checkpoint's schedule and conventions.

    Where the checkpoint's spacing holds both ends, that is "linspace" of DDPM, and DDIM takes its usual "leading".
    """
    diffusers = _diffusers()
    both_ends = "leading" if sampler == "ddim" else "linspace"
    spacing = both_ends if diffusion.spacing is Spacing.EVEN else diffusion.spacing.value
    options: dict[str, Any] = {
        "num_train_timesteps": len(diffusion.schedule),
        "trained_betas": diffusion.schedule.betas.tolist(),
        "prediction_type": _PREDICTIONS[diffusion.prediction],
        "clip_sample": diffusion.clip is not None,
        "clip_sample_range": diffusion.clip or 1.0,
        "timestep_spacing": spacing,
        "steps_offset": diffusion.spacing_offset,
    }
    if sampler == "ddim":
        return diffusers.DDIMScheduler(**options, set_alpha_to_one=not diffusion.ends_at_first)
    return diffusers.DDPMScheduler(**options, variance_type=diffusion.variance.value)


def network_for(folder: Path | None, config: c.UNetConfig, weights: Mapping[str, Tensor]) -> Any:
    """The folder's own network where there is one, else as_diffusers(); both raise what that raises."""
    return as_diffusers(config, weights) if folder is None else read_model(folder)


def _diffusers() -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackageError("diffusers", "the peer diffusers", "bench") from error
    return diffusers
