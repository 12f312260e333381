"""Golden runs of w86763777/pytorch-ddpm."""

from __future__ import annotations

import functools
from typing import Any

from golden_cases import Case, Facts, Run, Runner, call_network, flatten, keep, sample_table, to_facts
from torch import Tensor

from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.solvers import ddpm_table

_VARIANCES = {"fixedlarge": "fixed_large", "fixedsmall": "fixed_small"}
_PREDICTIONS = {"epsilon": "eps", "xstart": "x0", "xprev": "x_prev"}

# key of config_from_user, or of a run that has its own -> facts
FACTS: dict[str, Facts] = {
    "image_size": keep("image_size"),
    "beta_1": keep("beta_start"),
    "beta_T": keep("beta_end"),
    "var_type": lambda value: {"variance": _VARIANCES[value]},
    "mean_type": lambda value: {"prediction": _PREDICTIONS[value]},
}
_WEIGHTS = {"ema_model": "ema", "net_model": "raw"}


def checkpoint(run: Run, weights: str) -> Checkpoint:
    """The case's checkpoint with the run's own diffusion."""
    own = tuple((key, value) for key, value in run.parameters.items() if key in FACTS)
    return _load(run.case, weights, own)


@functools.lru_cache(maxsize=8)
def _load(case: Case, weights: str, own: tuple[tuple[str, Any], ...]) -> Checkpoint:
    facts = to_facts(flatten(case.data["config_from_user"]) | dict(own), FACTS)
    return load_checkpoint(case.folder / next(iter(case.data["files"])), weights=weights, **facts)


def _forward(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    named = {"out": "ema", "out_raw": "raw"}
    return {name: call_network(checkpoint(run, kind), a) for name, kind in named.items() if name in a}


def _ancestral(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    chosen = checkpoint(run, _WEIGHTS[run.parameters["weights"]])
    results = sample_table(chosen, ddpm_table(chosen.diffusion, run.parameters["steps"]), a)
    # As Sampler.sample does; the original limits the finished image only.
    return results | {"sample": results["sample"].clamp(-1, 1)}


RUNNERS: dict[str, Runner] = {"forward": _forward, "ancestral": _ancestral}
