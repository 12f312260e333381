"""What TensorRT made of a network, read from its build log: fused kernels, their types, memory and traffic.

A plan can be looked into only on a GPU. While it builds one, TensorRT-RTX writes a line for every kernel to its
VERBOSE log (with detailed profiling verbosity), and that needs none.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.bundle.manifest import FusionReport
from engine.errors import MissingPackageError

logger = logging.getLogger(__name__)

_KERNEL = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>[^,]*),"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\],.*?Datatype: (?P<type>\w+),")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_MEMORY = re.compile(r"^Total (Activation|Weights) Memory: (\d+) bytes")
_NORM_SILU = re.compile(r"__myl_(Cast)?Silu(MulMinMaxRoun)?(Cast)?Gnor(Cast)?(_|$)")
_SIZES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "FP8": 1, "Int32": 4, "Int64": 8, "Bool": 1}


@dataclass(frozen=True, slots=True)
class LoggedTensor:
    """One operand in the log: its shape and type as the library writes them, "Half" say."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _SIZES.get(self.type, 4)


@dataclass(frozen=True, slots=True)
class Kernel:
    """One launch: the library's name of the kernel, what it reads and writes, the ONNX nodes it computes."""

    tactic: str
    inputs: tuple[LoggedTensor, ...]
    outputs: tuple[LoggedTensor, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fusable:
    """Names of the ONNX nodes that a good plan fuses: GroupNormalization before SiLU, and attention's softmax."""

    norm_silu: tuple[str, ...]
    attention: tuple[str, ...]


def read_kernels(lines: Iterable[str]) -> Iterator[Kernel]:
    """The kernels of a build log."""
    for line in lines:
        if match := _KERNEL.match(line):
            yield Kernel(
                match["tactic"],
                tuple(_tensors(match["inputs"])),
                tuple(_tensors(match["outputs"])),
                tuple(_NODE.findall(line)),
            )


def _tensors(text: str) -> Iterator[LoggedTensor]:
    for match in _TENSOR.finditer(text):
        shape = tuple(int(size) for size in match["shape"].split(",") if size)
        yield LoggedTensor(match["name"], shape, match["type"])


def fusable(onnx: Path) -> Fusable:
    """What of an ONNX file should be fused; raises MissingPackageError without onnx."""
    try:
        import onnx as library
    except ImportError as error:
        raise MissingPackageError("onnx", "looking into an ONNX file", "onnx") from error
    graph = library.load(str(onnx), load_external_data=False).graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def feeds_silu(name: str) -> bool:
        after = readers.get(name, [])
        through_cast = any(node.op_type == "Cast" and feeds_silu(node.output[0]) for node in after)
        return through_cast or any(node.op_type == "Sigmoid" for node in after)

    def feeds_one_half_product(name: str) -> bool:
        after = readers.get(name, [])
        if len(after) != 1 or after[0].op_type != "Cast":
            return False
        return [node.op_type for node in readers.get(after[0].output[0], [])] == ["MatMul"]

    norms = [node for node in graph.node if node.op_type == "GroupNormalization" and feeds_silu(node.output[0])]
    # The fused kernel is for half precision, where a cast follows the softmax. A gradient reads its softmaxes again, so
    # that their attention cannot be one kernel.
    attention = [node for node in graph.node if node.op_type == "Softmax" and feeds_one_half_product(node.output[0])]
    return Fusable(tuple(node.name for node in norms), tuple(node.name for node in attention))


def fusion_report(lines: Iterable[str], wanted: Fusable) -> FusionReport | None:
    """Sum up a build log of one profile; None where it lists no kernel, as the data-centre library's."""
    lines = tuple(lines)
    kernels = tuple(read_kernels(lines))
    if not kernels:
        return None
    memory = {match[1]: int(match[2]) for line in lines if (match := _MEMORY.match(line))}
    norm_silu = [kernel for kernel in kernels if _NORM_SILU.search(kernel.tactic)]
    attention = [kernel for kernel in kernels if kernel.tactic.startswith("_gemm_mha")]
    in_norms = {node for kernel in norm_silu for node in kernel.nodes}
    in_attention = {node for kernel in attention for node in kernel.nodes}
    apart = [name for name in wanted.norm_silu if name not in in_norms]
    apart += [name for name in wanted.attention if name not in in_attention]
    return FusionReport(
        launches=len(kernels),
        norm_silu=len(norm_silu),
        norm_silu_expected=len(wanted.norm_silu),
        attention=len(attention),
        attention_expected=len(wanted.attention),
        unfused=tuple(apart),
        kernel_types=dict(Counter(tensor.type for kernel in kernels for tensor in kernel.outputs[:1])),
        fp32_activations=_fp32_between(kernels),
        int8_convolutions=sum(any(t.type == "Int8" for t in kernel.inputs[:1]) for kernel in kernels),
        traffic_bytes=_traffic_bytes(kernels),
        activation_bytes=memory.get("Activation", 0),
        weight_bytes=memory.get("Weights", 0),
    )


def _traffic_bytes(kernels: Iterable[Kernel]) -> int | None:
    tensors = [tensor for kernel in kernels for tensor in (*kernel.inputs, *kernel.outputs)]
    is_known = all(size >= 0 for tensor in tensors for size in tensor.shape)
    return sum(tensor.size_bytes for tensor in tensors) if is_known else None


def _fp32_between(kernels: Iterable[Kernel]) -> tuple[str, ...]:
    """fp32 images from a kernel that reads half precision or int8 to one that writes it.

    Statistics and vectors have no height and width; the network's own fp32 input and output lie at its ends.
    """
    kernels = tuple(kernels)
    half = ("Half", "BFloat16", "Int8")
    written = {
        tensor.name: tensor
        for kernel in kernels
        if any(operand.type in half for operand in kernel.inputs)
        for tensor in kernel.outputs
    }
    read = [
        tensor.name
        for kernel in kernels
        if any(result.type in half for result in kernel.outputs)
        for tensor in kernel.inputs
    ]
    images = [written[name] for name in dict.fromkeys(read) if name in written]
    return tuple(t.name for t in images if t.type == "Float" and len(t.shape) == 4 and min(t.shape[1:]) > 1)


def warn_unfused(file: str, report: FusionReport) -> None:
    """Name the layers that TensorRT did not fuse."""
    if report.unfused:
        logger.warning(
            "%s: not fused: %s. The library has no fused kernel for them; known are groups of 1, 3 or 6 channels, "
            "and norms before a resampling; the plan is right and slower",
            file,
            ", ".join(report.unfused),
        )
