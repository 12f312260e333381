"""What a step program keeps in device memory: the slots' state and the arena of sampler tables.

The layout, B slots and an arena of R rows (all contiguous, allocated once, at addresses that stay):

    arena        [R, len(COLUMNS)] float32   rows of coefficients; row 0 is the identity row, on which empty slots rest
    active       [R, 2] float32              1 where classifier-free and where classifier guidance act in that row
    row, last    [B] int32                   rows in the arena; each replay sets row = min(row + 1, last)
    seed_low, seed_high  [B] int32           the words of the seed, as bit patterns
    draw         [B] int32                   of the next step's noise; it rises by 1 with every replay
    x_t, x0      [B, C, H, W] float32        x0 of the step before; 0 when an image enters
    older        [3, B, C, H, W] float32     outs that rows with push have kept, newest first
    conditions   [2, B, ...] each by name    what the network is given, and the other half of classifier-free guidance
    arrived      [B] int32                   scratch of kernels.triton.update; 0 between steps
    threshold    [B] float32                 scratch of kernels.triton.update

Each table is followed by an identity row of its own (Q = 1), which is its images' `last`: a finished image stays as
it is until the host fetches it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.device import Device
from engine.diffusion.guidance import Interval
from engine.diffusion.solvers import COLUMNS, StepTable
from engine.errors import RequestError
from engine.networks.config import LabelInput, UNetConfig
from engine.sampling.step import OLDER, active_rows, has_thresholds, is_multistep, table_key

LEAST_ARENA_ROWS = 16384
"""1.5 MB; sixteen different tables of 1000 steps."""

_ROWS_PER_SLOT = 1024
_INTS = ("row", "last", "seed_low", "seed_high", "draw")
_FLOATS = ("scale", "strength", "rescale", "removed", "plus_plus")


@dataclass(frozen=True, slots=True, eq=False)
class SlotState:
    """Device memory of B slots; see the module. ints, floats: [5, B], of which the named ones are rows.

    conditions: by name, the names and shapes of engine.networks.inputs.Conditions with a first axis of two halves, with
    and without. class_label [B] int64 and scale are the classifier's, the other numbers those of
    engine.sampling.step.guided_out. known, mask: [B, C, H, W]; a mask of 1 keeps nothing.
    """

    arena: Tensor
    active: Tensor
    ints: Tensor
    floats: Tensor
    x_t: Tensor
    x0: Tensor
    older: Tensor
    conditions: Mapping[str, Tensor]
    class_label: Tensor
    known: Tensor
    mask: Tensor
    arrived: Tensor
    threshold: Tensor

    @property
    def capacity(self) -> int:
        return len(self.x_t)

    @property
    def row(self) -> Tensor:
        return self.ints[0]

    @property
    def last(self) -> Tensor:
        return self.ints[1]

    @property
    def seed_low(self) -> Tensor:
        return self.ints[2]

    @property
    def seed_high(self) -> Tensor:
        return self.ints[3]

    @property
    def draw(self) -> Tensor:
        return self.ints[4]

    def number(self, name: str) -> Tensor:
        """[B] float32: scale, strength, rescale, removed or plus_plus."""
        return self.floats[_FLOATS.index(name)]


def allocate_state(device: Device, config: UNetConfig, capacity: int) -> SlotState:
    """Zeroed state for `capacity` slots, all of them resting."""
    image = (config.in_channels, *config.image_size)
    rows = max(LEAST_ARENA_ROWS, _ROWS_PER_SLOT * capacity)

    def floats(*shape: int) -> Tensor:
        return device.allocate(shape, torch.float32)

    state = SlotState(
        arena=floats(rows, len(COLUMNS)),
        active=floats(rows, 2),
        ints=device.allocate((len(_INTS), capacity), torch.int32),
        floats=floats(len(_FLOATS), capacity),
        x_t=floats(capacity, *image),
        x0=floats(capacity, *image),
        older=floats(OLDER, capacity, *image),
        conditions={
            name: device.allocate((2, capacity, *shape), dtype)
            for name, (shape, dtype) in _condition_shapes(config).items()
        },
        class_label=device.allocate((capacity,), torch.int64),
        known=floats(capacity, *image),
        mask=floats(capacity, *image),
        arrived=device.allocate((capacity,), torch.int32),
        threshold=floats(capacity),
    )
    device.copy_in(state.arena[0], torch.from_numpy(identity_row(0.0)))
    device.copy_in(state.mask, torch.ones(()))
    return state


def _condition_shapes(config: UNetConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each condition of one image; the x0 of self-conditioning is no condition of a request."""
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if config.num_classes is not None:
        label = (config.label_channels,) if config.label is LabelInput.VECTOR else ()
        shapes["label"] = (label, torch.int64 if config.label is LabelInput.TABLE else torch.float32)
    if config.cond_channels > 0 and not config.self_condition:
        shapes["image"] = ((config.cond_channels, *config.image_size), torch.float32)
    return shapes


