"""Whole sampling calls that take turns: each waits before every call of its network until it is let on.

A call runs in a thread of its own, so that it may be anybody's code, and only while the others wait: nobody spins, and
nothing runs beside what is timed. A turn is a few steps, since a network needs some calls to run as fast as it does in
a sampler, which calls it again and again. Steps of a turn of every call, and those of the turn after it in the reverse
order, are paired rounds.
The network itself is called in the one thread that gives the turns, and the other threads have one thread of torch
each: with a pool of torch's threads for every call the pools would yield to each other, which costs torch 10 to 15 %.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.stats import LEAST_ROUNDS
from benchmarks.timing import Float64, Series, wait_until_quiet
from engine.errors import BackendError

LEAST_STEPS = 2 * LEAST_ROUNDS
"""Of a chain whose steps are to give a ratio with an interval."""
MOST_STEPS_A_TURN = 5


def steps_a_turn(steps: int) -> int:
    """Of a chain of so many: as many as leave LEAST_ROUNDS turns each way."""
    return min(MOST_STEPS_A_TURN, max(1, steps // LEAST_STEPS))


Result = TypeVar("Result")


class Gate(Protocol):
    """What a sampling call goes through to call its network."""

    def __call__(self, call: Callable[[], Result], again: Callable[[], object] | None = None) -> Result:
        """What `call` returns, once it is its turn. again: what to repeat untimed before it, `call` unless given."""
        ...


def open_gate(call: Callable[[], Result], again: Callable[[], object] | None = None) -> Result:
    """A gate at which nothing waits."""
    return call()


SamplingCall = Callable[[Gate], Tensor]
"""Images [B, C, H, W] from one whole sampling call that calls its network through a gate."""


class _Abandoned(BaseException):
    """Raised at the gate of a call that is not let on any more; no handler of errors may take it for one."""


@dataclass(frozen=True, slots=True)
class _Pending:
    """A network call that waits for its turn, and torch's modes where it was asked for, which belong to a thread."""

    call: Callable[[], Any]
    again: Callable[[], object]
    is_inference: bool
    is_grad: bool

    def modes(self) -> AbstractContextManager[object]:
        return torch.inference_mode() if self.is_inference else torch.set_grad_enabled(self.is_grad)


