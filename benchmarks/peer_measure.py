"""What is measured of contenders at one task: their chains in turn, their images, how long the first call took."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks.peer_contenders import Contender, Entrant
from benchmarks.peer_loops import Task
from benchmarks.peer_turns import MOST_STEPS_A_TURN, Result, Timed, open_gate, series_of, take_turns
from benchmarks.report import Missing
from benchmarks.stats import LEAST_ROUNDS
from benchmarks.timing import Series, Variant, interleave
from engine.errors import UNetRTError

WARM_UP_STEPS = 3
SETTLE = 2


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A contender that is open. first_call_s: opening it, compiling, and its first short chain."""

    contender: Contender
    first_call_s: float


def open_entrants(
    entrants: Sequence[Entrant], task: Task, seconds: float = math.inf
) -> tuple[list[Opened], list[Missing]]:
    """Those that open here and can do a task in its short form, in order; and those that cannot.

    seconds: after them nothing is opened that takes as long as another did.
    """
    opened, missing, took_s, end = list[Opened](), list[Missing](), dict[str, float](), time.monotonic() + seconds
    for entrant in entrants:
        expected_s = took_s.get(entrant.takes_as_long_as or "", 0.0)
        if time.monotonic() + expected_s > end and expected_s:
            missing.append(Missing(entrant.name, f"left out for time: opening it takes about {expected_s:.0f} s"))
            continue
        try:
            entrant.prepare()
            start = time.perf_counter()
            contender = entrant.open()
            reason = contender.reason_against(task)
            if reason is None:
                warm_up(contender, task)
                took_s[entrant.name] = time.perf_counter() - start
                opened.append(Opened(contender, took_s[entrant.name]))
                continue
        except (UNetRTError, RuntimeError, OSError) as error:
            reason = _one_line(error)
        missing.append(Missing(entrant.name, reason))
    return opened, missing


def warm_up(contender: Contender, task: Task) -> float:
    """Milliseconds of a step of a short chain, after which nothing is left to compile or allocate."""
    entries: list[int] = []

    def gate(call: Callable[[], Result], again: Callable[[], object] | None = None) -> Result:
        entries.append(time.perf_counter_ns())
        return call()

    contender.run(replace(task, setting=replace(task.setting, steps=WARM_UP_STEPS)), gate)
    entries.append(time.perf_counter_ns())
    return min(after - before for before, after in pairwise(entries)) / 1e6


def warm_up_all(opened: Sequence[Opened], task: Task) -> tuple[dict[str, Contender], dict[str, float], list[Missing]]:
    """Contenders that can do a task and what a step takes them in ms, by name; and those that cannot."""
    able, step_ms, missing = {}, {}, []
    for contender in (each.contender for each in opened):
        reason = contender.reason_against(task)
        if reason is None:
            try:
                step_ms[contender.name] = warm_up(contender, task)
                able[contender.name] = contender
                continue
            except (UNetRTError, RuntimeError) as error:
                reason = _one_line(error)
        missing.append(Missing(f"{contender.name}, {task.name}", reason))
    return able, step_ms, missing


@dataclass(frozen=True, slots=True)
class TimePlan:
    """Who takes part in a task where time is short. end: of all tasks, on the monotonic clock.

    later_steps: steps of a contender in later tasks. is_first: ours and the fastest other run whatever it takes.
    """

    end: float
    later_steps: int
    is_first: bool

    def left_out(self, step_ms: Mapping[str, float], ours: str, steps: int) -> dict[str, float]:
        """Who is left out of a task of so many steps, and how long it would take, in s.

        From the fastest on, others join ours as long as there is time: half of what is left at most, unless later
        tasks of ours and the fastest need less. Where not even one other can, ours alone says nothing and is out too.
        """
        others = sorted((name for name in step_ms if name != ours), key=step_ms.__getitem__)
        if not others:
            return {}
        left_s = self.end - time.monotonic()
        budget_s = max(left_s - _seconds([step_ms[ours], step_ms[others[0]]], self.later_steps), left_s / 2)
        chosen, left_out = [step_ms[ours]], dict[str, float]()
        for name in others:
            needs_s = _seconds([*chosen, step_ms[name]], steps)
            is_fastest = name == others[0]
            if needs_s <= (left_s if is_fastest else budget_s) or (is_fastest and self.is_first):
                chosen.append(step_ms[name])
            else:
                left_out[name] = _seconds([step_ms[name]], steps)
        return left_out if len(chosen) > 1 else left_out | {ours: _seconds(chosen, steps)}


def _seconds(step_ms: Sequence[float], steps: int) -> float:
    """What so many steps of contenders take in turn; two of each round's turns need no settling."""
    return sum(step_ms) * steps * (1 + SETTLE / MOST_STEPS_A_TURN * (1 - 1 / len(step_ms))) / 1e3


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A contender at a task. total_ms: of one sampling call, robust against pauses; sum_ms: as the clock ran.

    series: steps in paired rounds, on a GPU whole calls. setup_ms, step_ms, finish_ms: medians, None on a GPU.
    images: [N, C, H, W] of all chains.
    """

    series: Series
    total_ms: float
    sum_ms: float
    setup_ms: float | None
    step_ms: float | None
    finish_ms: float | None
    images: Tensor


def measure_steps(contenders: Mapping[str, Contender], tasks: Sequence[Task]) -> dict[str, Measured]:
    """Chains of every contender, step by step in turn; tasks differ in their seeds alone."""
    chains: dict[str, list[Timed]] = {name: [] for name in contenders}
    for task in tasks:
        calls = {name: partial(contender.run, task) for name, contender in contenders.items()}
        taken = take_turns(calls, task.setting.steps, settle=SETTLE, title=task.name)
        for name, timed in taken.items():
            chains[name].append(timed)
    return {name: _measured(timed) for name, timed in chains.items()}


def _measured(chains: list[Timed]) -> Measured:
    steps = np.concatenate([chain.steps_ms for chain in chains])
    setup, finish = (float(np.median([getattr(c, name) for c in chains])) for name in ("setup_ms", "finish_ms"))
    step = float(np.median(steps))
    return Measured(
        series=series_of(chains),
        total_ms=setup + len(chains[0].steps_ms) * step + finish,
        sum_ms=float(np.median([chain.sum_ms for chain in chains])),
        setup_ms=setup,
        step_ms=step,
        finish_ms=finish,
        images=torch.cat([chain.images for chain in chains]),
    )


def measure_calls(contenders: Mapping[str, Contender], task: Task, rounds: int) -> dict[str, Measured]:
    """Whole sampling calls in turn, for a GPU: a pause before each step would wait for what otherwise overlaps."""
    images: dict[str, Tensor] = {}

    def call(name: str) -> None:
        images[name] = contenders[name].run(task, open_gate)

    variants = [Variant(name, partial(call, name)) for name in contenders]
    taken = interleave(variants, max(rounds, LEAST_ROUNDS), warm_up=1, settle=0, title=task.name)
    return {
        name: Measured(
            series=series,
            total_ms=float(np.median(series.all_ms)),
            sum_ms=float(series.all_ms.mean()),
            setup_ms=None,
            step_ms=None,
            finish_ms=None,
            images=images[name],
        )
        for name, series in taken.items()
    }


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
