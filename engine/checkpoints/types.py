"""What a checkpoint is in our terms, and what a translator returns of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.checkpoints.facts import Facts, flag
from engine.diffusion.prediction import Diffusion
from engine.errors import CheckpointError
from engine.networks.classifier import Classifier
from engine.networks.config import ClassifierConfig, UNetConfig
from engine.networks.unet import UNet


@dataclass(frozen=True, slots=True)
class Assumption:
    """A fact that neither file nor user gave: what was taken instead, and why."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        shown = "x".join(map(str, self.value)) if isinstance(self.value, tuple) else self.value
        return f"{self.name} = {shown} ({self.reason}; change it with {flag(self.name)})"


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A trained network in our terms; nothing here depends on the project that trained it.

    family: the translator's name. config: what the network is.
    weights: float32 tensors under the parameter names of engine.networks.unet.UNet or
    engine.networks.classifier.Classifier.
    diffusion: schedule, prediction and sampling conventions. assumptions: every default that was taken.
    sha256: of the file, in hexadecimal digits.
    """

    family: str
    config: UNetConfig | ClassifierConfig
    weights: Mapping[str, Tensor]
    diffusion: Diffusion
    assumptions: tuple[Assumption, ...]
    sha256: str

    @property
    def is_classifier(self) -> bool:
        """Whether it is a noise-conditioned classifier, and not a U-Net."""
        return isinstance(self.config, ClassifierConfig)

    def unet(self) -> UNet:
        """The fp32 network in evaluation mode, without gradients; raises CheckpointError for a classifier."""
        if not isinstance(self.config, UNetConfig):
            raise CheckpointError("this checkpoint is a classifier; a U-Net checkpoint is needed here")
        return build_unet(self.config, self.weights)

    def classifier(self) -> Classifier:
        """The fp32 classifier in evaluation mode; raises CheckpointError for a U-Net."""
        if not isinstance(self.config, ClassifierConfig):
            raise CheckpointError("this checkpoint is a U-Net; a noise-conditioned classifier is needed here")
        with torch.device("meta"):
            model = Classifier(self.config)
        model.load_state_dict(dict(self.weights), assign=True)
        return model.eval().requires_grad_(False)


def build_unet(config: UNetConfig, weights: Mapping[str, Tensor]) -> UNet:
    """The network with these weights (shared, not copied), in evaluation mode, without gradients."""
    with torch.device("meta"):
        model = UNet(config)
    model.load_state_dict(dict(weights), assign=True)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True, eq=False)
class Translation:
    """What a family's translator returns: the parts of a Checkpoint that do not come from the file system."""

    family: str
    config: UNetConfig | ClassifierConfig
    weights: dict[str, Tensor]
    diffusion: Diffusion
    assumptions: tuple[Assumption, ...]


class Assumptions:
    """Collects the defaults that a translator takes."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._made: list[Assumption] = []

    def take(self, name: str, default: Any, reason: str) -> Any:
        """The user's fact, or the default, which is then recorded with its reason."""
        given = getattr(self._facts, name)
        if given is not None:
            return given
        self._made.append(Assumption(name, default, reason))
        return default

    def given(self, name: str) -> Any:
        """The user's fact, or None."""
        return getattr(self._facts, name)

    def made(self) -> tuple[Assumption, ...]:
        return tuple(self._made)
