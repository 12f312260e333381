"""A bundle's TensorRT plans: networks at fixed addresses on a GPU, FP16, ready to be captured in a CUDA graph.

Every batch has one execution context. Its memory is ours, and contexts of one plan share it, because all of them are
enqueued on one stream. Batches between two that a plan takes are padded, larger ones are split.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.backends.trt.trt_library import REBUILD, Library, Plans, cache_folder, find_plans
from engine.bundle.bundle_folder import Bundle
from engine.bundle.manifest import Manifest, PlanEntry
from engine.device import Device, Stream, cuda_device
from engine.errors import BackendError, OutputError
from engine.files import atomic_path, make_folder
from engine.networks.config import ClassifierConfig
from engine.networks.inputs import UNCONDITIONED, Conditions, Inputs

logger = logging.getLogger(__name__)

_INPUTS = ("x_t", "timestep", "label", "image", "scale")
_OUTPUTS = ("out", "grad", "log_p")


@dataclass(frozen=True, slots=True, eq=False)
class _Context:
    """An execution context of one batch; memory is kept alive beside it."""

    context: Any
    memory: Tensor
    library: Library

    def enqueue(self, buffers: Mapping[str, Tensor], names: tuple[str, ...], stream: Stream) -> None:
        for name in names:
            if not self.context.set_tensor_address(name, buffers[name].data_ptr()):
                raise self.library.failure(f"does not take a buffer for {name}", f"build again with: {REBUILD}")
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise self.library.failure("could not run the plan", "check the GPU's free memory with nvidia-smi")


class _Engine:
    """One deserialised plan and its contexts."""

    def __init__(self, library: Library, entry: PlanEntry, bundle: Bundle, device: Device) -> None:
        self._library, self._entry, self._device = library, entry, device
        trt = library.trt
        library.log.clear()
        self._runtime = trt.Runtime(library.log)
        self._engine = self._runtime.deserialize_cuda_engine(bundle.file(entry.file).read_bytes())
        if self._engine is None:
            remedy = f"check the driver with nvidia-smi, or build the plan again with: {REBUILD}"
            raise library.failure(f"cannot load {entry.file}", remedy)
        if entry.weights_file is not None:
            self._take_weights(bundle.file(entry.weights_file))
        tensors = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.names: tuple[str, ...] = tuple(tensors)
        is_input = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in tensors}
        self._inputs = [name for name in tensors if is_input[name]]
        if any(name not in (_INPUTS if is_input[name] else _OUTPUTS) for name in tensors):
            raise BackendError(f"{entry.file} has tensors {', '.join(tensors)}, not ours; build it with: {REBUILD}")
        self._contexts: dict[int, _Context] = {}
        self._memory: Tensor | None = None
        self._cache_file = cache_folder() / f"{bundle.manifest.files[entry.file].sha256}.bin"
        self._cache: Any = None

    def _take_weights(self, onnx: Path) -> None:
        """Give a plan that was built without its weights those of the ONNX file that it was built from."""
        trt, log = self._library.trt, self._library.log
        refitter = trt.Refitter(self._engine, log)
        parser = trt.OnnxParserRefitter(refitter, log)
        if not (parser.refit_from_file(str(onnx)) and refitter.refit_cuda_engine()):
            raise self._library.failure(
                f"cannot give {self._entry.file} the weights of {onnx.name}", f"build the plan again with: {REBUILD}"
            )

    def dtype(self, name: str) -> torch.dtype:
        """What a buffer of this name holds; raises BackendError for what no network of ours takes or gives."""
        trt, found = self._library.trt, self._engine.get_tensor_dtype(name)
        dtypes = {trt.DataType.FLOAT: torch.float32, trt.DataType.INT64: torch.int64}
        if found not in dtypes:
            raise BackendError(
                f"{self._entry.file} holds {name} as {found}; expected float32, or int64 labels; build it again with: "
                f"{REBUILD}"
            )
        return dtypes[found]

    def context(self, batch: int) -> _Context:
        """The context of this batch, made on first use."""
        if batch not in self._contexts:
            self._contexts[batch] = self._make_context(batch)
        return self._contexts[batch]

    def shape(self, name: str, batch: int) -> tuple[int, ...]:
        """[batch, ...] of a tensor; the first axis is the only one that a plan leaves open."""
        return (batch, *tuple(self._engine.get_tensor_shape(name))[1:])

    def save_compiled(self) -> None:
        """Keep what the library compiled on this machine for the next start; no file is no error."""
        if self._cache is None:
            return
        blob = bytes(self._cache.serialize())
        try:
            if self._cache_file.is_file() and self._cache_file.stat().st_size == len(blob):
                return
            make_folder(self._cache_file.parent)
            with atomic_path(self._cache_file) as temporary:
                temporary.write_bytes(blob)
        except (OSError, OutputError) as error:
            logger.warning("compiled kernels are not kept for the next start: %s", error)

    def _make_context(self, batch: int) -> _Context:
        library = self._library
        context = self._engine.create_execution_context(self._runtime_config())
        if context is None:
            raise library.failure("cannot make an execution context", "check the GPU's free memory with nvidia-smi")
        for name in self._inputs:
            if not context.set_input_shape(name, self.shape(name, batch)):
                raise library.failure(f"does not take batch {batch}", f"build again with: {REBUILD} --batch {batch}")
        size = int(context.update_device_memory_size_for_shapes())
        if self._memory is None or self._memory.numel() < size:
            self._memory = self._device.allocate((max(size, 1),), torch.uint8)
        context.set_device_memory(self._memory.data_ptr(), self._memory.numel())
        return _Context(context, self._memory, library)

    def _runtime_config(self) -> Any:
        trt, config = self._library.trt, self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(config, "cuda_graph_strategy"):
            # The whole step is captured by us; nothing may be compiled or exchanged while it is.
            config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if self._cache is None:
                self._cache = self._stored_cache(config)
            config.set_runtime_cache(self._cache)
        return config

    def _stored_cache(self, config: Any) -> Any:
        """A cache of compiled kernels, with those of an earlier start where they are of this GPU and driver."""
        cache = config.create_runtime_cache()
        try:
            blob = self._cache_file.read_bytes()
        except OSError:
            return cache
        if not cache.deserialize(blob):
            logger.info("compiled kernels of another GPU, driver or library are not used: %s", self._cache_file)
        return cache


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A call of one context on rows first to end of the buffers; staged: buffers of its own where there are others.

    TensorRT wants addresses that are multiples of 256 bytes, which rows in the middle of a buffer need not have.
    """

    context: _Context
    names: tuple[str, ...]
    rows: slice
    staged: Mapping[str, Tensor] | None


