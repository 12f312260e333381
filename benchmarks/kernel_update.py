"""The end of a sampling step as an operator that is measured, with what it must move and compute at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernel_providers import Provider, torch_provider
from benchmarks.kernel_shapes import Place, Task
from engine.device import CpuDevice, Device
from engine.diffusion.prediction import Diffusion, Variance
from engine.diffusion.schedule import linear_schedule
from engine.diffusion.solvers import ddpm_table
from engine.networks.config import Conv, UNetConfig
from engine.sampling.device_state import SlotState, allocate_state
from engine.sampling.step_program import Variant as StepVariant

UPDATE_FLOPS, VARIANCE_FLOPS = 12, 6
"""An element: x0 3, clamp 2, x_prev 5, its noise 2; the variance between its bounds 4, its root 2. Making the
noise is not counted."""
DIFFUSION_STEPS = 50


@dataclass(frozen=True, slots=True)
class UpdateShape:
    """The end of a DDPM step with noise, in float32; variance: the network gives it, in as many channels again."""

    channels: int
    size: int
    variance: bool
    calls: int = 1

    @property
    def operator(self) -> str:
        return "update, learned range" if self.variance else "update"

    @property
    def text(self) -> str:
        return f"C={self.channels} {self.size}x{self.size}"

    def precision(self, place: Place) -> str:
        return "fp32"

    def moved_bytes(self, batch: int, place: Place) -> int:
        # Read: x_t, out, the variance; written: x_t, x0.
        return 4 * (4 + self.variance) * batch * self.channels * self.size**2

    def flops(self, batch: int) -> int:
        return batch * self.channels * self.size**2 * (UPDATE_FLOPS + VARIANCE_FLOPS * self.variance)

    def task(self, batch: int, place: Place) -> Task:
        plain = Place(place.device, "fp32", torch.float32, False, place.seed)
        out = plain.normal(batch, self.channels * (2 if self.variance else 1), self.size, self.size)
        wanted = self._work(torch_provider(), CpuDevice(), batch, out.cpu())
        assert wanted is not None
        return Task(wanted(), lambda provider: self._work(provider, place.device, batch, out))

    def _work(self, provider: Provider, device: Device, batch: int, out: Tensor) -> Callable[[], Tensor] | None:
        update = provider.update
        if update is None:
            return None
        state = self._state(device, batch)

        def step() -> Tensor:
            update(state, out, None, None, StepVariant(noise=True))
            return state.x_t

        return step

    def _state(self, device: Device, batch: int) -> SlotState:
        """Slots that stay on a row in the middle of a DDPM table, whose Q below 1 and limit keep x_t bounded."""
        outs = self.channels * (2 if self.variance else 1)
        network = UNetConfig(self.channels, outs, (self.size, self.size), 2, 2, (Conv(self.channels, outs, 1),))
        state = allocate_state(device, network, batch)
        variance = Variance.LEARNED_RANGE if self.variance else Variance.FIXED_LARGE
        table = ddpm_table(Diffusion(linear_schedule(1000), variance=variance), DIFFUSION_STEPS)
        row = torch.from_numpy(table.to_array()[DIFFUSION_STEPS // 2]).float()
        device.copy_in(state.arena[1], row)
        device.copy_in(state.ints, torch.tensor([[1], [1], [7], [0], [1]], dtype=torch.int32).expand(-1, batch))
        device.copy_in(state.seed_low, torch.arange(batch, dtype=torch.int32))
        make = torch.Generator().manual_seed(batch)
        device.copy_in(state.x_t, torch.randn(state.x_t.shape, generator=make))
        return state
