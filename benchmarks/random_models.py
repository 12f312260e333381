"""Checkpoints with random weights in the shape of published networks, for speed where the numbers do not matter.

    python -m benchmarks.random_models ddpm-cifar10 random-ddpm     # a diffusers folder, 35.7 million parameters
    python -m benchmarks.random_models adm-64 random-adm            # the same with ADM's 296 million
    python -m benchmarks.random_models lucidrains-32 random.pt      # a file of denoising-diffusion-pytorch

Weights are torch's own initialisation, with norms off 1 and 0 and no layer that starts at zero, so that every part of
a network shows in its output. The first two are written by diffusers, whose folders hold everything that a translator
needs; the third by that package itself, as it initialises its network.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.lucidrains_package import write_random_file
from engine.cli.command import run_command
from engine.errors import MissingPackageError, OutputError

NORM_SPREAD = 0.1

DDPM_CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
}
"""Ho et al., DDPM (2020), appendix B, as the published google/ddpm-cifar10-32 states it."""

ADM_64 = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 6,
    "layers_per_block": 3,
    "block_out_channels": (192, 384, 576, 768),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attention_head_dim": 64,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": 1000,
}
"""Dhariwal & Nichol (2021), table 12, ImageNet 64x64: what of it diffusers' blocks can state."""

LUCIDRAINS = "lucidrains-32"

MODELS: dict[str, dict[str, Any]] = {"ddpm-cifar10": DDPM_CIFAR10, "adm-64": ADM_64}


def write_random_model(folder: Path, options: dict[str, Any], seed: int = 0) -> Path:
    """Write a diffusers folder of UNet2DModel(**options) and a DDPM scheduler.

    Raises OutputError for a folder that exists, and MissingPackageError without diffusers.
    """
    try:
        from diffusers import DDPMScheduler, UNet2DModel
    except ImportError as error:
        raise MissingPackageError("diffusers", "random models", "bench") from error
    if folder.exists():
        raise OutputError(f"{folder} exists; choose another folder or remove it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = UNet2DModel(**options)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(NORM_SPREAD * torch.randn_like(parameter))
    model.save_pretrained(folder / "unet")
    learned = options["out_channels"] == 2 * options["in_channels"]
    schedule: Any = DDPMScheduler(variance_type="learned_range" if learned else "fixed_large")  # type: ignore[no-untyped-call]
    schedule.save_pretrained(folder / "scheduler")
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_models",
        description="Write a checkpoint with random weights in the shape of a published network.",
    )
    parser.add_argument("model", choices=sorted([*MODELS, LUCIDRAINS]))
    parser.add_argument("out", type=Path, help="folder or file, which must not exist")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")

    def work(args: argparse.Namespace) -> None:
        if args.model == LUCIDRAINS:
            print(f"written: {write_random_file(args.out, args.seed)}")
        else:
            print(f"written: {write_random_model(args.out, MODELS[args.model], args.seed)}")

    return run_command(work, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
