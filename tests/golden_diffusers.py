"""Golden runs of diffusers' UNet2DModel folders."""

from __future__ import annotations

import functools
from typing import Any

from golden_cases import Case, Facts, Run, Runner, call_network, flatten, sample_table, to_facts
from torch import Tensor

from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.ladder import visited_timesteps
from engine.diffusion.solvers import StepTable, ddim_table, ddpm_table

# The JSON files of a folder say everything.
FACTS: dict[str, Facts] = {}


@functools.lru_cache(maxsize=8)
def checkpoint(case: Case) -> Checkpoint:
    """The case's folder: it holds the checkpoint beside the golden data."""
    return load_checkpoint(case.folder, **to_facts(flatten(case.data["config_from_user"]), FACTS))


def _forward(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    return {"out": call_network(checkpoint(run.case), a)}


def _table(run: Run) -> StepTable:
    diffusion, parameters = checkpoint(run.case).diffusion, run.parameters
    if parameters.get("scheduler", "ddpm") == "ddim":
        return ddim_table(diffusion, parameters["steps"], parameters.get("eta", 0.0))
    assert parameters.get("scheduler", "ddpm") == "ddpm"
    return ddpm_table(diffusion, parameters["steps"])


def _sampler(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    results: dict[str, Any] = dict(sample_table(checkpoint(run.case), _table(run), a))
    if "timesteps" in a:
        visited = visited_timesteps(checkpoint(run.case).diffusion, run.parameters["steps"])
        results["timesteps"] = visited[::-1].copy()
    return results


def _pipeline(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    """The sampler, then images [B, H, W, C] in [0, 1]."""
    sample = sample_table(checkpoint(run.case), _table(run), a | {"sample": a["x_T"]})["sample"]
    return {"image_nhwc": (sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)}


RUNNERS: dict[str, Runner] = {"forward": _forward, "sampler": _sampler, "pipeline": _pipeline}
