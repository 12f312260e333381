"""RePaint's resampling as a table: going back up in noise is part of the row before it."""

from __future__ import annotations

import numpy as np

from engine.diffusion.prediction import Diffusion
from engine.diffusion.solvers import COLUMNS, StepTable, starting_level
from engine.errors import RequestError


def with_jumps(diffusion: Diffusion, table: StepTable, jump_length: int, resamplings: int) -> StepTable:
    """The table with each stretch of jump_length rows done `resamplings` times; Lugmayr et al., RePaint (2022).

    Going back up from level s to level u, x_u = sqrt(abar_u / abar_s) x_s + sqrt(1 - abar_u / abar_s) z (algorithm 1,
    line 9), is folded into the row that arrived at s: its coefficients shrink by r = sqrt(abar_u / abar_s), its noise
    becomes that of both, S^2 var' = r^2 S^2 var + 1 - r^2, and a known part is put at level u. Raises RequestError for
    impossible numbers, a row whose variance is learned, and rows that use earlier ones.
    """
    if jump_length < 1 or resamplings < 1:
        raise RequestError(f"jump_length is {jump_length} and resamplings {resamplings}; expected 1 or more")
    if resamplings == 1:
        return table
    if any(np.any(getattr(table, name)) for name in ("R", "O1", "O2", "O3")):
        raise RequestError("resamplings need a sampler without memory of earlier steps; use ddim or ddpm")
    if np.any(table.L0 != table.L1):
        raise RequestError(
            "resamplings need a variance that is the same for all pixels; use ddim, or ddpm with variance fixed_small"
        )
    starts = [starting_level(diffusion, table.last(len(table) - row)) for row in range(len(table))]
    order, targets = _schedule(len(table), jump_length, resamplings)
    columns = {name: getattr(table, name)[order].copy() for name in COLUMNS}
    for row, target in enumerate(targets):
        if target is not None:
            _fold(columns, row, starts[target])
    return StepTable(**columns)


def _schedule(rows: int, jump_length: int, resamplings: int) -> tuple[list[int], list[int | None]]:
    """(the row that each executed step is, the row before which its noise is put back or None).

    A stretch ends every jump_length rows, counted from the last row but one, and begins inside the table.
    """
    left = {row: resamplings - 1 for row in range(rows - 2, jump_length - 2, -jump_length)}
    order: list[int] = []
    targets: list[int | None] = []
    row = 0
    while row < rows:
        order.append(row)
        again = left.get(row, 0) > 0
        targets.append(row + 1 - jump_length if again else None)
        if again:
            left[row] -= 1
            row -= jump_length
        row += 1
    return order, targets


def _fold(columns: dict[str, np.ndarray], row: int, abar: float) -> None:
    """Let a row go on from where it arrives up to the level abar."""
    ratio = abar / columns["K"][row] ** 2
    variance = np.exp(columns["L0"][row])
    # G * var * grad keeps its meaning: the row has one variance for its gradient and its noise.
    columns["G"][row] *= np.sqrt(ratio) * variance
    for name in ("P", "Q", "E"):
        columns[name][row] *= np.sqrt(ratio)
    columns["S"][row] = np.sqrt(ratio * columns["S"][row] ** 2 * variance + 1 - ratio)
    columns["L0"][row] = columns["L1"][row] = 0.0
    columns["K"][row], columns["N"][row] = np.sqrt(abar), np.sqrt(1 - abar)
