"""One guided step of all slots as work that is only enqueued: network, gradient, guidance, update.

inputs      x_t, timestep (the row's) and conditions into the network's buffers, both halves where it is doubled
gradient    the classifier's, on a stream of its own beside the network
network     the U-Net, on the main stream
update      kernels.reference.solver_update with each slot's row and Philox noise; row = min(row + 1, last)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.backends.protocol import Bound, Capturable
from engine.device import Device
from engine.diffusion.noise import INPAINTING, NOISE
from engine.diffusion.prediction import Prediction
from engine.networks.config import UNetConfig
from engine.sampling.device_state import SlotState
from engine.sampling.step import TIMESTEP, coefficients, guided_out, implied_out, pushed
from kernels.philox import philox_normal
from kernels.reference import Known, solver_update


@dataclass(frozen=True, slots=True)
class Variant:
    """What a step does, as the images in the slots need it at their rows.

    gradient: calls the classifier. doubled: the network also runs on the other half of the conditions, for
    classifier-free guidance. beyond_scale: that guidance does more than scale. noise: some table adds noise.
    thresholds: some table has a dynamic threshold. multistep: some table takes outs of rows before. known: some image
    has a part that is given.
    """

    gradient: bool = False
    doubled: bool = False
    beyond_scale: bool = False
    noise: bool = False
    thresholds: bool = False
    multistep: bool = False
    known: bool = False


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
    x_prev, x0 = solver_update(
        coefficients(rows, variant.thresholds),
        state.x_t,
        out,
        x0_before=state.x0,
        grad=grad,
        noise=_draw(state, NOISE) if variant.noise else None,
        known=Known(state.known, state.mask, _draw(state, INPAINTING)) if variant.known else None,
        older=state.older if variant.multistep else None,
        raw_out=raw_out,
    )
    if variant.multistep:
        state.older.copy_(pushed(state.older, out, rows))
    state.x_t.copy_(x_prev)
    state.x0.copy_(x0)
    state.row.copy_(torch.minimum(state.row + 1, state.last))
    state.draw.add_(1)


def _draw(state: SlotState, stream: int) -> Tensor:
    shape = tuple(state.x_t.shape[1:])
    return philox_normal(state.seed_low, state.seed_high, state.draw, shape, stream)


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """A network with the buffers that it was bound to.

    halves: of the conditions, one after the other in the batch: 0 with, 1 without.
    """

    bound: Bound
    buffers: Mapping[str, Tensor]
    halves: tuple[int, ...] = (0,)


class StepProgram:
    """Enqueues one step of every slot. Buffers are allocated and networks bound by prepare(), never by a step.

    network: a Capturable backend. guide: a Capturable gradient, or None. batch_size: the network's largest batch, as
    many as there are slots or more; where a doubled batch is larger, its halves are run one after the other.
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
        batch_size: int | None = None,
    ) -> None:
        self._device, self._state, self._config, self._prediction = device, state, config, prediction
        self._network, self._guide, self._update = network, guide, update
        self._is_split = batch_size is not None and 2 * state.capacity > batch_size
        self._bound: dict[tuple[int, ...], _Call] = {}
        self._gradient: _Call | None = None
        self._side = device.stream() if guide is not None else None
        self._fork, self._join = device.event(), device.event()

    def prepare(self, variant: Variant) -> None:
        """Allocate and bind what a variant needs and is not there yet."""
        for halves in self._halves(variant):
            if halves not in self._bound:
                self._bound[halves] = self._bind_network(halves)
        if variant.gradient and self._gradient is None:
            assert self._guide is not None
            self._gradient = self._bind_guide(self._guide)

    def check_capturable(self, variant: Variant) -> None:
        """Raises BackendError where a step cannot be captured."""
        for halves in self._halves(variant):
            self._bound[halves].bound.check_capturable(self._device.main)
        if variant.gradient and self._gradient is not None and self._side is not None:
            self._gradient.bound.check_capturable(self._side)

    def enqueue(self, variant: Variant) -> None:
        """One step of all slots, on the device's main stream."""
        with self._device.use(self._device.main), torch.no_grad():
            timestep = self._state.arena[:, TIMESTEP].index_select(0, self._state.row)
            gradient = self._start_gradient(timestep) if variant.gradient else None
            calls = [self._bound[halves] for halves in self._halves(variant)]
            for call in calls:
                self._fill(call, timestep)
                call.bound.enqueue(self._device.main)
            if gradient is not None:
                self._device.main.wait_event(self._join)
            out, raw_out = self._guided(calls, variant)
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

    def _halves(self, variant: Variant) -> tuple[tuple[int, ...], ...]:
        """The halves of the conditions in each call of the network."""
        if not variant.doubled:
            return ((0,),)
        return ((0,), (1,)) if self._is_split else ((0, 1),)

    def _fill(self, call: _Call, timestep: Tensor) -> None:
        """The slots' inputs into a network's buffers, once for each half; what lies beyond stays 0."""
        state, buffers, count = self._state, call.buffers, self._state.capacity
        for place, half in enumerate(call.halves):
            part = slice(place * count, (place + 1) * count)
            buffers["timestep"][part].copy_(timestep)
            if buffers["x_t"] is not state.x_t:
                buffers["x_t"][part].copy_(state.x_t)
            for name, values in self._conditions(call).items():
                buffers[name][part].copy_(values[half])

    def _conditions(self, call: _Call) -> Mapping[str, Tensor]:
        """[2, B, ...] by name; the classifier's, or the network's."""
        state = self._state
        if "scale" in call.buffers:
            return {"label": state.class_label[None]}
        if self._config.self_condition:
            return {**state.conditions, "image": state.x0.expand(2, *state.x0.shape)}
        return state.conditions

    def _guided(self, calls: Sequence[_Call], variant: Variant) -> tuple[Tensor, Tensor | None]:
        """The network's result after classifier-free guidance, [B, C', H, W], and what E multiplies instead of it."""
        state, count, channels = self._state, self._state.capacity, self._config.in_channels
        labelled = calls[0].buffers["out"][:count]
        if not variant.doubled:
            return labelled, None
        unlabelled = calls[1].buffers["out"][:count] if self._is_split else calls[0].buffers["out"][count : 2 * count]
        is_active = state.active[:, 0].index_select(0, state.row) != 0
        numbers = (state.number("rescale"), state.number("removed")) if variant.beyond_scale else None
        guided = guided_out(labelled, unlabelled, state.number("strength"), numbers, channels)
        guided = torch.where(is_active[:, None, None, None], guided, labelled)
        if not variant.beyond_scale:
            return guided, None
        row = coefficients(state.arena.index_select(0, state.row), variant.thresholds)
        without = implied_out(row, state.x_t, unlabelled[:, :channels], self._prediction)
        goes_along = is_active & (state.number("plus_plus") != 0)
        return guided, torch.where(goes_along[:, None, None, None], without, guided[:, :channels])

    def _bind_network(self, halves: tuple[int, ...]) -> _Call:
        config, state = self._config, self._state
        batch = self._network.fit(len(halves) * state.capacity)
        shapes: dict[str, tuple[int, ...]] = {"timestep": (batch,)}
        shapes |= {
            name: (batch, channels, *config.image_size)
            for name, channels in (("x_t", config.in_channels), ("out", config.out_channels))
        }
        if config.self_condition:
            shapes["image"] = (batch, config.cond_channels, *config.image_size)
        buffers = self._allocate(shapes, is_shared=len(halves) == 1 and batch == state.capacity)
        for name, values in state.conditions.items():
            buffers[name] = self._device.allocate((batch, *values.shape[2:]), values.dtype)
        return _Call(self._network.bind(buffers), buffers, halves)

    def _bind_guide(self, guide: Capturable) -> _Call:
        batch, image = guide.fit(self._state.capacity), tuple(self._state.x_t.shape[1:])
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("timestep", "scale", "log_p"), (batch,))
        shapes |= dict.fromkeys(("x_t", "grad"), (batch, *image))
        buffers = self._allocate(shapes, is_shared=batch == self._state.capacity)
        buffers["label"] = self._device.allocate((batch,), torch.int64)
        return _Call(guide.bind(buffers), buffers)

    def _allocate(self, shapes: dict[str, tuple[int, ...]], is_shared: bool) -> dict[str, Tensor]:
        """float32 buffers by name; x_t is the slots' own where it is shared, because the batches are the same."""
        own = {name: shape for name, shape in shapes.items() if not (is_shared and name == "x_t")}
        buffers = {name: self._device.allocate(shape, torch.float32) for name, shape in own.items()}
        return buffers | ({"x_t": self._state.x_t} if is_shared else {})
