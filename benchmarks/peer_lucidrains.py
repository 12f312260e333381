"""denoising-diffusion-pytorch's own sample() on a file of its training, and such a file with random weights.

It is an architecture of its own, so the bundle beside it must have been exported from that very file. Its DDPM takes
every timestep of training, and has no shorter form.

    python -m benchmarks.random_models lucidrains-32 random.pt
    python -m export.to_onnx random.pt --image-size 32
    python -m benchmarks.peers random.engine --checkpoint random.pt
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer_loops import Task
from benchmarks.peer_turns import Gate, open_gate
from engine.bundle.manifest import Manifest
from engine.checkpoints.reading import read_file
from engine.diffusion.prediction import Prediction
from engine.errors import BackendError, OutputError, RequestError
from engine.files import atomic_path

_OBJECTIVES = {Prediction.EPS: "pred_noise", Prediction.X0: "pred_x0", Prediction.V: "pred_v"}
_RANDOM_NETWORK = {"dim": 32, "dim_mults": (1, 2, 4), "channels": 3}
_RANDOM_SIZE = 32
_NEEDS = (
    "the peer denoising-diffusion-pytorch needs that package: pip install --no-deps denoising-diffusion-pytorch && "
    "pip install einops ema-pytorch accelerate scipy"
)


def import_package() -> Any:
    """The package's main module, its progress bar left out; raises BackendError where it is not installed.

    It asks for torchvision, of which sampling uses nothing: where that is not installed, empty modules stand in for it
    while the package is imported.
    """
    try:
        with _torchvision():
            from denoising_diffusion_pytorch import denoising_diffusion_pytorch as package
    except ImportError as error:
        raise BackendError(f"{_NEEDS} ({error})") from error
    package.tqdm = _without_bar
    return package


@contextmanager
def _torchvision() -> Iterator[None]:
    parts = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.utils")}
    parts["torchvision"].__dict__.update(transforms=parts["torchvision.transforms"], utils=parts["torchvision.utils"])
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        yield
        return
    sys.modules.update(parts)
    try:
        yield
    finally:
        for name in parts:
            sys.modules.pop(name, None)


def _without_bar(steps: Any, **_: object) -> Any:
    return steps


def read_state(path: Path) -> dict[str, Tensor]:
    """The state of the diffusion object in a file, the averaged one where there is one; raises CheckpointError."""
    content: Any = read_file(path)
    averaged = content.get("ema") if isinstance(content, Mapping) else None
    if isinstance(averaged, Mapping):
        prefix = "ema_model."
        return {name.removeprefix(prefix): v for name, v in averaged.items() if str(name).startswith(prefix)}
    return dict(content["model"] if isinstance(content.get("model"), Mapping) else content)


def rebuild(path: Path, manifest: Manifest, steps: int) -> Any:
    """The package's GaussianDiffusion of a file, for DDIM in `steps` steps, in evaluation mode.

    Its main class alone: a file of another one, or of a version with other layers, raises RequestError.
    """
    package, state, diffusion = import_package(), read_state(path), manifest.diffusion
    try:
        network = package.Unet(**network_arguments(state))
        made = package.GaussianDiffusion(
            network,
            image_size=manifest.config.image_size,
            timesteps=len(diffusion.schedule),
            sampling_timesteps=steps,
            objective=_OBJECTIVES[diffusion.prediction],
            auto_normalize=diffusion.data_range == (0.0, 1.0),
        )
        made.load_state_dict(state)
    except (RuntimeError, KeyError, AssertionError, StopIteration) as error:
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"the installed denoising-diffusion-pytorch has no network for {path}: {reason}") from error
    return made.eval().requires_grad_(False)


def network_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of Unet that a state tells by its shapes; heads are the package's usual 4 of 32."""
    shape = {name.removeprefix("model."): tuple(value.shape) for name, value in state.items()}
    dim = shape["time_mlp.1.weight"][1]
    levels = len({name.split(".")[1] for name in shape if name.startswith("downs.")})
    ends = [next(shape[n][0] for n in (f"downs.{i}.3.1.weight", f"downs.{i}.3.weight") if n in shape) for i in
            range(levels)]  # fmt: skip
    channels = shape["final_conv.weight"][0]
    return {
        "dim": dim,
        "init_dim": shape["init_conv.weight"][0],
        "dim_mults": tuple(end // dim for end in ends),
        "channels": channels,
        "self_condition": shape["init_conv.weight"][1] == 2 * channels,
        "full_attn": tuple(f"downs.{i}.2.to_out.weight" in shape for i in range(levels)),
    }


class _Gated(nn.Module):
    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.gate: Gate = open_gate

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        call: Callable[[], Tensor] = partial(self.network, x, time, x_self_cond)
        return self.gate(call)


class LucidrainsContender:
    """The package's sample(); see benchmarks.peer_contenders.Contender."""

    name, precision, is_compiled = "denoising-diffusion-pytorch", "fp32", False

    def __init__(self, path: Path, manifest: Manifest, device: torch.device) -> None:
        self._device, self._steps = device, len(manifest.diffusion.schedule)
        self._is_unit_range = manifest.diffusion.data_range == (0.0, 1.0)
        self._diffusion = rebuild(path, manifest, self._steps).to(device)
        self._gated = _Gated(self._diffusion.model)
        self._diffusion.model = self._gated

    def reason_against(self, task: Task) -> str | None:
        """Why the package cannot do a task, or None."""
        if task.guided:
            return "its main sampler takes no classifier"
        if task.setting.sampler == "ddpm" and task.setting.steps != self._steps:
            return f"its DDPM takes every one of the {self._steps} timesteps of training, and has no shorter form"
        return None

    def run(self, task: Task, gate: Gate) -> Tensor:
        """Images [B, C, H, W] in [-1, 1], on the CPU."""
        diffusion, setting = self._diffusion, task.setting
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = setting.steps, setting.sampler == "ddim"
        self._gated.gate = gate
        try:
            torch.manual_seed(task.seed)
            images: Tensor = diffusion.sample(batch_size=task.batch)
        finally:
            self._gated.gate = open_gate
        images = images.float().cpu()
        return (2 * images - 1 if self._is_unit_range else images).clamp(-1, 1)


def write_random_file(path: Path, seed: int = 0) -> Path:
    """A file as the package's Trainer writes it, with random weights; raises OutputError for one that exists."""
    package = import_package()
    if path.exists():
        raise OutputError(f"{path} exists; choose another file or remove it")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        diffusion = package.GaussianDiffusion(package.Unet(**_RANDOM_NETWORK), image_size=_RANDOM_SIZE, timesteps=1000)
    version = importlib.metadata.version("denoising-diffusion-pytorch")
    with atomic_path(path) as temporary:
        torch.save({"step": 0, "model": diffusion.state_dict(), "version": version}, temporary)
    return path
