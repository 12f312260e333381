"""One guided step of all slots as work that is only enqueued: network, gradient, guidance, update.

inputs      x_t, timestep (the row's), label and condition into the network's buffers, twice where it is doubled
gradient    the classifier's, on a stream of its own beside the network
network     the U-Net, on the main stream
update      kernels.reference.solver_update with each slot's row and Philox noise; row = min(row + 1, last)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.backends.protocol import Bound, Capturable
from engine.device import Device
from engine.diffusion.guidance import guided_outs
from engine.diffusion.noise import INPAINTING, NOISE
from engine.diffusion.prediction import Prediction
from engine.diffusion.solvers import COLUMNS
from engine.networks.config import UNetConfig
from engine.sampling.device_state import SlotState
from kernels.philox import philox_normal
from kernels.reference import Coefficients, Known, limit_x0, solver_update

_TIMESTEP, _PUSH = COLUMNS.index("timestep"), COLUMNS.index("push")
_COEFFICIENTS = tuple(name for name in COLUMNS if name in Coefficients.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Variant:
    """What a step does, as the images in the slots need it at their rows.

    gradient: calls the classifier. doubled: the network also runs without labels, for classifier-free guidance.
    noise: some table adds noise. extras: some image has a dynamic threshold, a known part, multistep rows, or
    classifier-free guidance with more than a scale.
    """

    gradient: bool = False
    doubled: bool = False
    noise: bool = False
    extras: bool = False


class Update(Protocol):
    """The end of a step: x_t, x0 and older of every slot by its row; then row = min(row + 1, last), draw += 1."""

    def __call__(
        self, state: SlotState, out: Tensor, grad: Tensor | None, raw_out: Tensor | None, variant: Variant
    ) -> None:
        """out [B, C', H, W]; grad and raw_out [B, C, H, W] or None, as in kernels.reference.solver_update."""
        ...


def torch_update(state: SlotState, out: Tensor, grad: Tensor | None, raw_out: Tensor | None, variant: Variant) -> None:
    """The Update in plain torch, on any device: the reference itself."""
    rows = state.arena.index_select(0, state.row)
    row = _coefficients(rows, variant)
    x_prev, x0 = solver_update(
        row,
        state.x_t,
        out,
        x0_before=state.x0,
        grad=grad,
        noise=_draw(state, NOISE) if variant.noise else None,
        known=Known(state.known, state.mask, _draw(state, INPAINTING)) if variant.extras else None,
        older=state.older if variant.extras else None,
        raw_out=raw_out,
    )
    if variant.extras:
        newest = torch.cat([out[None, :, : state.x_t.shape[1]], state.older[:-1]])
        pushes = rows[None, :, _PUSH, None, None, None] != 0
        state.older.copy_(torch.where(pushes, newest, state.older))
    state.x_t.copy_(x_prev)
    state.x0.copy_(x0)
    state.row.copy_(torch.minimum(state.row + 1, state.last))
    state.draw.add_(1)


def _coefficients(rows: Tensor, variant: Variant) -> Coefficients:
    columns = rows[:, :, None, None, None]
    values = {name: columns[:, COLUMNS.index(name)] for name in _COEFFICIENTS}
    return Coefficients(**values if variant.extras else values | {"percentile": None})


def _draw(state: SlotState, stream: int) -> Tensor:
    shape = tuple(state.x_t.shape[1:])
    return philox_normal(state.seed_low, state.seed_high, state.draw, shape, stream)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A network with the buffers that it was bound to; copies is 2 where it is doubled."""

    bound: Bound
    buffers: Mapping[str, Tensor]
    copies: int


class StepProgram:
    """Enqueues one step of every slot. Buffers are allocated and networks bound by prepare(), never by a step.

    network: a Capturable backend. guide: a Capturable gradient, or None.
    """

    def __init__(
        self,
        device: Device,
        state: SlotState,
        config: UNetConfig,
        prediction: Prediction,
        network: Capturable,
        guide: Capturable | None = None,
        update: Update = torch_update,
    ) -> None:
        self._device, self._state, self._config, self._prediction = device, state, config, prediction
        self._network, self._guide, self._update = network, guide, update
        self._calls: dict[bool, _Call] = {}
        self._gradient: _Call | None = None
        self._side = device.stream() if guide is not None else None
        self._fork, self._join = device.event(), device.event()

    def prepare(self, variant: Variant) -> None:
        """Allocate and bind what a variant needs and is not there yet."""
        if variant.doubled not in self._calls:
            self._calls[variant.doubled] = self._bind_network(2 if variant.doubled else 1)
        if variant.gradient and self._gradient is None:
            assert self._guide is not None
            self._gradient = self._bind_guide(self._guide)

    def check_capturable(self, variant: Variant) -> None:
        """Raises BackendError where a step cannot be captured."""
        self._calls[variant.doubled].bound.check_capturable(self._device.main)
        if variant.gradient and self._gradient is not None and self._side is not None:
            self._gradient.bound.check_capturable(self._side)

    def enqueue(self, variant: Variant) -> None:
        """One step of all slots, on the device's main stream."""
        with self._device.use(self._device.main), torch.no_grad():
            timestep = self._state.arena[:, _TIMESTEP].index_select(0, self._state.row)
            gradient = self._start_gradient(timestep) if variant.gradient else None
            call = self._calls[variant.doubled]
            self._fill(call, timestep)
            call.bound.enqueue(self._device.main)
            if gradient is not None:
                self._device.main.wait_event(self._join)
            out, raw_out = self._guided(call, variant)
            grad = None if gradient is None else gradient.buffers["grad"][: self._state.capacity]
            self._update(self._state, out, grad, raw_out, variant)

    def _start_gradient(self, timestep: Tensor) -> _Call:
        """Fill the classifier's inputs on the main stream and run it on its own."""
        call, state, side = self._gradient, self._state, self._side
        assert call is not None
        assert side is not None
        is_active = state.active[:, 1].index_select(0, state.row)
        self._fill(call, timestep)
        call.buffers["scale"][: state.capacity].copy_(state.number("scale") * is_active)
        self._device.main.record_event(self._fork)
        side.wait_event(self._fork)
        with self._device.use(side):
            call.bound.enqueue(side)
        side.record_event(self._join)
        return call

    def _fill(self, call: _Call, timestep: Tensor) -> None:
        """The slots' inputs into a network's buffers, as often as it has them; what lies beyond stays 0."""
        state, buffers, count = self._state, call.buffers, self._state.capacity
        cond = state.x0 if self._config.self_condition else state.cond
        for first in range(0, call.copies * count, count):
            part = slice(first, first + count)
            buffers["timestep"][part].copy_(timestep)
            if buffers["x_t"] is not state.x_t:
                buffers["x_t"][part].copy_(state.x_t)
            if "image" in buffers and cond is not None:
                buffers["image"][part].copy_(cond)
        labels = state.class_label if "scale" in buffers else state.label
        if "label" in buffers:
            buffers["label"][:count].copy_(labels)

    def _guided(self, call: _Call, variant: Variant) -> tuple[Tensor, Tensor | None]:
        """The network's result after classifier-free guidance, [B, C', H, W], and what E multiplies instead of it."""
        state, count, channels = self._state, self._state.capacity, self._config.in_channels
        out = call.buffers["out"]
        labelled = out[:count]
        if not variant.doubled:
            return labelled, None
        unlabelled = out[count : 2 * count]
        is_active = state.active[:, 0].index_select(0, state.row) != 0
        guided = guided_outs(
            labelled,
            unlabelled,
            is_active,
            state.number("cfg_scale"),
            (state.number("cfg_rescale"), state.number("cfg_parallel")) if variant.extras else None,
            channels,
        )
        if not variant.extras:
            return guided, None
        takes_unlabelled = is_active & (state.number("cfg_plus_plus") != 0)
        without = self._implied(unlabelled[:, :channels], variant)
        return guided, torch.where(takes_unlabelled[:, None, None, None], without, guided[:, :channels])

    def _implied(self, out: Tensor, variant: Variant) -> Tensor:
        """An out [B, C, H, W] with its limited x0 put back into it; CFG++ takes eps from it (see Slots)."""
        if self._prediction is Prediction.EPS:
            return out
        row = _coefficients(self._state.arena.index_select(0, self._state.row), variant)
        x0 = limit_x0(row.A * self._state.x_t + row.B * out, row.clip, row.percentile)
        return (x0 - row.A * self._state.x_t) / row.B

    def _bind_network(self, copies: int) -> _Call:
        config, state = self._config, self._state
        batch = self._network.fit(copies * state.capacity)
        shapes: dict[str, tuple[int, ...]] = {"timestep": (batch,)}
        channels = {"x_t": config.in_channels, "out": config.out_channels}
        if config.cond_channels:
            channels["image"] = config.cond_channels
        shapes |= {name: (batch, number, *config.image_size) for name, number in channels.items()}
        buffers = self._allocate(shapes, batch, copies)
        if config.num_classes is not None:
            buffers["label"] = self._device.allocate((batch, *state.label.shape[1:]), state.label.dtype)
            if copies == 2:
                assert config.null_class is not None
                self._device.copy_in(buffers["label"][state.capacity :], torch.tensor(config.null_class))
        return _Call(self._network.bind(buffers), buffers, copies)

    def _bind_guide(self, guide: Capturable) -> _Call:
        batch, image = guide.fit(self._state.capacity), tuple(self._state.x_t.shape[1:])
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("timestep", "scale", "log_p"), (batch,))
        shapes |= dict.fromkeys(("x_t", "grad"), (batch, *image))
        buffers = self._allocate(shapes, batch, 1)
        buffers["label"] = self._device.allocate((batch,), torch.int64)
        return _Call(guide.bind(buffers), buffers, 1)

    def _allocate(self, shapes: dict[str, tuple[int, ...]], batch: int, copies: int) -> dict[str, Tensor]:
        """float32 buffers by name; x_t is the slots' own where the batches are the same."""
        is_shared = copies == 1 and batch == self._state.capacity
        own = {name: shape for name, shape in shapes.items() if not (is_shared and name == "x_t")}
        buffers = {name: self._device.allocate(shape, torch.float32) for name, shape in own.items()}
        return buffers | ({"x_t": self._state.x_t} if is_shared else {})
