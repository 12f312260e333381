"""Something that makes images by whole sampling calls, of which the time is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.peers.ddim_loop import Task


def _nothing() -> None:
    """What most contenders need before they open."""


def _none(task: Task) -> None:
    """No reason: what a contender says that can do every task."""


@dataclass(frozen=True, slots=True, eq=False)
class Contender:
    """name: in the report. precision: "fp32", "bf16", "fp16" or "int8", what its network computes in.

    sample: a whole sampling call, images [B, C, H, W] in [-1, 1] on the CPU. reason_against: why it cannot do a task,
    or None. is_compiled: by torch.compile, whose code is another in every process.
    """

    name: str
    precision: str
    sample: Callable[[Task], Tensor]
    reason_against: Callable[[Task], str | None] = _none
    is_compiled: bool = False


@dataclass(frozen=True, slots=True)
class Entrant:
    """A contender that is not open yet. open: raises UNetRTError or RuntimeError where it cannot be here.

    prepare: what is done once before and is not part of opening, an export say; it raises the same.
    """

    name: str
    open: Callable[[], Contender]
    prepare: Callable[[], object] = _nothing