def identity_row(timestep: float) -> np.ndarray:
    """[len(COLUMNS)] float32: x_prev = x_t. timestep: any that the network knows."""
    row = np.zeros(len(COLUMNS), dtype=np.float32)
    row[COLUMNS.index("Q")] = 1.0
    row[COLUMNS.index("clip")] = np.inf
    row[COLUMNS.index("timestep")] = timestep
    return row


class HostSlots:
    """The host's copy of the small per-slot numbers; it advances as the device does and is never read back."""

    def __init__(self, capacity: int) -> None:
        self.ints = np.zeros((len(_INTS), capacity), dtype=np.int32)
        self.floats = np.zeros((len(_FLOATS), capacity), dtype=np.float32)

    @property
    def row(self) -> np.ndarray:
        return self.ints[0]

    @property
    def last(self) -> np.ndarray:
        return self.ints[1]

    def enter(self, slot: int, first: int, last: int, seed: int, numbers: tuple[float, ...]) -> None:
        """numbers: scale and those of classifier-free guidance, in the order of SlotState.number."""
        words = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32).view(np.int32)
        self.ints[:, slot] = (first, last, *words, 1)
        self.floats[:, slot] = numbers

    def rest(self, slot: int) -> None:
        """Put a slot on the identity row at the start of the arena."""
        self.ints[:, slot] = 0
        self.floats[:, slot] = 0

    def advance(self) -> None:
        """What a replay does on the device."""
        np.minimum(self.ints[0] + 1, self.ints[1], out=self.ints[0])
        self.ints[4] += 1


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A table in the arena: rows first to last, the latter its identity row.

    free_active, guide_active: [N + 1] bool, the rows at which classifier-free and classifier guidance act. is_noisy,
    thresholds, multistep: whether some row adds noise, has a dynamic threshold, or keeps or takes outs of other rows.
    """

    first: int
    last: int
    free_active: np.ndarray
    guide_active: np.ndarray
    is_noisy: bool
    thresholds: bool
    multistep: bool


class Arena:
    """Puts tables into the arena, each once by the value of its rows and by the intervals of guidance.

    A table that no image uses stays only until its room is needed. timestep_scale: what the network's timesteps are
    multiples of.
    """

    def __init__(self, device: Device, state: SlotState, timestep_scale: float) -> None:
        self._device, self._state, self._scale = device, state, timestep_scale
        self._placed: dict[tuple[bytes, Interval, Interval], Placed] = {}

    def place(self, table: StepTable, free: Interval, guide: Interval, used: set[int]) -> Placed:
        """Where a table lies, after putting it there.

        free, guide: the intervals of classifier-free and of classifier guidance. used: first rows of the tables of
        images in progress. Raises RequestError where there is no room beside those.
        """
        key = (table_key(table), free, guide)
        if key not in self._placed:
            first = self._room(len(table) + 1, used)
            self._placed[key] = self._write(table, free, guide, first)
        return self._placed[key]

    def _room(self, rows: int, used: set[int]) -> int:
        """The first of `rows` free rows in a line."""
        for kept in (list(self._placed.items()), [item for item in self._placed.items() if item[1].first in used]):
            self._placed = dict(kept)
            start = 1
            for placed in sorted(self._placed.values(), key=lambda p: p.first):
                if placed.first - start >= rows:
                    return start
                start = placed.last + 1
            if len(self._state.arena) - start >= rows:
                return start
        raise RequestError(
            f"a table of {rows - 1} steps does not fit beside those of the images in progress, in an arena of "
            f"{len(self._state.arena)} rows; use fewer steps, fewer different tables or a smaller batch"
        )

    def _write(self, table: StepTable, free: Interval, guide: Interval, first: int) -> Placed:
        rows = table.to_array().astype(np.float32)
        free_active, guide_active = (
            np.append(active_rows(table, interval, self._scale), False) for interval in (free, guide)
        )
        flags = np.stack([free_active, guide_active], axis=1).astype(np.float32)
        whole = np.concatenate([rows, identity_row(float(table.timestep[-1]))[None]])
        end = first + len(whole)
        self._device.copy_in(self._state.arena[first:end], torch.from_numpy(whole))
        self._device.copy_in(self._state.active[first:end], torch.from_numpy(flags))
        noise, thresholds = bool(table.S.any()), has_thresholds(table)
        return Placed(first, end - 1, free_active, guide_active, noise, thresholds, is_multistep(table))
