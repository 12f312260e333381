"""denoising-diffusion-pytorch's own sample() on a file of its training, and such a file with random weights.

It is an architecture of its own, so the bundle beside it must have been exported from that very file.

    python -m benchmarks.random_models lucidrains-32 random.pt
    python -m export.to_onnx random.pt --image-size 32
    python -m benchmarks.peers random.engine --checkpoint random.pt
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.contender import Contender
from benchmarks.peers.ddim_loop import Task
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


def rebuild(path: Path, manifest: Manifest) -> Any:
    """The package's GaussianDiffusion of a file, in evaluation mode.

    Its main class alone: a file of another one, or of a version with other layers, raises RequestError.
    """
    package, state, diffusion = import_package(), read_state(path), manifest.diffusion
    try:
        network = package.Unet(**network_arguments(state))
        made = package.GaussianDiffusion(
            network,
            image_size=manifest.unet.config.image_size,
            timesteps=len(diffusion.schedule),
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


def open_package(path: Path, manifest: Manifest, device: torch.device) -> Contender:
    """The package's sample() on a file of its training; raises BackendError without it, RequestError."""
    diffusion = rebuild(path, manifest).to(device)

    def sample(task: Task) -> Tensor:
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = task.steps, True
        # Its first draw is x_T, as in Task.start().
        torch.manual_seed(task.seed)
        images: Tensor = diffusion.sample(batch_size=len(task.classes)).float().cpu()
        return (2 * images - 1 if manifest.diffusion.data_range == (0.0, 1.0) else images).clamp(-1, 1)

    def against(task: Task) -> str | None:
        return "its main sampler takes no classifier" if task.guided else None

    return Contender("denoising-diffusion-pytorch", "fp32", sample, against)


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
