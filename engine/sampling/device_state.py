"""What a step program keeps in device memory: the slots' state and the arena of sampler tables.

The layout, B slots and an arena of R rows (all contiguous, allocated once, at addresses that stay):

    arena        [R, len(COLUMNS)] float32   rows of coefficients; row 0 is the identity row, on which empty slots rest
    active       [R, 2] float32              1 where classifier-free and where classifier guidance act in that row
    row, last    [B] int32                   rows in the arena; each replay sets row = min(row + 1, last)
    seed_low, seed_high  [B] int32           the words of the seed, as bit patterns
    draw         [B] int32                   of the next step's noise; it rises by 1 with every replay
    x_t, x0      [B, C, H, W] float32        x0 of the step before; 0 when an image enters
    older        [3, B, C, H, W] float32     outs that rows with push have kept, newest first
    arrived      [B] int32                   scratch of kernels.triton.update; 0 between steps
    threshold    [B] float32                 scratch of kernels.triton.update

Each table is followed by an identity row of its own (Q = 1), which is its images' `last`: a finished image stays as
it is until the host fetches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.device import Device
from engine.diffusion.guidance import Interval, is_within
from engine.diffusion.solvers import COLUMNS, StepTable
from engine.errors import RequestError
from engine.networks.config import LabelInput, UNetConfig

LEAST_ARENA_ROWS = 16384
"""1.5 MB; sixteen different tables of 1000 steps."""

_ROWS_PER_SLOT = 1024
_INTS = ("row", "last", "seed_low", "seed_high", "draw")
_FLOATS = ("scale", "cfg_scale", "cfg_rescale", "cfg_parallel", "cfg_plus_plus")


@dataclass(frozen=True, slots=True, eq=False)
class SlotState:
    """Device memory of B slots; see the module. ints, floats: [5, B], of which the named ones are rows.

    label: [B] int64, or [B] or [B, D] float32, of the network; class_label [B] int64 and scale of the classifier.
    cfg_*: of classifier-free guidance. cond: [B, Cc, H, W] or None. known, mask: [B, C, H, W]; a mask of 1 keeps
    nothing.
    """

    arena: Tensor
    active: Tensor
    ints: Tensor
    floats: Tensor
    x_t: Tensor
    x0: Tensor
    older: Tensor
    label: Tensor
    class_label: Tensor
    cond: Tensor | None
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
        """[B] float32: scale, cfg_scale, cfg_rescale, cfg_parallel or cfg_plus_plus."""
        return self.floats[_FLOATS.index(name)]

    @property
    def written_by_a_step(self) -> tuple[Tensor, ...]:
        """What a replay changes."""
        return self.ints, self.x_t, self.x0, self.older


def allocate_state(device: Device, config: UNetConfig, capacity: int) -> SlotState:
    """Zeroed state for `capacity` slots, all of them resting."""
    image = (config.in_channels, *config.image_size)
    rows = max(LEAST_ARENA_ROWS, _ROWS_PER_SLOT * capacity)
    label = (capacity, config.time_channels) if config.label is LabelInput.VECTOR else (capacity,)
    has_cond = config.cond_channels > 0 and not config.self_condition

    def floats(*shape: int) -> Tensor:
        return device.allocate(shape, torch.float32)

    state = SlotState(
        arena=floats(rows, len(COLUMNS)),
        active=floats(rows, 2),
        ints=device.allocate((len(_INTS), capacity), torch.int32),
        floats=floats(len(_FLOATS), capacity),
        x_t=floats(capacity, *image),
        x0=floats(capacity, *image),
        older=floats(3, capacity, *image),
        label=device.allocate(label, torch.int64 if config.label is LabelInput.TABLE else torch.float32),
        class_label=device.allocate((capacity,), torch.int64),
        cond=floats(capacity, config.cond_channels, *config.image_size) if has_cond else None,
        known=floats(capacity, *image),
        mask=floats(capacity, *image),
        arrived=device.allocate((capacity,), torch.int32),
        threshold=floats(capacity),
    )
    device.copy_in(state.arena[0], torch.from_numpy(identity_row(0.0)))
    device.copy_in(state.mask, torch.ones(()))
    return state


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
    """A table in the arena: rows first to last, the latter its identity row; where guidance acts, [N + 1] each.

    has_extras: dynamic thresholds or outs of rows before.
    """

    table: StepTable
    first: int
    cfg_active: np.ndarray
    guide_active: np.ndarray
    is_noisy: bool
    has_extras: bool

    @property
    def last(self) -> int:
        return self.first + len(self.table)


class Arena:
    """Puts tables into the arena, and takes those that no image uses out of it when room is needed.

    timestep_scale: what the network's timesteps are multiples of. guide_interval: of classifier guidance.
    """

    def __init__(self, device: Device, state: SlotState, timestep_scale: float, guide_interval: Interval) -> None:
        self._device, self._state = device, state
        self._scale, self._guide_interval = timestep_scale, guide_interval
        self._placed: dict[tuple[int, Interval], Placed] = {}

    def place(self, table: StepTable, cfg_interval: Interval, used: set[int]) -> Placed:
        """Where a table lies, after putting it there; used: first rows of the tables of images in progress.

        Raises RequestError where there is no room beside those.
        """
        key = (id(table), cfg_interval)
        if key not in self._placed:
            first = self._room(len(table) + 1, used)
            self._placed[key] = self._write(table, cfg_interval, first)
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

    def _write(self, table: StepTable, cfg_interval: Interval, first: int) -> Placed:
        rows = table.to_array().astype(np.float32)
        times = table.timestep / self._scale
        cfg = np.array([is_within(t, cfg_interval) for t in times] + [False])
        guide = np.array([is_within(t, self._guide_interval) for t in times] + [False])
        whole = np.concatenate([rows, identity_row(float(table.timestep[-1]))[None]])
        end = first + len(whole)
        self._device.copy_in(self._state.arena[first:end], torch.from_numpy(whole))
        flags = np.stack([cfg, guide], axis=1).astype(np.float32)
        self._device.copy_in(self._state.active[first:end], torch.from_numpy(flags))
        has_extras = any(getattr(table, name).any() for name in ("percentile", "push", "O1", "O2", "O3"))
        return Placed(table, first, cfg, guide, bool(table.S.any()), has_extras)
