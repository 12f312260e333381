"""Reading golden cases: the folder layout, facts from `config_from_user`, and slots driven by recorded noise."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.backends.eager.eager_backend import EagerBackend
from engine.backends.protocol import Backend
from engine.checkpoints.types import Checkpoint
from engine.diffusion.guidance import Guide
from engine.diffusion.noise import RecordedNoise
from engine.diffusion.solvers import StepTable
from engine.sampling.requests import Request
from engine.sampling.sampler import Sampler
from engine.sampling.slots import Slots


@dataclass(frozen=True, eq=False)
class Case:
    """One folder: its description and its arrays."""

    folder: Path
    data: dict[str, Any]

    @property
    def family(self) -> str:
        return str(self.data["family"])

    @property
    def project(self) -> str:
        """The first word of the family: the key of the tables in test_golden."""
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


Facts = Callable[[Any], dict[str, Any]]
"""One value of config_from_user -> load_checkpoint facts."""

Runner = Callable[[Run, dict[str, Tensor]], dict[str, Any]]
"""Runs one recorded call again: (run, its arrays) -> results by array name, one for every recorded output."""


def keep(name: str) -> Facts:
    """The value under another name; None and -1 mean that the original took its default."""
    return lambda value: {} if value in (None, -1) else {name: value}


def ignore(_value: object) -> dict[str, Any]:
    """A key that says nothing a loader needs."""
    return {}


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


def to_facts(config: dict[str, Any], table: dict[str, Facts]) -> dict[str, Any]:
    """Facts of flattened user configuration; an unknown key fails by name."""
    facts: dict[str, Any] = {}
    for key, value in config.items():
        assert key in table, f"config_from_user.{key} is in no table of facts"
        facts |= table[key](value)
    return facts


def run_slots(
    backend: Backend,
    requests: Iterable[Request],
    noise: RecordedNoise,
    guide: Guide | None = None,
) -> tuple[Tensor, Tensor]:
    """Run requests side by side with recorded noise: x after each step and x0 of each step, [steps, N, C, H, W]."""
    waiting = list(requests)
    slots = Slots(backend, len(waiting), guide, noise)
    for slot, request in enumerate(waiting):
        slots.enter(slot, request)
    traj, x0 = [], []
    while not slots.is_empty:
        steps = slots.step()
        traj.append(torch.stack([s.x_prev for s in steps]))
        x0.append(torch.stack([s.x0 for s in steps]))
    return torch.stack(traj), torch.stack(x0)


def call_network(checkpoint: Checkpoint, a: dict[str, Tensor]) -> Tensor:
    """One call of the checkpoint's U-Net on x, t and y."""
    unet = checkpoint.unet()
    with torch.inference_mode():
        return unet(a["x"], a["t"].float(), a.get("y"))


def sample_table(checkpoint: Checkpoint, table: StepTable, a: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run a table from x_T with the recorded noise z and labels y: those of traj, pred_xstart and sample recorded."""
    backend, start = EagerBackend.from_checkpoint(checkpoint), a["x_T"]
    z = a["z"] if "z" in a else torch.zeros(0, *start.shape)
    labels = a["y"].tolist() if "y" in a else None
    requests = Sampler(backend).requests(len(start), table=table, labels=labels, seeds=range(len(start)))
    traj, x0 = run_slots(backend, requests, RecordedNoise(start.numpy(), z.numpy()))
    kept = {"traj": traj, "pred_xstart": x0, "sample": traj[-1]}
    return {name: value for name, value in kept.items() if name in a}
