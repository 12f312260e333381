"""A U-Net's inputs as values: what an image is made of beyond its noise, and one call with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """What a batch of images is made for; None where the network has no such input.

    label: [B] int64, or [B] or [B, D] float32, as engine.networks.config.LabelInput says. image: [B, Cc, H, W] float32,
    concatenated with x_t: a low-resolution image, say, or the x0 of the step before.
    """

    label: Tensor | None = None
    image: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, by name; the names are those of the ONNX graph's inputs."""
        named = {"label": self.label, "image": self.image}
        return {name: value for name, value in named.items() if value is not None}

    def rows(self, index: Tensor | Sequence[int]) -> Conditions:
        """Those of the images at these positions of the batch, in this order."""
        return Conditions(**{name: value[index] for name, value in self.tensors().items()})

    def to(self, device: torch.device) -> Conditions:
        """The same on a device."""
        return Conditions(**{name: value.to(device) for name, value in self.tensors().items()})


UNCONDITIONED = Conditions()


def join_conditions(parts: Sequence[Conditions]) -> Conditions:
    """Conditions of one network as one batch, in this order."""
    columns = [part.tensors() for part in parts]
    return Conditions(**{name: torch.cat([column[name] for column in columns]) for name in columns[0]})


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One call of a network: x_t [B, C, H, W] float32, timestep [B] float32, and its conditions."""

    x_t: Tensor
    timestep: Tensor
    conditions: Conditions = UNCONDITIONED

    @property
    def is_single(self) -> bool:
        return len(self.x_t) == 1

    def tensors(self) -> dict[str, Tensor]:
        """The inputs that there are, by name; the names are those of the ONNX graph's inputs."""
        return {"x_t": self.x_t, "timestep": self.timestep} | self.conditions.tensors()

    def rows(self, index: Tensor | Sequence[int]) -> Inputs:
        """The images at these positions of the batch, in this order."""
        return Inputs(self.x_t[index], self.timestep[index], self.conditions.rows(index))

    def to(self, device: torch.device) -> Inputs:
        """The same on a device."""
        return Inputs(self.x_t.to(device), self.timestep.to(device), self.conditions.to(device))


def join_inputs(parts: Sequence[Inputs]) -> Inputs:
    """Inputs of one network as one batch, in this order."""
    return Inputs(
        torch.cat([part.x_t for part in parts]),
        torch.cat([part.timestep for part in parts]),
        join_conditions([part.conditions for part in parts]),
    )
