"""Golden runs of abarankab/DDPM."""

from __future__ import annotations

import functools
from typing import Any

from golden_cases import Case, Facts, Run, Runner, call_network, flatten, keep, sample_table, to_facts
from torch import Tensor

from engine.checkpoints.load import load_checkpoint
from engine.checkpoints.types import Checkpoint
from engine.diffusion.solvers import ddpm_table

_NORMS = {"gn": "group", "in": "instance", "bn": "batch", None: "none"}

# key of config_from_user -> facts
FACTS: dict[str, Facts] = {
    "image_size": keep("image_size"),
    "activation": keep("activation"),
    "norm": lambda value: {"norm": _NORMS[value]},
    "num_groups": keep("num_groups"),
    "time_emb_scale": keep("time_scale"),
    "initial_pad": keep("initial_pad"),
}


@functools.lru_cache(maxsize=8)
def checkpoint(case: Case, weights: str) -> Checkpoint:
    """The case's checkpoint with averaged ("ema") or raw weights."""
    facts = to_facts(flatten(case.data["config_from_user"]), FACTS)
    return load_checkpoint(case.folder / next(iter(case.data["files"])), weights=weights, **facts)


def _forward(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    named = {"out": "ema", "out_raw": "raw"}
    return {name: call_network(checkpoint(run.case, kind), a) for name, kind in named.items() if name in a}


def _ancestral(run: Run, a: dict[str, Tensor]) -> dict[str, Any]:
    chosen = checkpoint(run.case, "ema" if run.parameters["use_ema"] else "raw")
    return sample_table(chosen, ddpm_table(chosen.diffusion, run.parameters["steps"]), a)


RUNNERS: dict[str, Runner] = {"forward": _forward, "ancestral": _ancestral}
