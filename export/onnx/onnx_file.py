"""Writing an exported program as an ONNX file: what the network and the classifier's gradient share."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from engine.bundle.file_names import onnx_data_name
from engine.errors import ExportError, MissingPackageError
from export.onnx.passes import drop_unused_inputs, name_nodes

OPSET = 21
"""GroupNormalization takes its statistics in float32 from here on, and attention is still plain matrix products."""

EXTERNAL_DATA_BYTES = 1_800_000_000
"""Weights beyond this go to a second file, because a protobuf holds at most 2 GiB."""

LEAST_EXTERNAL_BYTES = 4096
"""Smaller tensors stay in the graph: runtimes read shapes, axes and split sizes before they look at a second file."""


def save_program(program: torch.onnx.ONNXProgram, path: Path, size_bytes: int) -> None:
    """Name the nodes, drop unused inputs and write the file; raises OSError.

    Weights go to `path`.data where size_bytes of them need it.
    """
    name_nodes(program.model)
    drop_unused_inputs(program.model)
    if size_bytes <= EXTERNAL_DATA_BYTES:
        program.save(str(path), external_data=False)
        return
    import onnx_ir

    onnx_ir.save(
        program.model, path, external_data=onnx_data_name(path.name), size_threshold_bytes=LEAST_EXTERNAL_BYTES
    )


def has_wide_products(path: Path) -> bool:
    """Whether an ONNX file has convolutions or matrix products in float32 or bfloat16.

    The types are those of the weights, and of the values that the exporter noted. Raises ExportError for a file that is
    no ONNX, MissingPackageError without onnx.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingPackageError("onnx", "looking into an ONNX file", "onnx") from error
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise ExportError(f"{path} is not a readable ONNX file: {error}") from error
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    types |= {value.name: value.data_type for value in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm")]
    wide = (onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16)
    return any(types.get(name) in wide for node in products for name in node.input[:2])


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """torch's exporter warns of its own deprecations and of packages it does not need."""
    names = ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
