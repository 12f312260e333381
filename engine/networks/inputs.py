"""A U-Net's inputs as one value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """One call: x_t [B, C, H, W], timestep [B], y [B] int64 or None, cond [B, Cc, H, W] or None."""

    x_t: Tensor
    timestep: Tensor
    y: Tensor | None
    cond: Tensor | None

    @property
    def is_single(self) -> bool:
        return len(self.x_t) == 1

    def inputs(self) -> dict[str, Tensor]:
        """The inputs this network has, by name."""
        named = {"x_t": self.x_t, "timestep": self.timestep, "y": self.y, "cond": self.cond}
        return {name: value for name, value in named.items() if value is not None}

    def image(self, index: int) -> Inputs:
        """One image of the batch, as a batch of one."""
        return Inputs(
            self.x_t[index, None],
            self.timestep[index, None],
            None if self.y is None else self.y[index, None],
            None if self.cond is None else self.cond[index, None],
        )


def join_inputs(cases: Sequence[Inputs]) -> Inputs:
    """Cases of one network as one batch."""
    columns = [case.inputs() for case in cases]
    joined = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    return Inputs(joined["x_t"], joined["timestep"], joined.get("y"), joined.get("cond"))
