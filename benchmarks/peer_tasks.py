"""One task: all contenders that fit the time, and what the report says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.peer_contenders import Subject
from benchmarks.peer_loops import Setting, Task
from benchmarks.peer_measure import Measured, Opened, TimePlan, measure_calls, measure_steps, warm_up_all
from benchmarks.peer_quality import accuracy, as_well_read, same_images
from benchmarks.peer_turns import open_gate
from benchmarks.report import Check, Comparison, Missing, Row, Value
from benchmarks.stats import paired_ratio

BETWEEN_RUNS, BETWEEN_COMPILES = 0.045, 0.14
"""Added to both sides of an interval: what one run cannot see of itself. In four runs on two AVX-512 cores ratios had a
standard deviation of 1.7 % beyond what their intervals allow for, those of torch.compile 5.5 %, since it makes other
code each time; 2.58 times that is 99 %."""
SCALE = 4.0
"""Of classifier guidance; the digits are read as asked for in 83 % at it (docs/digits.md)."""


def make_task(subject: Subject, setting: Setting, guided: bool, seed: int) -> Task:
    """One batch of images, of every class in turn that network and classifier have; a label for none is no class."""
    config, entry = subject.config, subject.bundle.manifest.classifier
    known = [count for count in (config.num_classes, entry and entry.config.num_classes) if count]
    classes = [y for y in range(min(known, default=1)) if y != config.null_class]
    asked = tuple(classes[(seed * subject.batch + i) % len(classes)] for i in range(subject.batch))
    return Task(setting, guided, asked, seed, SCALE if guided else 0.0)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """One task. reference: fp32 images of ours from the same x_T, for DDIM. ours: the name of our contender."""

    task: Task
    classes: tuple[int, ...]
    measured: Mapping[str, Measured]
    precisions: Mapping[str, str]
    compiled: frozenset[str]
    first_call_s: Mapping[str, float]
    reference: Tensor | None
    ours: str

    @property
    def case(self) -> dict[str, Value]:
        return {"setting": self.task.setting.name, "guided": self.task.guided, "batch": self.task.batch}


def measure_task(
    subject: Subject, rounds: int, opened: Sequence[Opened], tasks: Sequence[Task], plan: TimePlan
) -> tuple[Outcome | None, list[Missing]]:
    """All contenders at one task, ours the first of them; None where ours cannot do it, or the time is over.

    tasks: its chains, which differ in their seeds. rounds: of whole calls, on a GPU.
    """
    ours = opened[0].contender.name
    able, step_ms, missing = warm_up_all(opened, tasks[0])
    if ours not in able:
        return None, missing
    left_out = plan.left_out(step_ms, ours, tasks[0].setting.steps * len(tasks))
    for name, seconds in left_out.items():
        reason = f"left out for time: about {seconds:.0f} s more; give --seconds, or run the long form"
        missing.append(Missing(f"{name}, {tasks[0].name}", reason))
    taking = {name: contender for name, contender in able.items() if name not in left_out}
    if not taking:
        return None, missing
    if subject.device.type == "cuda":
        measured, made = measure_calls(taking, tasks[0], rounds), tasks[:1]
    else:
        measured, made = measure_steps(taking, tasks), tasks
    outcome = Outcome(
        task=tasks[0],
        classes=tuple(label for task in made for label in task.classes),
        measured=measured,
        precisions={name: contender.precision for name, contender in taking.items()},
        compiled=frozenset(name for name, contender in taking.items() if contender.is_compiled),
        first_call_s={each.contender.name: each.first_call_s for each in opened},
        reference=reference_images(subject, taking[ours].precision, measured[ours], made),
        ours=ours,
    )
    return outcome, missing


def reference_images(subject: Subject, precision: str, ours: Measured, tasks: Sequence[Task]) -> Tensor | None:
    """Our fp32 images of DDIM, None for DDPM: the measured ones where they are fp32, else the eager backend's."""
    if tasks[0].setting.sampler != "ddim":
        return None
    if precision == "fp32":
        return ours.images
    reference = subject.open_ours("eager", "fp32")
    return torch.cat([reference.run(task, open_gate) for task in tasks])


def make_rows(outcome: Outcome, reads_digits: bool) -> tuple[list[Row], list[Check]]:
    """A row for each contender, and the checks of its images."""
    rows, checks = [], []
    task, ours = outcome.task, outcome.measured[outcome.ours]
    ours_read = accuracy(ours.images, outcome.classes) if reads_digits else None
    for name, found in outcome.measured.items():
        quality: dict[str, float | None] = {"psnr_db": None}
        checks.append(Check(f"{name}, {task.name}: its images are finite", bool(torch.isfinite(found.images).all())))
        if outcome.reference is not None and found.images is not outcome.reference:
            precision = outcome.precisions[name]
            value, check = same_images(f"{name}, {task.name}", precision, found.images, outcome.reference)
            quality["psnr_db"] = value
            checks.append(check)
        if ours_read is not None:
            read = accuracy(found.images, outcome.classes)
            quality |= {"accuracy": read.share, "accuracy_low": read.interval[0], "accuracy_high": read.interval[1]}
            if name != outcome.ours:
                checks.append(as_well_read(f"{name}, {task.name}", read, ours_read))
        rows.append(Row({"contender": name, **outcome.case}, _times(outcome, name) | quality))
    return rows, checks


def _times(outcome: Outcome, name: str) -> dict[str, float | None]:
    found = outcome.measured[name]
    has_steps = found.step_ms is not None
    p10, p90 = np.percentile(found.series.all_ms, [10, 90]).tolist()
    return {
        "images_per_s": outcome.task.batch * 1e3 / found.total_ms,
        "step_p50_ms": found.step_ms,
        "step_p10_ms": p10 if has_steps else None,
        "step_p90_ms": p90 if has_steps else None,
        "setup_ms": found.setup_ms,
        "finish_ms": found.finish_ms,
        "total_s": found.total_ms / 1e3,
        "sum_s": found.sum_ms / 1e3,
        "first_call_s": outcome.first_call_s[name],
    }


def make_comparisons(outcome: Outcome) -> list[Comparison]:
    """Every peer beside ours."""
    ours = outcome.measured[outcome.ours].series
    margins = {name: BETWEEN_COMPILES if name in outcome.compiled else BETWEEN_RUNS for name in outcome.measured}
    return [
        Comparison(outcome.case, name, outcome.ours, paired_ratio(found.series, ours, between_runs=margins[name]))
        for name, found in outcome.measured.items()
        if name != outcome.ours
    ]
