"""A device that records what a step program asks of it, and networks of exact operations that can be captured."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import torch
from elementwise import CountingGuide, Elementwise
from torch import Tensor

from engine.backends.eager.eager_backend import EagerBackend
from engine.device import CpuDevice
from engine.networks.inputs import Conditions
from engine.sampling.pool import SlotPool
from engine.sampling.sampler import Sampler


class RecordingStream:
    cuda_stream = 7

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def record_event(self, event: Any) -> Any:
        self.calls.append(f"{self.name} records {event}")
        return event

    def wait_event(self, event: Any) -> None:
        self.calls.append(f"{self.name} waits {event}")


class RecordingDevice(CpuDevice):
    """CPU tensors; keeps the order of calls, and refuses what a captured program must not do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.main = RecordingStream("main", self.calls)
        self.allocated: list[Tensor] = []
        self.captures = self.replays = 0
        self.is_capturing = False
        self._streams = self._events = 0

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        assert not self.is_capturing, "allocated while capturing"
        self.calls.append("allocate")
        self.allocated.append(super().allocate(shape, dtype))
        return self.allocated[-1]

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        assert not self.is_capturing, "copied from the host while capturing"
        self.calls.append("copy_in")
        super().copy_in(target, source)

    def copy_out(self, source: Tensor) -> Tensor:
        assert not self.is_capturing, "copied to the host while capturing"
        self.calls.append("copy_out")
        return super().copy_out(source)

    def stream(self) -> RecordingStream:
        self._streams += 1
        return RecordingStream(f"side{self._streams}", self.calls)

    def event(self) -> str:
        self._events += 1
        return f"event{self._events}"

    @contextmanager
    def use(self, stream: RecordingStream):
        self.calls.append(f"use {stream.name}")
        yield

    def capture(self, program: Any) -> Any:
        """Runs the program to see what it enqueues, and puts back what it wrote: capturing executes nothing."""
        self.captures += 1
        before = [tensor.clone() for tensor in self.allocated]
        self.is_capturing = True
        self.calls.append("capture")
        program()
        self.calls.append("captured")
        self.is_capturing = False
        for tensor, value in zip(self.allocated, before, strict=True):
            tensor.copy_(value)
        return program

    def replay(self, graph: Any) -> None:
        self.replays += 1
        self.calls.append("replay")
        graph()


class Bound:
    def __init__(self, call: Any, buffers: Mapping[str, Tensor], name: str) -> None:
        self.call, self.buffers, self.name = call, buffers, name
        self.addresses = {key: value.data_ptr() for key, value in buffers.items()}

    def enqueue(self, stream: Any) -> None:
        if isinstance(stream, RecordingStream):
            stream.calls.append(f"{self.name} on {stream.name}")
        assert self.addresses == {key: value.data_ptr() for key, value in self.buffers.items()}
        self.call(self.buffers)

    def check_capturable(self, stream: Any) -> None:
        pass


class CapturableElementwise(Elementwise):
    """Elementwise that is bound to buffers, in batches that are multiples of `bucket`."""

    device = torch.device("cuda")
    bucket = 1

    def fit(self, batch: int) -> int:
        return -(-batch // self.bucket) * self.bucket

    def bind(self, buffers: Mapping[str, Tensor]) -> Bound:
        assert all(len(value) == self.fit(len(value)) for value in buffers.values())
        return Bound(self._run, buffers, "network")

    def _run(self, b: Mapping[str, Tensor]) -> None:
        b["out"].copy_(super().__call__(b["x_t"], b["timestep"], Conditions(b.get("label"), b.get("image"))))


class CapturableGuide(CountingGuide):
    device = torch.device("cuda")

    def fit(self, batch: int) -> int:
        return batch + 1

    def bind(self, buffers: Mapping[str, Tensor]) -> Bound:
        return Bound(self._run, buffers, "gradient")

    def _run(self, b: Mapping[str, Tensor]) -> None:
        grad, log_p = super().__call__(b["x_t"], b["timestep"], b["label"], b["scale"])
        b["grad"].copy_(grad)
        b["log_p"].copy_(log_p)


class OnDevice(EagerBackend):
    """EagerBackend on a CPU that says it is on CUDA, so that a sampler takes it through the step program."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.device = torch.device("cuda")


def device_sampler(backend: Any, device: Any = None) -> Sampler:
    """A sampler whose step program runs on this device (a recording one unless given)."""
    sampler = Sampler(backend)
    chosen = RecordingDevice() if device is None else device
    sampler._pool = SlotPool(backend, lambda: chosen)
    return sampler
