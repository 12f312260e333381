"""diffusers' own DDIMPipeline on a folder that diffusers wrote: unet/ and scheduler/, taken as they are.

The pipeline gives no labels, and its scheduler does not split off a learned variance: LabelledUNet does both, as a
user would. Whether a folder holds the bundle's network and schedule is told by its images, which are compared.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.contender import Contender
from benchmarks.peers.ddim_loop import Task
from engine.diffusion.prediction import Diffusion
from engine.errors import BackendError, MissingPackageError, RequestError
from engine.networks.config import UNetConfig


class LabelledUNet(nn.Module):
    """A UNet2DModel with labels, as a pipeline calls it. channels: of the result that are given on.

    labels: of the sampling call in progress, int64 [B] or None.
    """

    def __init__(self, unet: Any, channels: int) -> None:
        super().__init__()
        self.unet, self.channels = unet, channels
        self.labels: Tensor | None = None

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
        """An object with the network's result [B, C, H, W] float32 as `sample`."""
        out = self.unet(sample.to(self.unet.dtype), timestep, self.labels, return_dict=False)[0]
        return SimpleNamespace(sample=out[:, : self.channels].float())


def open_pipeline(folder: Path, config: UNetConfig, diffusion: Diffusion, device: torch.device) -> Contender:
    """The pipeline of a folder, fp32 on a CPU and fp16 on a GPU.

    config, diffusion: of the bundle that it is compared with. Raises MissingPackageError, RequestError for a folder
    that diffusers cannot read, BackendError for a network that its pipelines cannot sample.
    """
    try:
        import diffusers
    except ImportError as error:
        raise MissingPackageError("diffusers", "the peer diffusers", "bench") from error
    if diffusion.timestep_scale != 1:
        raise BackendError("diffusers' pipelines do not scale the timesteps, and this network takes scaled ones")
    network: Any = diffusers.UNet2DModel
    scheduler: Any = diffusers.DDIMScheduler
    try:
        unet = network.from_pretrained(str(folder), subfolder="unet", local_files_only=True)
        scheduler = scheduler.from_pretrained(str(folder), subfolder="scheduler", local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"{folder} holds no unet/ and scheduler/ that diffusers can read: {reason}") from error
    unet = unet.eval().requires_grad_(False)
    if device.type == "cuda":
        unet = unet.to(device, torch.float16).to(memory_format=torch.channels_last)
    labelled = LabelledUNet(unet, config.in_channels)
    pipeline: Any = diffusers.DDIMPipeline(unet=labelled, scheduler=scheduler)  # type: ignore[no-untyped-call]
    pipeline.set_progress_bar_config(disable=True)

    def sample(task: Task) -> Tensor:
        labelled.labels = task.labels(config, device)
        (images,) = pipeline(
            batch_size=len(task.classes),
            generator=task.generator(device),
            num_inference_steps=task.steps,
            use_clipped_model_output=not diffusion.keeps_eps,
            output_type="pt",
            return_dict=False,
        )
        return 2 * images.float().cpu() - 1

    def against(task: Task) -> str | None:
        return "diffusers has no pipeline with classifier guidance" if task.guided else None

    return Contender("diffusers", "fp16" if device.type == "cuda" else "fp32", sample, against)
