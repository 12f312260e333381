"""Who takes part: this engine, plain loops around the same network in other libraries, other projects' pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.peers import ddim_loop, libraries
from benchmarks.peers.contender import Contender, Entrant
from benchmarks.peers.ddim_loop import SCALE, Task, classifier_gradient, timesteps
from benchmarks.peers.diffusers_pipeline import open_pipeline
from benchmarks.peers.libraries import LibraryNetwork
from benchmarks.peers.lucidrains_package import open_package
from engine.bundle.bundle_folder import Bundle
from engine.checkpoints.load import load_checkpoint
from engine.diffusion.prediction import Diffusion
from engine.errors import BackendError, BundleError, RequestError
from engine.files import file_sha256
from engine.networks.classifier import Classifier
from engine.networks.config import Attention, UNetConfig
from engine.networks.unet import UNet
from engine.sampling.sampler import Sampler

OURS = "UNet-RT"


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What all of them run. unet: the bundle's network in fp32 torch on the CPU, never changed.

    classifier: in fp32 torch, or why there is none. checkpoint: the file that the bundle was exported from, diffusers:
    a folder of the same network, None where not given. folder: for files that contenders need. threads: of a CPU, None
    for each library's default.
    """

    bundle: Bundle
    unet: UNet
    classifier: Classifier | str
    checkpoint: Path | None
    diffusers: Path | None
    device: torch.device
    batch: int
    threads: int | None
    folder: Path

    @property
    def config(self) -> UNetConfig:
        """The network's description."""
        return self.bundle.manifest.unet.config

    @property
    def diffusion(self) -> Diffusion:
        """How the checkpoint is to be sampled."""
        return self.bundle.manifest.diffusion

    def task(self, steps: int, guided: bool) -> Task:
        """One batch of images, of every class in turn that network and classifier know; a null class is none."""
        entry = self.bundle.manifest.classifier
        known = [count for count in (self.config.num_classes, entry and entry.config.num_classes) if count]
        classes = [y for y in range(min(known, default=1)) if y != self.config.null_class]
        return Task(steps, guided, tuple(classes[i % len(classes)] for i in range(self.batch)))


def entrants_of(subject: Subject) -> tuple[Entrant, ...]:
    """Ours first, then from the most to the least usual."""
    device, config, threads = subject.device, subject.config, subject.threads
    export = cache(partial(_export, subject))
    loops: dict[str, Callable[[], LibraryNetwork]] = {
        "PyTorch eager": lambda: libraries.eager(subject.unet, device),
        "torch.compile": lambda: libraries.compiled(subject.unet, device),
    }
    exported: dict[str, Callable[[], LibraryNetwork]] = {
        "ONNX Runtime": lambda: libraries.onnxruntime_network(export(), config, device, threads),
        "OpenVINO": lambda: libraries.openvino_network(export(), config, device, threads),
        "OpenVINO bf16": lambda: libraries.openvino_network(export(), config, device, threads, bf16=True),
    }
    return (
        Entrant(OURS, lambda: ours(subject)),
        Entrant(f"{OURS} in fp32", lambda: _ours_in_fp32(subject)),
        Entrant(f"{OURS} in int8", lambda: ours(subject, "native", "int8")),
        *(Entrant(name, partial(loop, name, made, subject)) for name, made in loops.items()),
        *(Entrant(name, partial(loop, name, made, subject), export) for name, made in exported.items()),
        Entrant("TensorRT", partial(loop, "TensorRT", partial(_tensorrt, subject), subject)),
        Entrant("diffusers", lambda: _diffusers(subject)),
        Entrant("denoising-diffusion-pytorch", lambda: _lucidrains(subject)),
    )


def ours(subject: Subject, backend: str = "auto", precision: str | None = None) -> Contender:
    """This engine's Sampler on the backend of a name, with the bundle's gradient where it has one."""
    sampler = Sampler.open(subject.bundle, backend, precision, subject.threads)
    has_classifier = subject.bundle.manifest.classifier is not None
    guidance = sampler.classifier_guidance(SCALE) if has_classifier else None

    def sample(task: Task) -> Tensor:
        has_labels = task.guided or subject.config.num_classes is not None
        return sampler.decode(
            task.start(subject.config, subject.device).cpu(),
            steps=timesteps(subject.diffusion, task.steps).tolist(),
            labels=list(task.classes) if has_labels else None,
            guidance=guidance if task.guided else None,
            batch_size=len(task.classes),
        )

    def against(task: Task) -> str | None:
        return "the bundle holds no classifier" if task.guided and guidance is None else None

    name = f"{OURS} ({sampler.backend.name} {sampler.backend.precision})"
    return Contender(name, sampler.backend.precision, sample, against)


