"""Write the shipped digits model as a folder that diffusers loads: unet/ (a UNet2DModel) and scheduler/ (DDIM).

    python -m recipes.diffusers_format build/bench/digits-diffusers

The pipelines of diffusers give no labels and do not split off a learned variance; who loads the folder does both.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.facts import Facts
from engine.checkpoints.families.diffusers import translate
from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.model_folder import FolderContent
from engine.cli.command import run_command
from engine.errors import MissingPackageError
from engine.files import atomic_folder
from judging.digits import CHECKPOINT, FACTS

UNET: Mapping[str, Any] = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 2,
    "layers_per_block": 1,
    "block_out_channels": (32, 64, 64, 96),
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "attention_head_dim": 32,
    "attn_norm_num_groups": 32,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_dim": 128,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "num_class_embeds": 11,
}
"""The architecture of recipes.digits_net in the words of diffusers' UNet2DModel."""

SCHEDULER: Mapping[str, Any] = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "sample",
    "clip_sample": True,
    "timestep_spacing": "leading",
}

_DIGITS = 2**20
"""Numbers below it survive float32 and a factor."""


def untranslated(
    options: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a UNet2DModel, of these shapes by name, that engine.checkpoints.families.diffusers translates to
    `weights`.

    The translator only moves and scales numbers. What it makes of ones is each place's scale, and what it makes of the
    places' numbers, whose two digits go through apart, says where each number came from.
    """
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes.items()}
    number = torch.arange(sum(sizes.values()))

    def shaped(flat: Tensor) -> dict[str, Tensor]:
        parts = zip(shapes.items(), flat.split(list(sizes.values())), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in parts}

    def translated(flat: Tensor) -> Mapping[str, Tensor]:
        content = FolderContent({"_class_name": "UNet2DModel", **options}, None, None, shaped(flat.float()), "")
        return translate(content, Facts()).weights

    high_digits = torch.div(number, _DIGITS, rounding_mode="floor")
    scales, low, high = (translated(each) for each in (torch.ones_like(number), number % _DIGITS, high_digits))
    flat = torch.full((len(number),), torch.nan)
    for name, scale in scales.items():
        place = (high[name] / scale).round().long() * _DIGITS + (low[name] / scale).round().long()
        flat[place.flatten()] = (weights[name].float() / scale).flatten()
    return shaped(flat)


def write_folder(folder: Path) -> Path:
    """Write the folder; raises OutputError where it exists and is none of these, MissingPackageError."""
    try:
        from diffusers import DDIMScheduler, UNet2DModel
    except ImportError as error:
        raise MissingPackageError("diffusers", "a folder of diffusers", "bench") from error
    weights = load_checkpoint(CHECKPOINT, **FACTS).weights
    with torch.device("meta"):
        model: Any = UNet2DModel(**UNET)  # type: ignore[no-untyped-call]
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(untranslated(UNET, shapes, weights), assign=True)
    scheduler: Any = DDIMScheduler(**SCHEDULER)  # type: ignore[no-untyped-call]
    with atomic_folder(folder, is_diffusers_folder) as temporary:
        model.save_pretrained(temporary / "unet")
        scheduler.save_pretrained(temporary / "scheduler")
    return folder


def is_diffusers_folder(folder: Path) -> bool:
    """Whether a folder holds a U-Net of diffusers."""
    return (folder / "unet" / "config.json").is_file()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.diffusers_format", description="Write the digits model as a folder of diffusers."
    )
    parser.add_argument("out", type=Path, help="folder to write; an older one is replaced")
    return run_command(lambda args: print(f"written: {write_folder(args.out)}"), parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
