"""What is used of TensorRT's run time, over memory of the CPU: addresses, shapes and sizes are checked."""

from __future__ import annotations

import ctypes
import json
from enum import Enum, IntEnum
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from device_fakes import RecordingDevice
from torch import Tensor

from engine.backends.trt.trt_library import Library
from engine.backends.trt.trt_log import make_log

VERSION = "1.7.1"


class AlignedDevice(RecordingDevice):
    """Allocates at multiples of 256 bytes, as CUDA does."""

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = prod(shape) * dtype.itemsize
        raw = super().allocate((size + 256,), torch.uint8)
        start = -raw.data_ptr() % 256
        return raw[start : start + size].view(dtype).reshape(shape)


def memory_at(address: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = prod(shape) * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).reshape(shape)


class ILogger:
    class Severity(IntEnum):
        ERROR = 1
        WARNING = 2
        INFO = 3

    def log(self, severity: Any, msg: str) -> None: ...


class DataType(Enum):
    FLOAT = 0
    HALF = 1
    INT64 = 8


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class IRuntimeCache:
    def __init__(self) -> None:
        self.blob = b"compiled here"

    def serialize(self) -> bytes:
        return self.blob

    def deserialize(self, blob: bytes) -> bool:
        return blob == self.blob


class IRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = self.dynamic_shapes_kernel_specialization_strategy = self.cache = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        assert strategy == "user managed"

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache()

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class IExecutionContext:
    def __init__(self, engine: Any) -> None:
        self.engine, self.shapes, self.addresses, self.size = engine, {}, {}, None
        self.runs: list[int] = []

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.plan["profile"]
        self.shapes[name] = tuple(shape)
        return smallest <= shape[0] <= largest and list(shape[1:]) == self.engine.plan["inputs"][name][1:]

    def update_device_memory_size_for_shapes(self) -> int:
        assert self.shapes.keys() == self.engine.plan["inputs"].keys()
        self.needs = 1024 * self.batch
        return self.needs

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.needs
        assert memory % 256 == 0
        self.size = size

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % 256 == 0
        self.addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.trt.is_capturable

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self.size is not None
        dtypes = self.engine.dtypes
        given = {n: memory_at(self.addresses[n], s, dtypes[n]) for n, s in self.shapes.items()}
        self.runs.append(stream_handle)
        for name, result in self.engine.trt.networks[self.engine.plan["network"]](given).items():
            memory_at(self.addresses[name], tuple(result.shape), torch.float32).copy_(result)
        return self.engine.trt.runs

    @property
    def batch(self) -> int:
        return self.shapes["x_t"][0]


class ICudaEngine:
    def __init__(self, trt: Any, plan: dict[str, Any]) -> None:
        self.trt, self.plan = trt, plan
        self.names = [*plan["inputs"], *plan["outputs"]]
        self.dtypes = {n: torch.int64 if n == "label" else torch.float32 for n in self.names}
        self.contexts: list[IExecutionContext] = []
        self.weights: bytes | None = None

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.plan["inputs"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType.INT64 if name == "label" else DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple((self.plan["inputs"] | self.plan["outputs"])[name])

    def create_runtime_config(self) -> IRuntimeConfig:
        config = IRuntimeConfig()
        self.trt.configs.append(config)
        return config

    def create_execution_context(self, runtime_config: IRuntimeConfig) -> IExecutionContext:
        assert (runtime_config.cuda_graph_strategy, runtime_config.dynamic_shapes_kernel_specialization_strategy) == (
            "off",
            "eager",
        )
        self.contexts.append(IExecutionContext(self))
        return self.contexts[-1]


class Runtime:
    trt: Any = None

    def __init__(self, logger: ILogger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            self.logger.log(ILogger.Severity.ERROR, "magic tag does not match")
            return None
        self.trt.engines.append(ICudaEngine(self.trt, plan))
        return self.trt.engines[-1]


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        self.engine = engine

    def refit_cuda_engine(self) -> bool:
        return self.engine.weights is not None


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self.refitter, self.logger = refitter, logger

    def refit_from_file(self, file: str) -> bool:
        weights = Path(file).read_bytes()
        if weights != b"the weights":
            self.logger.log(ILogger.Severity.ERROR, "a weight is missing")
            return False
        self.refitter.engine.weights = weights
        return True


def fake_library(networks: dict[str, Any], name: str = "tensorrt_rtx") -> Library:
    """networks: name -> function of the inputs by name that gives the outputs by name."""
    trt = SimpleNamespace(
        __version__=VERSION, ILogger=ILogger, DataType=DataType, TensorIOMode=TensorIOMode, networks=networks,
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        CudaGraphStrategy=SimpleNamespace(DISABLED="off"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        Refitter=Refitter, OnnxParserRefitter=OnnxParserRefitter, engines=[], configs=[], is_capturable=True, runs=True,
    )  # fmt: skip
    trt.Runtime = type("Runtime", (Runtime,), {"trt": trt})
    return Library(name, trt, make_log(trt))


def write_plan(path: Path, network: str, profile: tuple[int, int, int], inputs: Any, outputs: Any) -> None:
    plan = {"network": network, "profile": profile, "inputs": inputs, "outputs": outputs}
    path.write_text(json.dumps(plan))
