"""Reading golden cases: the folder layout, and how each family's `config_from_user` becomes load_checkpoint facts."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import Checkpoint, load_checkpoint

# Families and run kinds that no code handles yet; each entry is a skip with this reason.
OPEN_FAMILIES = dict.fromkeys(
    ("lucidrains", "abarankab", "w86763777", "compvis", "diffusers", "tutorial"), "no translator for this family yet"
)
OPEN_KINDS: dict[str, str] = {}


@dataclass(frozen=True, eq=False)
class Case:
    """One folder: its description and its arrays."""

    folder: Path
    data: dict[str, Any]

    @property
    def family(self) -> str:
        return str(self.data["family"])

    @property
    def group(self) -> str:
        """The family without the project's variant: the key of the tables here."""
        return self.family.split("-")[0]

    def run(self, run_id: str) -> Run:
        return Run(self, next(r for r in self.data["runs"] if r["id"] == run_id))


@dataclass(frozen=True, eq=False)
class Run:
    """One recorded call of an original program: parameters, inputs and outputs."""

    case: Case
    parameters: dict[str, Any]

    @property
    def kind(self) -> str:
        return str(self.parameters["kind"])

    def arrays(self) -> dict[str, Tensor]:
        prefix = f"{self.parameters['id']}."
        stored = _arrays(self.case.folder)
        return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in stored.items() if k.startswith(prefix)}

    def outputs(self) -> set[str]:
        prefix = f"{self.parameters['id']}."
        entries = self.case.data["arrays"].items()
        return {k.removeprefix(prefix) for k, v in entries if k.startswith(prefix) and v["role"] == "output"}

    def tolerance(self, name: str) -> float:
        entry = self.case.data["arrays"][f"{self.parameters['id']}.{name}"]
        return float(entry.get("suggested_atol", 0.0))


@functools.lru_cache(maxsize=4)
def _arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "golden.npz") as stored:
        return dict(stored)


def read_cases(root: Path) -> Iterator[Case]:
    """Every case of a folder, in the order of names."""
    for path in sorted(root.glob("*/case.json")):
        yield Case(path.parent, json.loads(path.read_text(encoding="utf-8")))


def _keep(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {} if value in (None, -1) else {name: value}


def _order(value: bool) -> dict[str, Any]:
    return {"attention_order": "new" if value else "legacy"}


def _nothing(_value: object) -> dict[str, Any]:
    return {}


# key of config_from_user (nested with a dot) -> facts
OPENAI_FACTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "image_size": _keep("image_size"),
    "num_heads": _keep("num_heads"),
    "num_head_channels": _keep("num_head_channels"),
    "num_heads_upsample": _keep("num_heads_upsample"),
    "use_new_attention_order": _order,
    "diffusion.steps": _keep("num_train_timesteps"),
    "diffusion.noise_schedule": _keep("noise_schedule"),
    "diffusion.rescale_timesteps": _keep("rescale_timesteps"),
    "diffusion.predict_xstart": lambda value: {"prediction": "x0" if value else "eps"},
    # Both are properties of training or of the weights: learned channels show in the file.
    "diffusion.learn_sigma": _nothing,
    "diffusion.rescale_learned_sigmas": _nothing,
}
OPENAI_CLASSIFIER_FACTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "num_head_channels": _keep("num_head_channels"),
    "use_new_attention_order": _order,
    "pool": _nothing,
}
FACTS = {"openai": OPENAI_FACTS}


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined with dots; keys that end in "note" are prose and left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key.endswith("note"):
            continue
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_facts(config: dict[str, Any], table: dict[str, Callable[[Any], dict[str, Any]]]) -> dict[str, Any]:
    """Facts of flattened user configuration; an unknown key fails by name."""
    facts: dict[str, Any] = {}
    for key, value in config.items():
        assert key in table, f"config_from_user.{key} is in no table of facts"
        facts |= table[key](value)
    return facts


@functools.lru_cache(maxsize=8)
def checkpoint(case: Case) -> Checkpoint:
    """The case's U-Net checkpoint."""
    config = {k: v for k, v in flatten(case.data["config_from_user"]).items() if not k.startswith("classifier.")}
    facts = to_facts(config, FACTS[case.group])
    name = next(n for n in case.data["files"] if n != "classifier.pt")
    return load_checkpoint(case.folder / name, family=case.family, **facts)


@functools.lru_cache(maxsize=8)
def classifier(case: Case) -> Checkpoint:
    """The case's noise-conditioned classifier."""
    user = case.data["config_from_user"]
    facts = to_facts(flatten(user.get("classifier", {})), OPENAI_CLASSIFIER_FACTS)
    return load_checkpoint(case.folder / "classifier.pt", image_size=user["image_size"], **facts)
