"""engine.diffusion.repaint: RePaint's resampling beside its algorithm, written out as a loop over levels."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from solver_cases import diffusion, ideal_eps, visited

from engine.diffusion.prediction import Spacing, Variance
from engine.diffusion.repaint import _schedule, with_jumps
from engine.diffusion.solvers import ddim_table, ddpm_table, dpmpp_table, plms_table
from engine.errors import RequestError


def times_of_the_paper(total: int, jump_length: int, resamplings: int) -> list[int]:
    """The levels visited, from total - 1 (noise) to -1 (clean), by the paper's schedule (its figure 9)."""
    left = {t: resamplings - 1 for t in range(0, total - jump_length, jump_length)}
    t, times = total - 1, [total - 1]
    while t >= 0:
        t -= 1
        times.append(t)
        if left.get(t, 0) > 0:
            left[t] -= 1
            times += range(t + 1, t + jump_length + 1)
            t += jump_length
    return times


@pytest.mark.parametrize("jump_length", [1, 2, 3, 10])
@pytest.mark.parametrize("resamplings", [2, 5])
@pytest.mark.parametrize("rows", [1, 4, 9, 20])
def test_levels_are_visited_as_in_the_paper(rows, jump_length, resamplings):
    order, targets = _schedule(rows, jump_length, resamplings)
    # Levels count down from rows - 1; row i goes from level rows - 1 - i to the next, a fold back up to its target's.
    times = [rows - 1]
    for row, target in zip(order, targets, strict=True):
        assert times[-1] == rows - 1 - row
        times.append(rows - 2 - row)
        if target is not None:
            times += range(times[-1] + 1, rows - target)
    assert times == times_of_the_paper(rows, jump_length, resamplings)


def gains(table, level_of) -> tuple[float, float]:
    """(mean, variance) of the result on N(0.3, 0.5^2) with the ideal eps, exactly, from N(0, 1)."""
    mean, variance = 0.0, 1.0
    for row in range(len(table)):
        slope, offset = ideal_eps(level_of(table.timestep[row]), 0.3, 0.5)
        through = table.P[row] * (table.A[row] + table.B[row] * slope) + table.Q[row] + table.E[row] * slope
        constant = (table.P[row] * table.B[row] + table.E[row]) * offset
        mean, variance = through * mean + constant, through**2 * variance
        variance += table.S[row] ** 2 * np.exp(table.L0[row])
    return mean, variance


def by_the_loop(of, table, steps, jump_length, resamplings) -> tuple[float, float]:
    """The same by algorithm 1: a row, then, where the paper's schedule goes up, one level of noise at a time."""
    abar = visited(of, steps).alphas_cumprod
    times = times_of_the_paper(len(abar), jump_length, resamplings)
    mean, variance = 0.0, 1.0
    for now, then in zip(times, times[1:], strict=False):
        if then > now:
            ratio = abar[then] / abar[now]
            mean, variance = np.sqrt(ratio) * mean, ratio * variance + 1 - ratio
            continue
        row = len(abar) - 1 - now
        slope, offset = ideal_eps(abar[now], 0.3, 0.5)
        through = table.P[row] * (table.A[row] + table.B[row] * slope) + table.Q[row] + table.E[row] * slope
        constant = (table.P[row] * table.B[row] + table.E[row]) * offset
        mean, variance = through * mean + constant, through**2 * variance
        variance += table.S[row] ** 2 * np.exp(table.L0[row])
    return mean, variance


@pytest.mark.parametrize("resamplings", [2, 4])
@pytest.mark.parametrize("jump_length", [1, 3])
@pytest.mark.parametrize(
    "make",
    [
        lambda of: ddim_table(of, 12),
        lambda of: ddim_table(of, 12, 0.7),
        lambda of: ddim_table(dataclasses.replace(of, keeps_eps=True), 12),
        lambda of: ddpm_table(of, 12, Variance.FIXED_SMALL),
        lambda of: ddpm_table(of, 12, Variance.FIXED_LARGE),
    ],
)
def test_folded_rows_have_the_moments_of_the_algorithm(make, jump_length, resamplings):
    of = diffusion("cosine")
    table = make(of)
    schedule = visited(of, 12)
    levels = dict(zip(schedule.network_times.tolist(), schedule.alphas_cumprod, strict=True))
    folded = with_jumps(of, table, jump_length, resamplings)
    assert len(folded) > len(table)
    got = gains(folded, lambda t: levels[float(t)])
    np.testing.assert_allclose(got, by_the_loop(of, table, 12, jump_length, resamplings), rtol=1e-9)


def test_the_known_part_is_put_where_the_row_now_goes():
    of = diffusion("linear")
    table = ddim_table(of, 6)
    folded = with_jumps(of, table, 2, 2)
    arrives = np.append(folded.timestep[1:], -1)
    schedule = visited(of, 6)
    levels = dict(zip(schedule.network_times.tolist(), schedule.alphas_cumprod, strict=True)) | {-1.0: 1.0}
    np.testing.assert_allclose(folded.K**2, [levels[float(t)] for t in arrives], rtol=1e-12)
    np.testing.assert_allclose(folded.K**2 + folded.N**2, 1.0, rtol=1e-12)


def test_once_is_the_table_itself():
    table = ddim_table(diffusion(), 5)
    assert with_jumps(diffusion(), table, 10, 1) is table


REFUSED = {
    "jump_length is 0": lambda of: with_jumps(of, ddim_table(of, 5), 0, 2),
    "resamplings 0": lambda of: with_jumps(of, ddim_table(of, 5), 2, 0),
    "without memory of earlier steps": lambda of: with_jumps(of, dpmpp_table(of, 5), 2, 2),
    "use ddim or ddpm": lambda of: with_jumps(of, plms_table(of, 5), 2, 2),
    "variance fixed_small": lambda of: with_jumps(of, ddpm_table(of, 5, Variance.LEARNED_RANGE), 2, 2),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message):
    of = diffusion("cosine", variance=Variance.LEARNED_RANGE, spacing=Spacing.EVEN)
    with pytest.raises(RequestError, match=message):
        REFUSED[message](of)