class PausedCall:
    """A sampling call that runs only while advance() waits for it. result: its images once it is over."""

    def __init__(self, work: SamplingCall) -> None:
        self.result: Tensor | None = None
        self.is_over = False
        self._work = work
        self._condition = threading.Condition()
        self._is_on = self._is_abandoned = False
        self._pending: _Pending | None = None
        self._answer: Any = None
        self._begin_ns = self._end_ns = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def advance(self, settle: int = 0) -> float:
        """Make the network call that it stands before and let it on to the next, or to its end; the ms that took.

        Waking the call's thread takes as long as a small network, and nobody does it who samples: it is not timed.
        settle: untimed repetitions before. Raises what the call raised.
        """
        if self.is_over:
            raise RuntimeError("the call is over")
        pending, network_ns = self._pending, 0
        if pending is not None:
            with pending.modes():
                for _ in range(settle):
                    pending.again()
                start_ns = time.perf_counter_ns()
                self._answer = pending.call()
                network_ns = time.perf_counter_ns() - start_ns
        self._let_on()
        if self._error is not None:
            raise self._error
        return (network_ns + self._end_ns - self._begin_ns) / 1e6

    def close(self) -> None:
        """End a call that is not over, at the gate where it stands."""
        self._is_abandoned = True
        if not self.is_over:
            self._let_on()
        self._thread.join()

    def _let_on(self) -> None:
        with self._condition:
            self._is_on = True
            self._condition.notify_all()
            while self._is_on:
                self._condition.wait()

    def _run(self) -> None:
        try:
            self._wait()
            # Of this thread alone; who lets it on sets the number of its own thread, and of libraries, again.
            torch.set_num_threads(1)
            self.result = self._work(self._gate)
        except _Abandoned:
            pass
        except BaseException as error:  # raised by advance()
            self._error = error
        finally:
            self.is_over = True
            self._hand_back()

    def _gate(self, call: Callable[[], Result], again: Callable[[], object] | None = None) -> Result:
        self._pending = _Pending(call, again or call, torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        self._hand_back()
        self._wait()
        answer: Result = self._answer
        return answer

    def _hand_back(self) -> None:
        self._end_ns = time.perf_counter_ns()
        with self._condition:
            self._is_on = False
            self._condition.notify_all()

    def _wait(self) -> None:
        with self._condition:
            while not self._is_on:
                self._condition.wait()
        self._begin_ns = time.perf_counter_ns()
        if self._is_abandoned:
            raise _Abandoned


@dataclass(frozen=True, slots=True, eq=False)
class Timed:
    """One sampling call. setup_ms: before its first network call. steps_ms: [N], from each network call to the next.

    What comes after the last step is part of it; finish_ms is what that one took longer than a median step.
    """

    setup_ms: float
    steps_ms: Float64
    images: Tensor

    @property
    def step_ms(self) -> float:
        """The median."""
        return float(np.median(self.steps_ms))

    @property
    def finish_ms(self) -> float:
        return max(0.0, float(self.steps_ms[-1]) - self.step_ms)

    @property
    def total_ms(self) -> float:
        """Setup, as many median steps as there are, and finish: what a pause of the machine does not change."""
        return self.setup_ms + len(self.steps_ms) * self.step_ms + self.finish_ms

    @property
    def sum_ms(self) -> float:
        """The plain sum."""
        return self.setup_ms + float(self.steps_ms.sum())

    @property
    def rounds_ms(self) -> Float64:
        """[about N / 2, 2]: steps there and back, as benchmarks.timing.Series has them, without an unpaired turn."""
        turn = steps_a_turn(len(self.steps_ms))
        paired = self.steps_ms[: len(self.steps_ms) // (2 * turn) * 2 * turn]
        return paired.reshape(-1, 2, turn).transpose(0, 2, 1).reshape(-1, 2)


def take_turns(calls: Mapping[str, SamplingCall], steps: int, *, settle: int = 1, title: str = "") -> dict[str, Timed]:
    """Every call once, a few steps each in turn: A B C, then C B A; results by name.

    Unless the turn before was of the same call, a turn waits until that one's threads sleep. settle: untimed
    repetitions then. Raises BackendError for a call that does not call its network `steps` times, and whatever a call
    raised.
    """
    threads = torch.get_num_threads()
    paused = {name: PausedCall(work) for name, work in calls.items()}
    try:
        setup = {name: call.advance() for name, call in paused.items()}
        torch.set_num_threads(threads)
        taken: dict[str, list[float]] = {name: [] for name in paused}
        before = ""
        turn = steps_a_turn(steps)
        for first in tqdm(range(0, steps, turn), title, disable=not sys.stderr.isatty(), leave=False):
            for name in list(paused) if first // turn % 2 == 0 else reversed(paused):
                if name != before:
                    wait_until_quiet()
                for step in range(first, min(first + turn, steps)):
                    _check_calls(name, paused[name], step, steps)
                    taken[name].append(paused[name].advance(0 if name == before else settle))
                    before = name
        results = {}
        for name, call in paused.items():
            if call.result is None:
                raise BackendError(f"{name} calls its network more than {steps} times, which is other work than asked")
            results[name] = Timed(setup[name], np.array(taken[name]), call.result)
        return results
    finally:
        for call in paused.values():
            call.close()
        torch.set_num_threads(threads)


def _check_calls(name: str, call: PausedCall, done: int, steps: int) -> None:
    if call.is_over:
        raise BackendError(f"{name} calls its network {done} times, not {steps}, which is other work than asked")


def series_of(chains: list[Timed]) -> Series:
    """The steps of chains, one after the other, as the series that benchmarks.stats compares."""
    return Series(chains[0].setup_ms, (), np.concatenate([chain.rounds_ms for chain in chains]))
