"""Schedules, step counts and ideal networks that the tests of tables share."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch

from engine.diffusion.prediction import Diffusion, Prediction, Variance
from engine.diffusion.schedule import NoiseSchedule, cosine_schedule, linear_schedule, space_timesteps
from engine.diffusion.solvers import StepTable
from kernels.reference import Coefficients

T = 100


SCHEDULES = {"linear": linear_schedule(T), "cosine": cosine_schedule(T)}


# 7, 30 and 33 do not divide 100.
COUNTS = [1, 2, 7, 10, 30, 33, 100, "ddim25", "10,5,3"]


def diffusion(kind: str = "linear", prediction: Prediction = Prediction.EPS, **changes) -> Diffusion:
    return Diffusion(SCHEDULES[kind], prediction, **({"clip": None, "variance": Variance.FIXED_SMALL} | changes))


def visited(of: Diffusion, steps: int | str) -> NoiseSchedule:
    return of.schedule.respaced(space_timesteps(len(of.schedule), steps))


def linear_map(table: StepTable) -> tuple[np.ndarray, np.ndarray]:
    """x_prev = to_x * x_t + to_out * out without limit and guidance, one pair a row."""
    return table.P * table.A + table.Q, table.P * table.B + table.E


def ideal_eps(t: float, mean: float, std: float) -> tuple[float, float]:
    """eps*(x) = slope x + offset for data N(mean, std^2) at alphas_cumprod t: E[eps | x_t] of two joint Gaussians."""
    total = t * std**2 + 1 - t
    slope = math.sqrt(1 - t) / total
    return slope, -slope * math.sqrt(t) * mean


def coefficients(table: StepTable, row: int) -> Coefficients:
    """Row `row` for a batch of one."""
    return Coefficients(
        **{
            f.name: torch.tensor(getattr(table, f.name)[row], dtype=torch.float32).reshape(1, 1, 1, 1)
            for f in dataclasses.fields(Coefficients)
        }
    )