def _ours_in_fp32(subject: Subject) -> Contender:
    """What compares with the peers that compute in fp32, where auto takes another precision."""
    if ours(subject).precision == "fp32":
        raise BackendError("ours is in fp32 already")
    return ours(subject, precision="fp32")


def loop(name: str, opened: Callable[[], LibraryNetwork], subject: Subject) -> Contender:
    """A plain loop around a network, with a classifier's gradient by torch autograd where guided."""
    network, classifier, device = opened(), subject.classifier, subject.device
    if isinstance(classifier, Classifier) and device.type == "cuda":
        classifier = classifier.to(device)

    def sample(task: Task) -> Tensor:
        call, gradient = network.call, None
        if task.guided:
            if isinstance(classifier, str):
                raise RequestError(classifier)
            call, gradient = network.beside_torch or call, classifier_gradient(classifier, task, device)
        return ddim_loop.sample(call, subject.config, subject.diffusion, task, device, gradient)

    def against(task: Task) -> str | None:
        return classifier if task.guided and isinstance(classifier, str) else None

    return Contender(name, network.precision, sample, against, network.is_compiled)


def _export(subject: Subject) -> Path:
    unet = libraries.half(subject.unet) if subject.device.type == "cuda" else subject.unet
    return libraries.plain_export(unet, subject.batch, subject.folder / "plain.onnx")


def _tensorrt(subject: Subject) -> LibraryNetwork:
    folder = subject.folder / "tensorrt"
    folder.mkdir()
    return libraries.tensorrt_network(subject.unet, subject.bundle.manifest, subject.batch, folder)


def _diffusers(subject: Subject) -> Contender:
    if subject.diffusers is None:
        raise BackendError(
            "it needs a folder that diffusers wrote, of the same network; give it with --diffusers (for the shipped "
            "digits: python -m recipes.diffusers_format FOLDER)"
        )
    return open_pipeline(subject.diffusers, subject.config, subject.diffusion, subject.device)


def _lucidrains(subject: Subject) -> Contender:
    if subject.bundle.manifest.family != "lucidrains":
        raise BackendError(
            f"its architecture is another: this network is of the family {subject.bundle.manifest.family}"
        )
    if subject.checkpoint is None:
        raise BackendError("it needs the file that the bundle was exported from; give it with --checkpoint")
    return open_package(subject.checkpoint, subject.bundle.manifest, subject.device)


def check_checkpoint(bundle: Bundle, given: Path | None) -> None:
    """Raises RequestError for a checkpoint's file that is not the one that the bundle was exported from."""
    if given is None:
        return
    found = file_sha256(_existing(given))
    if found != bundle.manifest.checkpoint_sha256:
        raise RequestError(
            f"{given} is not what {bundle.path} was exported from (sha256 {found[:12]}, the manifest has "
            f"{bundle.manifest.checkpoint_sha256[:12]}); pass that checkpoint, or export this one"
        )


def read_classifier(bundle: Bundle, given: Path | None) -> Classifier | str:
    """The classifier of the bundle's gradient in torch, or why there is none; raises RequestError for another file."""
    entry = bundle.manifest.classifier
    if entry is None:
        if given is not None:
            raise RequestError(f"{bundle.path} holds no classifier; export it again with --classifier {given}")
        return "the bundle holds no classifier; export it with --classifier FILE"
    if given is None:
        return "the peers' gradient needs the classifier's file; give it with --classifier"
    if file_sha256(_existing(given)) != entry.checkpoint_sha256:
        raise RequestError(f"{given} is not the classifier in {bundle.path}; pass the file it was exported with")
    widths = {block.head_dim for block in entry.config.blocks if isinstance(block, Attention)}
    facts = {"num_head_channels": widths.pop()} if len(widths) == 1 else {}
    # The loader asks for a schedule, on which a classifier does not depend.
    read = load_checkpoint(
        given, family="openai-guided", image_size=entry.config.image_size, noise_schedule="cosine", **facts
    ).classifier()
    if read.config != entry.config:
        raise BundleError(f"{given} does not read back as the classifier in the bundle; export the bundle again")
    return read


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise RequestError(f"{path} is no file; pass an existing one")
    return path
