"""Who takes part: ours, plain loops around the same network in other libraries, and other projects' pipelines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from benchmarks import peer_networks as networks
from benchmarks.peer_diffusers import DiffusersContender, network_for
from benchmarks.peer_loops import Task, classifier_gradient, reason_against_steps, run_loop
from benchmarks.peer_lucidrains import LucidrainsContender
from benchmarks.peer_networks import OpenNetwork
from benchmarks.peer_turns import Gate, open_gate
from engine.backends.protocol import Backend
from engine.bundle.folder import Bundle
from engine.diffusion.guidance import ClassifierGuidance, Guide
from engine.diffusion.prediction import Diffusion
from engine.errors import BackendError, RequestError
from engine.networks.classifier import Classifier
from engine.networks.config import UNetConfig
from engine.networks.inputs import UNCONDITIONED, Conditions
from engine.networks.unet import UNet
from engine.sampling.requests import Request
from engine.sampling.sampler import Sampler

OURS = "UNet-RT"


class Contender(Protocol):
    """Something that makes images from the same network. name: in the report. precision: "fp32", "bf16" or "fp16".

    is_compiled: by torch.compile, in every process anew.
    """

    name: str
    precision: str
    is_compiled: bool

    def reason_against(self, task: Task) -> str | None:
        """Why it cannot do a task, or None."""
        ...

    def run(self, task: Task, gate: Gate) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] on the CPU; calls the network through the gate."""
        ...


def _nothing() -> None:
    """What most contenders need before they open."""


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contender that is not open yet. open: raises UNetRTError or RuntimeError where it cannot be here.

    prepare: what is done once before, and not counted as opening: an export. It raises the same. takes_as_long_as: the
    name of an entrant before it, where opening takes long.
    """

    name: str
    open: Callable[[], Contender]
    prepare: Callable[[], object] = _nothing
    takes_as_long_as: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What all of them run. unet: the bundle's network in fp32 torch on the CPU, never changed.

    checkpoint: the file or folder that the bundle was exported from, where it is known. classifier: in fp32 torch, or
    why there is none. folder: for files that contenders need. threads: of a CPU, None for each library's default.
    """

    bundle: Bundle
    unet: UNet
    classifier: Classifier | str
    checkpoint: Path | None
    device: torch.device
    batch: int
    threads: int | None
    folder: Path

    @property
    def config(self) -> UNetConfig:
        return self.bundle.manifest.config

    @property
    def diffusion(self) -> Diffusion:
        return self.bundle.manifest.diffusion

    @property
    def family(self) -> str:
        return self.bundle.manifest.family

    def open_ours(self, backend: str = "auto", precision: str | None = None) -> Contender:
        """Our sampler on the backend of a name, with the bundle's gradient where it has one."""
        sampler = Sampler.open(self.bundle, backend, precision, self.threads)
        has_classifier = self.bundle.manifest.classifier is not None
        return OursContender(sampler, sampler.classifier_guidance().guide if has_classifier else None)


def entrants_of(subject: Subject) -> tuple[Entrant, ...]:
    """Ours first, then from the most to the least usual."""
    export = cache(partial(_export, subject))
    loops: dict[str, Callable[[], OpenNetwork]] = {
        "PyTorch eager": lambda: networks.eager(subject.unet, subject.device),
        "torch.compile": lambda: networks.compiled(subject.unet, subject.device),
    }
    exported: dict[str, Callable[[], OpenNetwork]] = {
        "ONNX Runtime": lambda: networks.onnxruntime_network(export(), subject.config, subject.device, subject.threads),
        "OpenVINO": lambda: networks.openvino_network(export(), subject.config, subject.device, subject.threads),
        "OpenVINO bf16": lambda: networks.openvino_network(
            export(), subject.config, subject.device, subject.threads, bf16=True
        ),
    }
    return (
        Entrant(OURS, subject.open_ours),
        Entrant(f"{OURS} in fp32", partial(_ours_in_fp32, subject)),
        Entrant(f"{OURS} in int8", partial(subject.open_ours, "native", "int8")),
        *(Entrant(name, partial(_loop, name, made, subject)) for name, made in loops.items()),
        *(Entrant(name, partial(_loop, name, made, subject), export) for name, made in exported.items()),
        Entrant("TensorRT", partial(_loop, "TensorRT", partial(_tensorrt, subject), subject)),
        Entrant("diffusers", partial(_diffusers, subject, False)),
        Entrant("diffusers + torch.compile", partial(_diffusers, subject, True), _nothing, "torch.compile"),
        Entrant("denoising-diffusion-pytorch", partial(_lucidrains, subject)),
    )


def _ours_in_fp32(subject: Subject) -> Contender:
    """What compares with the peers that compute in fp32, where auto takes another precision."""
    if subject.open_ours().precision == "fp32":
        raise BackendError("ours is in fp32 already")
    return subject.open_ours(precision="fp32")


def _loop(name: str, opened: Callable[[], OpenNetwork], subject: Subject) -> Contender:
    return LoopContender(name, opened(), subject)


def _export(subject: Subject) -> Path:
    unet = networks.half(subject.unet) if subject.device.type == "cuda" else subject.unet
    return networks.plain_export(unet, subject.batch, subject.folder / "plain.onnx")