@dataclass(frozen=True, slots=True, eq=False)
class BoundPlan:
    """See engine.backends.protocol.Bound."""

    device: Device
    pieces: tuple[_Piece, ...]
    buffers: Mapping[str, Tensor]

    def enqueue(self, stream: Stream) -> None:
        """Raises BackendError where TensorRT refuses the call."""
        for piece in self.pieces:
            if piece.staged is None:
                piece.context.enqueue(self.buffers, piece.names, stream)
                continue
            with self.device.use(stream):
                for name in (name for name in piece.names if name in _INPUTS):
                    piece.staged[name].copy_(self.buffers[name][piece.rows])
            piece.context.enqueue(piece.staged, piece.names, stream)
            with self.device.use(stream):
                for name in (name for name in piece.names if name in _OUTPUTS):
                    self.buffers[name][piece.rows].copy_(piece.staged[name])

    def check_capturable(self, stream: Stream) -> None:
        """TensorRT for RTX says whether it can be captured; the others can when the shapes stay."""
        for piece in self.pieces:
            context = piece.context.context
            if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(stream.cuda_stream):
                raise piece.context.library.failure("cannot be captured", f"build the plan again with: {REBUILD}")


class TrtNetwork:
    """The plans of one network behind fit and bind (engine.backends.protocol.Capturable)."""

    def __init__(self, bundle: Bundle, network: str, plans: Plans, device: Device) -> None:
        self.plans, self.device = plans, device
        self._engines = {entry.file: _Engine(plans.library, entry, bundle, device) for entry in plans.entries}
        self._calls: dict[int, BoundPlan] = {}

    def fit(self, batch: int) -> int:
        return sum(self.plans.pieces(batch))

    def bind(self, buffers: Mapping[str, Tensor]) -> BoundPlan:
        """Contexts and addresses, after one call that compiles what is still to be compiled."""
        self._check_open()
        pieces, first = [], 0
        sizes = self.plans.pieces(len(buffers["x_t"]))
        for size in sizes:
            engine = self._engines[self.plans.entry_for(size).file]
            for name in engine.names:
                if buffers[name].dtype != engine.dtype(name):
                    raise BackendError(
                        f"a plan takes {engine.dtype(name)} as {name}, not {buffers[name].dtype}; build it again with: "
                        f"{REBUILD}"
                    )
            staged = None if len(sizes) == 1 else self._buffers(engine, size)
            pieces.append(_Piece(engine.context(size), engine.names, slice(first, first + size), staged))
            first += size
        bound = BoundPlan(self.device, tuple(pieces), dict(buffers))
        bound.enqueue(self.device.main)
        self.device.synchronize()
        for engine in self._engines.values():
            engine.save_compiled()
        return bound

    def call(self, given: Mapping[str, Tensor | None], outputs: tuple[str, ...]) -> list[Tensor]:
        """One call from and to tensors of any address, on the GPU; waits for it."""
        self._check_open()
        count = len(given["x_t"])  # type: ignore[arg-type]
        batch = self.fit(count)
        # What was given may still be under way on another stream.
        self.device.synchronize()
        if batch not in self._calls:
            engine = self._engines[self.plans.entry_for(self.plans.pieces(batch)[0]).file]
            self._calls[batch] = self.bind(self._buffers(engine, batch))
        bound = self._calls[batch]
        for name, value in given.items():
            if name in bound.buffers and value is not None:
                self.device.copy_in(bound.buffers[name][:count], value)
        bound.enqueue(self.device.main)
        with self.device.use(self.device.main):
            results = [bound.buffers[name][:count].clone() for name in outputs]
        self.device.synchronize()
        return results

    def close(self) -> None:
        """Release contexts, plans and memory."""
        self._engines.clear()
        self._calls.clear()

    def _buffers(self, engine: _Engine, batch: int) -> dict[str, Tensor]:
        return {name: self.device.allocate(engine.shape(name, batch), engine.dtype(name)) for name in engine.names}

    def _check_open(self) -> None:
        if not self._engines:
            raise BackendError("this backend was closed; open the bundle again")


