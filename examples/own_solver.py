"""A solver of one's own: DPM-Solver++(2M) in its stochastic form, as a table of coefficients.

python examples/own_solver.py demo/digits.engine own_solver.png

With alpha = sqrt(abar), sigma = sqrt(1 - abar), lambda = log(alpha / sigma), h = lambda' - lambda and r = h_before / h:

    x_prev = sigma'/sigma exp(-h) x_t + alpha' (1 - exp(-2 h)) (x0 + (x0 - x0_before) / (2 r))
             + sigma' sqrt(1 - exp(-2 h)) z

Lu et al., DPM-Solver++ (2022), appendix; "DPM++ 2M SDE" in other programs.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import Sampler
from engine.diffusion.ladder import visited_timesteps
from engine.diffusion.prediction import Diffusion, x0_coefficients
from engine.diffusion.solvers import COLUMNS, StepTable
from engine.images import grid, save_png, to_uint8


def sde_dpmpp_table(diffusion: Diffusion, steps: int) -> StepTable:
    """The table of `steps` rows; every column that is not set stays 0, which means "not used"."""
    schedule = diffusion.schedule.respaced(visited_timesteps(diffusion, steps))
    abar, prev = schedule.alphas_cumprod[::-1], schedule.alphas_cumprod_prev[::-1]  # row 0 is the noisiest
    half_log_snr = 0.5 * np.log(abar / (1 - abar))
    h = np.append(np.diff(half_log_snr), np.inf)  # the last row goes to sigma 0
    a, b = (values[::-1] for values in x0_coefficients(schedule, diffusion.prediction))
    columns: dict[str, Any] = {name: np.zeros(len(h)) for name in COLUMNS}
    columns |= {"timestep": schedule.timesteps[::-1] * diffusion.timestep_scale, "A": a, "B": b}
    columns["clip"] = np.full(len(h), np.inf if diffusion.clip is None else diffusion.clip)
    towards_x0 = np.sqrt(prev) * -np.expm1(-2 * h)
    before = np.zeros(len(h))  # the first row has no x0 before, and the last is of first order
    before[1:-1] = towards_x0[1:-1] * h[1:-1] / (2 * h[:-2])
    columns |= {"P": towards_x0 + before, "R": -before}
    columns["Q"] = np.sqrt((1 - prev) / (1 - abar)) * np.exp(-h)
    columns["S"] = np.sqrt((1 - prev) * -np.expm1(-2 * h))
    columns["H"] = (1 - abar) / np.sqrt(abar)  # how a classifier's gradient moves x0
    columns |= {"K": np.sqrt(prev), "N": np.sqrt(1 - prev)}  # the level that a row goes to, for inpainting
    return StepTable(**columns)


def main(bundle: str, out: str, steps: int = 20) -> None:
    sampler = Sampler.open(bundle)
    table = sde_dpmpp_table(sampler.diffusion, steps)
    requests = sampler.requests(20, table=table, labels=[i % 10 for i in range(20)], seed=0)
    images = torch.empty(20, sampler.config.in_channels, *sampler.config.image_size)
    for step in sampler.run(requests):
        if step.is_last:
            images[step.request.index] = step.x_prev
    save_png(Path(out), grid(to_uint8(images), columns=10, enlarge=2))
    sampler.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
