"""Errors of a sampler on Gaussian data, whose ideal network is known."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from solver_cases import diffusion, ideal_eps, visited

from engine.diffusion.schedule import linear_schedule
from engine.diffusion.solvers import StepTable


def moments(table: StepTable, abar: np.ndarray, mean: float, std: float) -> tuple[float, float]:
    """Mean and variance after all rows from N(0, 1): x and x0_before stay linear in x_T, with the ideal eps."""
    to_x, to_out = table.P * table.A + table.Q, table.P * table.B + table.E
    x, x0 = np.array([1.0, 0.0]), np.array([0.0, 0.0])  # gain on x_T, constant
    for row, a in enumerate(abar):
        slope, offset = ideal_eps(a, mean, std)
        out = slope * x + np.array([0.0, offset])
        x, x0 = to_x[row] * x + to_out[row] * out + table.R[row] * x0, table.A[row] * x + table.B[row] * out
    return x[1], x[0] ** 2


def gaussian_errors(make, counts: tuple[int, ...]) -> list[float]:
    """|mean| and |std| errors on N(0.3, 0.5^2), beside the exact flow of x_T to the data."""
    of = dataclasses.replace(diffusion(), schedule=linear_schedule(1000))
    errors = []
    for steps in counts:
        m, v = moments(make(of, steps), visited(of, steps).alphas_cumprod[::-1], 0.3, 0.5)
        errors.append(abs(m - 0.3) + abs(math.sqrt(v) - 0.5))
    return errors
