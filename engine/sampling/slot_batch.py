"""What every driver of slots offers: images enter, are stepped together, are looked at, and leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.errors import RequestError
from engine.sampling.requests import Request


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What one step did to one slot, and whether the image is finished.

    images: reads x_prev and x0, which may be a copy from a device, and which must be read before the next step unless
    the image is finished; later it raises RequestError where the slots have gone on.
    """

    request: Request
    is_last: bool
    images: Callable[[], tuple[Tensor, Tensor]]

    @property
    def x_prev(self) -> Tensor:
        """[C, H, W] after the step."""
        return self.images()[0]

    @property
    def x0(self) -> Tensor:
        """[C, H, W] that the step went by."""
        return self.images()[1]


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """x0 of some images in progress, as it was when the snapshot was taken, whatever the slots have done since."""

    slots: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def x0(self) -> Tensor:
        """[len(slots), C, H, W] float32, zeros where no step was done; waits for this copy, not for later steps."""
        return self.read()


class SlotBatch(Protocol):
    """Up to `capacity` images in progress on one backend, each at its own row of its own table.

    A slot is its number, from 0. An image takes nothing of its batch mates: who shares a step with it, and which steps
    it rests for, changes nothing of it.
    """

    @property
    def capacity(self) -> int:
        """How many slots there are."""
        ...

    @property
    def free(self) -> list[int]:
        """The empty slots."""
        ...

    @property
    def is_empty(self) -> bool:
        """Whether no image is in progress."""
        ...

    def enter(self, slot: int, request: Request) -> None:
        """Put an image into an empty slot; raises RequestError where it does not fit the network or these slots."""
        ...

    def leave(self, slot: int) -> None:
        """Drop the image in a slot, finished or not; raises RequestError where there is none."""
        ...

    def step(self, only: Collection[int] | None = None) -> list[Step]:
        """Advance every image by its next row; finished images leave their slots.

        only: the slots to advance, while the others rest as they are; None for all. Returns a Step for each image that
        was advanced, by slot. Raises RequestError for an empty slot in `only`.
        """
        ...

    def snapshot(self, slots: Sequence[int]) -> Snapshot:
        """The latest x0 of these slots, without waiting for the device; raises RequestError for an empty slot."""
        ...


def require_taken(requests: Sequence[object | None], slots: Collection[int]) -> None:
    """Raises RequestError where one of these slots is empty or does not exist; requests: one for each slot, or None."""
    for slot in slots:
        if not 0 <= slot < len(requests):
            raise RequestError(f"slot {slot} does not exist; there are slots 0 to {len(requests) - 1}")
        if requests[slot] is None:
            raise RequestError(f"slot {slot} is empty; name slots with an image in progress")