class TrtBackend:
    """A bundle's U-Net as TensorRT plans; see engine.backends.protocol.Backend and
    engine.backends.protocol.Capturable.
    """

    name = "trt"

    def __init__(
        self, bundle: Bundle, precision: str | None, plans: Plans | None = None, on: Device | None = None
    ) -> None:
        chosen = plans or find_plans(bundle, "unet", precision)
        device = on or cuda_device()
        self._network = TrtNetwork(bundle, "unet", chosen, device)
        self.manifest: Manifest = bundle.manifest
        self.precision, self.device = chosen.precision, device.kind

    def __call__(self, x_t: Tensor, timestep: Tensor, conditions: Conditions = UNCONDITIONED) -> Tensor:
        """See engine.backends.protocol.Backend; raises BackendError once closed."""
        return self._network.call(Inputs(x_t, timestep, conditions).tensors(), ("out",))[0]

    def fit(self, batch: int) -> int:
        return self._network.fit(batch)

    def bind(self, buffers: Mapping[str, Tensor]) -> BoundPlan:
        return self._network.bind(buffers)

    def close(self) -> None:
        self._network.close()


class TrtGuide:
    """A bundle's classifier gradient as TensorRT plans; an engine.diffusion.guidance.Guide that can be captured."""

    name = TrtBackend.name

    def __init__(
        self, config: ClassifierConfig, bundle: Bundle, plans: Plans | None = None, on: Device | None = None
    ) -> None:
        device = on or cuda_device()
        chosen = plans or find_plans(bundle, "classifier", None)
        self._network = TrtNetwork(bundle, "classifier", chosen, device)
        self._config, self.device, self.precision = config, device.kind, chosen.precision

    @property
    def config(self) -> ClassifierConfig:
        return self._config

    def __call__(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """See engine.diffusion.guidance.Guide; the results are where x_t is. Raises BackendError once closed."""
        given = {"x_t": x_t, "timestep": timestep, "label": label, "scale": scale}
        grad, log_p = self._network.call(given, ("grad", "log_p"))
        return grad.to(x_t.device), log_p.to(x_t.device)

    def fit(self, batch: int) -> int:
        return self._network.fit(batch)

    def bind(self, buffers: Mapping[str, Tensor]) -> BoundPlan:
        return self._network.bind(buffers)

    def close(self) -> None:
        """Release the plans."""
        self._network.close()
