"""Device memory, streams, events and graph capture behind one small interface.

CudaDevice is torch.cuda. CpuDevice runs the same programs at once, in order, on CPU tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.errors import BackendError

Program = Callable[[], None]
"""Work that is only enqueued: no allocation outside the graph's own pool, no wait for the device."""


class Stream(Protocol):
    """The part of torch.cuda.Stream that is used here. cuda_stream: the handle, as TensorRT takes it."""

    @property
    def cuda_stream(self) -> int: ...

    def record_event(self, event: Any) -> Any:
        """Mark the point that this stream has reached."""
        ...

    def wait_event(self, event: Any) -> None:
        """Let what is enqueued from now on wait for a marked point of another stream."""
        ...


class Device(Protocol):
    """Where a step program lives. kind: its torch device. main: the stream that its work is ordered on."""

    kind: torch.device
    main: Stream

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Zeros at an address that stays."""
        ...

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        """Host to device, after everything enqueued before; source may be reused at once."""
        ...

    def copy_out(self, source: Tensor) -> Tensor:
        """Device to host, after everything enqueued before, as a new tensor."""
        ...

    def copy_out_later(self, sources: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Start a copy of tensors of one shape [...] to the host, after everything enqueued before.

        Returns what waits for that copy alone, and gives it as [len(sources), ...].
        """
        ...

    def stream(self) -> Stream:
        """A further stream."""
        ...

    def event(self) -> Any:
        """An event for record_event and wait_event."""
        ...

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        """torch operators inside are enqueued on this stream."""
        ...

    def capture(self, program: Program) -> Any:
        """The work that a program enqueues on main, as a graph; nothing is executed."""
        ...

    def replay(self, graph: Any) -> None:
        """Enqueue a captured program once more."""
        ...

    def synchronize(self) -> None:
        """Wait for everything enqueued."""
        ...


class CpuStream:
    """In a program that runs at once everything is already ordered."""

    cuda_stream = 0

    def record_event(self, event: Any) -> Any:
        return event

    def wait_event(self, event: Any) -> None:
        pass


class CpuDevice:
    """CPU tensors; a captured program is the program itself."""

    def __init__(self) -> None:
        self.kind = torch.device("cpu")
        self.main: Stream = CpuStream()

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def copy_out(self, source: Tensor) -> Tensor:
        return source.clone()

    def copy_out_later(self, sources: Sequence[Tensor]) -> Callable[[], Tensor]:
        copied = torch.stack(list(sources))
        return lambda: copied

    def stream(self) -> Stream:
        return CpuStream()

    def event(self) -> Any:
        return object()

    def use(self, stream: Stream) -> AbstractContextManager[Any]:
        return nullcontext()

    def capture(self, program: Program) -> Any:
        return program

    def replay(self, graph: Any) -> None:
        graph()

    def synchronize(self) -> None:
        pass


class CudaDevice:
    """The current CUDA device through torch.cuda."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise BackendError(no_gpu("a CUDA device"))
        self.kind = torch.device("cuda", torch.cuda.current_device())
        self.main: Stream = self.stream()
        # Graphs of one device never run at the same time and keep nothing between replays, so they share memory.
        self._pool: Any = None

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        with self.use(self.main):
            return torch.zeros(shape, dtype=dtype, device=self.kind)

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        with self.use(self.main):
            target.copy_(source)

    def copy_out(self, source: Tensor) -> Tensor:
        with self.use(self.main):
            return source.cpu()

    def copy_out_later(self, sources: Sequence[Tensor]) -> Callable[[], Tensor]:
        with self.use(self.main):
            # Pinned, because a copy to other memory would have the host wait for it.
            copied = torch.empty((len(sources), *sources[0].shape), dtype=sources[0].dtype, pin_memory=True)
            copied.copy_(torch.stack(list(sources)), non_blocking=True)
        copying = self.main.record_event(self.event())

        def wait() -> Tensor:
            copying.synchronize()
            return copied

        return wait

    def stream(self) -> Stream:
        return torch.cuda.Stream()

    def event(self) -> Any:
        return torch.cuda.Event()

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def capture(self, program: Program) -> Any:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads of the process may use the GPU meanwhile: only this one is watched.
        with torch.cuda.graph(graph, pool=self._pool, stream=self.main, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            program()
        return graph

    def replay(self, graph: Any) -> None:
        with self.use(self.main):
            graph.replay()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.kind)


@functools.cache
def cuda_device() -> CudaDevice:
    """The process's one CudaDevice: whoever uses it is ordered on its main stream; BackendError without a GPU."""
    return CudaDevice()


def no_gpu(what: str) -> str:
    """Why CUDA cannot be used here, as one line with the remedy."""
    if torch.version.cuda is None:
        reason = f"PyTorch {torch.__version__} was built without CUDA; install a CUDA build (https://pytorch.org)"
    else:
        reason = "PyTorch finds none; install the NVIDIA driver, and check it with nvidia-smi"
    return f"{what} needs an NVIDIA GPU: {reason}, or choose a CPU backend: ov, ort or eager"
