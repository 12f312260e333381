"""8-bit convolutions by explicit QuantizeLinear and DequantizeLinear pairs in an ONNX file.

ResBlocks' 3x3 convolutions, where a U-Net spends nearly all its arithmetic, get int8 inputs with one scale a tensor
and int8 weights with one scale an output channel, both symmetric: x ~ scale * round(x / scale) within [-127, 127]
(Jacob et al., Quantization and Training of Neural Networks, 2018, eq. 1 with zero point 0). An input's scale is the one
with the least squared error over states from first to last timestep, as the ranges of activations change with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from engine.bundle.file_names import onnx_data_name
from engine.errors import ExportError, MissingPackageError
from engine.networks.inputs import Inputs
from engine.networks.unet import UNet
from export.int8.calibration import SMALLEST, best_scale, watch_inputs
from export.onnx.onnx_file import EXTERNAL_DATA_BYTES, LEAST_EXTERNAL_BYTES

LEVELS = 127


def quantise(path: Path, unet: UNet, calls: Sequence[Inputs]) -> tuple[str, ...]:
    """Put the ResBlocks' 3x3 convolutions of an ONNX file into int8, in place; returns their names.

    path: the float16 network that export.to_onnx.export_onnx wrote; convolutions that it has in float32 are left. unet:
    the float32 network. calls: its inputs, to calibrate with. Raises ExportError for a file without such
    convolutions, MissingPackageError without onnx, OSError.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingPackageError("onnx", "quantisation", "onnx") from error
    model = onnx.load(str(path))
    scales = calibrate(unet, calls)
    weights = {value.name: value for value in model.graph.initializer}
    nodes, done = [], []
    for node in model.graph.node:
        layer = node.input[1].removesuffix(".weight") if node.op_type == "Conv" else ""
        if layer in scales and weights[node.input[1]].data_type == onnx.TensorProto.FLOAT16:
            nodes += _quantised(onnx, model.graph, node, weights[node.input[1]], scales[layer])
            done.append(layer)
        nodes.append(node)
    if not done:
        raise ExportError("this network has no 3x3 convolution in a ResBlock to quantise; use --precision fp16")
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    outside = path.with_name(onnx_data_name(path.name))
    outside.unlink(missing_ok=True)
    onnx.save_model(
        model,
        str(path),
        save_as_external_data=model.ByteSize() > EXTERNAL_DATA_BYTES,
        location=outside.name,
        size_threshold=LEAST_EXTERNAL_BYTES,
    )
    return tuple(done)


def calibrate(unet: UNet, calls: Sequence[Inputs]) -> dict[str, float]:
    """The input scale of each convolution, by its name such as "blocks.3.conv1"."""
    blocks = enumerate(unet.config.blocks)
    names = [f"blocks.{index}.{part}" for index, block in blocks for part in block.int8_convolutions]
    seen = watch_inputs(unet, names, calls)
    return {name: best_symmetric(found.values, max(-found.low, found.high)) for name, found in seen.items()}


def best_symmetric(values: Tensor, largest: float) -> float:
    """The scale of least squared error for these values [N], of which the tensor's largest magnitude is `largest`."""
    return best_scale(
        values, largest, LEVELS, lambda given, scale: (given / scale).round().clamp(-LEVELS, LEVELS) * scale
    )


def channel_scales(weight: np.ndarray) -> np.ndarray:
    """[Cout] float16 for a weight [Cout, Cin, k, k]; no smaller than float16's smallest number."""
    largest = np.abs(weight.astype(np.float32)).reshape(len(weight), -1).max(axis=1)
    return np.maximum((largest / LEVELS).astype(np.float16), np.float16(SMALLEST))


def _quantised(onnx: Any, graph: Any, conv: Any, weight: Any, scale: float) -> list[Any]:
    """The nodes to put before a Conv, which is changed to read them; the float16 weight is replaced."""
    from onnx import helper, numpy_helper

    floats = numpy_helper.to_array(weight)
    per_channel = channel_scales(floats)
    levels = np.rint(floats.astype(np.float32) / per_channel.astype(np.float32)[:, None, None, None])
    name = weight.name
    constants = {
        f"{name}.int8": levels.clip(-LEVELS, LEVELS).astype(np.int8),
        f"{name}.scale": per_channel,
        f"{name}.zero": np.zeros(len(floats), np.int8),
        f"{name}.input_scale": np.array(scale, np.float16),
        f"{name}.input_zero": np.array(0, np.int8),
    }
    graph.initializer.remove(weight)
    graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in constants.items())
    x, prefix = conv.input[0], conv.name
    quantised, restored, weights = (f"{name}.{part}" for part in ("input_int8", "input_restored", "restored"))
    pair = [f"{name}.input_scale", f"{name}.input_zero"]
    conv.input[0], conv.input[1] = restored, weights
    return [
        helper.make_node("QuantizeLinear", [x, *pair], [quantised], f"{prefix}/quantize"),
        helper.make_node("DequantizeLinear", [quantised, *pair], [restored], f"{prefix}/dequantize"),
        helper.make_node(
            "DequantizeLinear",
            [f"{name}.int8", f"{name}.scale", f"{name}.zero"],
            [weights],
            f"{prefix}/dequantize_weight",
            axis=0,
        ),
    ]