def _tensorrt(subject: Subject) -> OpenNetwork:
    folder = subject.folder / "tensorrt"
    folder.mkdir()
    return networks.tensorrt_network(subject.unet, subject.bundle.manifest, subject.batch, folder)


def _diffusers(subject: Subject, is_compiled: bool) -> Contender:
    folder = subject.checkpoint if subject.family == "diffusers" else None
    unet = network_for(folder, subject.config, subject.unet.state_dict())
    return DiffusersContender(unet, subject.config, subject.diffusion, subject.device, is_compiled)


def _lucidrains(subject: Subject) -> Contender:
    if subject.family != "lucidrains":
        raise BackendError(f"its architecture is another: this network is of the family {subject.family}")
    if subject.checkpoint is None:
        raise BackendError("it needs the file that the bundle was exported from; give it with --checkpoint")
    return LucidrainsContender(subject.checkpoint, subject.bundle.manifest, subject.device)


class _GatedBackend:
    """A backend whose every call goes through a gate. also: what else belongs to a step, repeated with it."""

    def __init__(self, backend: Backend, gate: Gate, also: Callable[[Tensor, Tensor], object] | None) -> None:
        self.name, self.precision, self.device = backend.name, backend.precision, backend.device
        self.manifest = backend.manifest
        self._backend, self._gate, self._also = backend, gate, also

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        call = partial(self._backend, x_t, timestep, conditions)

        def again() -> None:
            call()
            if self._also is not None:
                self._also(x_t, timestep)

        return self._gate(call, again)

    def close(self) -> None:
        """The backend stays open for its owner."""


class OursContender:
    """Sampler with the backend that it was opened with; x_T of DDIM is given to it, all other noise is its own."""

    def __init__(self, sampler: Sampler, guide: Guide | None) -> None:
        backend, self.is_compiled = sampler.backend, False
        self.name, self.precision = f"{OURS} ({backend.name} {backend.precision})", backend.precision
        self._sampler, self._guide = sampler, guide

    def reason_against(self, task: Task) -> str | None:
        """Why it cannot do a task, or None."""
        return "the bundle holds no classifier" if task.guided and self._guide is None else None

    def run(self, task: Task, gate: Gate) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] on the CPU."""
        guidance, also = None, None
        if task.guided:
            assert self._guide is not None
            guidance = ClassifierGuidance(self._guide, task.scale)
            y, scale = torch.tensor(task.classes), torch.full((task.batch,), task.scale)
            also = partial(_gradient, guidance, y, scale)
        sampler = self._sampler
        if gate is not open_gate:
            gated = _GatedBackend(sampler.backend, gate, also)
            sampler = Sampler(gated)
        images = torch.empty(task.batch, sampler.config.in_channels, *sampler.config.image_size)
        for step in sampler.run(self._requests(sampler, task, guidance), self._guide, batch_size=task.batch):
            if step.is_last:
                images[step.request.index] = step.x_prev
        return images.clamp(-1, 1)

    def _requests(self, sampler: Sampler, task: Task, guidance: ClassifierGuidance | None) -> list[Request]:
        steps = task.setting.timesteps(sampler.diffusion).tolist()
        is_labelled = sampler.config.num_classes is not None or guidance is not None
        labels = list(task.classes) if is_labelled else None
        seed, name = task.seed * task.batch, task.setting.sampler
        made = sampler.requests(task.batch, steps=steps, sampler=name, labels=labels, seed=seed, guidance=guidance)
        given = task.labels(sampler.config)
        if given is not None:
            parts = [Conditions(torch.tensor([label])) for label in given]
            made = [dataclasses.replace(r, conditions=part) for r, part in zip(made, parts, strict=True)]
        if task.setting.sampler == "ddim":
            starts = task.start(sampler.config, sampler.backend.device).cpu()
            made = [dataclasses.replace(request, x_start=x) for request, x in zip(made, starts, strict=True)]
        return made


def _gradient(guidance: ClassifierGuidance, y: Tensor, scale: Tensor, x_t: Tensor, timestep: Tensor) -> object:
    return guidance.guide(x_t, timestep, y, scale)


class LoopContender:
    """A plain loop around a network, with a classifier's gradient by torch autograd where guided."""

    def __init__(self, name: str, network: OpenNetwork, subject: Subject) -> None:
        self.name, self.precision, self.is_compiled = name, network.precision, network.is_compiled
        self._network, self._subject = network, subject
        self._classifier = subject.classifier
        if not isinstance(self._classifier, str) and subject.device.type == "cuda":
            self._classifier = self._classifier.to(subject.device)

    def reason_against(self, task: Task) -> str | None:
        """Why it cannot do a task, or None."""
        if task.guided and isinstance(self._classifier, str):
            return self._classifier
        return reason_against_steps(self._subject.diffusion, task.setting)

    def run(self, task: Task, gate: Gate) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] on the CPU."""
        network, gradient = self._network.call, None
        if task.guided:
            network = self._network.beside_torch or network
            if isinstance(self._classifier, str):
                raise RequestError(self._classifier)
            gradient = classifier_gradient(self._classifier, task, self._subject.device)
        return run_loop(
            network,
            self._subject.config,
            self._subject.diffusion,
            task,
            gate,
            gradient,
            device=self._subject.device,
        )
