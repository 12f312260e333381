"""The end of a step as one Triton kernel, for slots on a CUDA device where triton is installed."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from engine.sampling.device_state import SlotState
from engine.sampling.step_program import Update, Variant, torch_update


def update_for(device: torch.device) -> Update:
    """The fastest Update that runs on this device."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        return fused_update
    return torch_update


def fused_update(state: SlotState, out: Tensor, grad: Tensor | None, raw_out: Tensor | None, variant: Variant) -> None:
    """See engine.sampling.step_program.Update."""
    from kernels.triton.update import SlotTensors, step

    slots = SlotTensors(
        arena=state.arena,
        row=state.row,
        last=state.last,
        seed_low=state.seed_low,
        seed_high=state.seed_high,
        draw=state.draw,
        x_t=state.x_t,
        x0=state.x0,
        older=state.older,
        known=state.known,
        mask=state.mask,
        arrived=state.arrived,
        threshold=state.threshold,
    )
    extras = variant.thresholds or variant.known or variant.multistep
    step(slots, out, grad, raw_out, noise=variant.noise, extras=extras)
