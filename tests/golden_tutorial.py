"""Golden runs of the tutorial's U-Net and reverse loop."""

from __future__ import annotations

import functools
from typing import Any

import torch
from golden_cases import Case, Facts, Run, Runner, call_network, flatten, keep, sample_table, to_facts
from torch import Tensor

from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.solvers import ddpm_table

_VARIANCES = {"beta_t": "fixed_large", "beta_tilde_t": "fixed_small"}

# key of config_from_user -> facts
FACTS: dict[str, Facts] = {
    "n_groups": keep("num_groups"),
    "n_heads": keep("num_heads"),
    "image_size": keep("image_size"),
    "T": keep("num_train_timesteps"),
    "beta_1": keep("beta_start"),
    "beta_T": keep("beta_end"),
    "variance": lambda value: {"variance": _VARIANCES[value]},
}


@functools.lru_cache(maxsize=4)
def checkpoint(case: Case) -> Checkpoint:
    """The case's checkpoint."""
    facts = to_facts(flatten(case.data["config_from_user"]), FACTS)
    return load_checkpoint(case.folder / next(iter(case.data["files"])), **facts)


def _forward(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    return {"out": call_network(checkpoint(run.case), a)}


def _ancestral(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    """The last `steps` steps of the reverse loop, from t_start down to 0."""
    chosen, start = checkpoint(run.case), run.parameters["t_start"]
    assert run.parameters["steps"] == start + 1
    return sample_table(chosen, ddpm_table(chosen.diffusion, range(start + 1)), a)


def _schedule(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    schedule = checkpoint(run.case).diffusion.schedule
    known = {"betas": schedule.betas, "alphas_cumprod": schedule.alphas_cumprod}
    return {name: torch.from_numpy(value.copy()) for name, value in known.items() if name in a}


RUNNERS: dict[str, Runner] = {"forward": _forward, "ancestral": _ancestral, "schedule": _schedule}
