"""8-bit convolutions by explicit QuantizeLinear and DequantizeLinear pairs in an ONNX file.

ResBlocks' 3x3 convolutions, where a U-Net spends nearly all its arithmetic, get int8 inputs with one scale a tensor
and int8 weights with one scale an output channel, both symmetric: x ~ scale * round(x / scale) within [-127, 127]
(Jacob et al., Quantization and Training of Neural Networks, 2018, eq. 1 with zero point 0). An input's scale is the one
with the least squared error over states from first to last timestep, as the ranges of activations change with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.errors import ExportError, MissingPackageError
from engine.networks.layers import ResBlock
from engine.networks.unet import UNet
from export.onnx.onnx_file import EXTERNAL_DATA_BYTES

LEVELS = 127
SMALLEST = 2.0**-24
"""float16's smallest number: scales are float16."""

CLIPS = tuple(1 - 0.05 * i for i in range(15))
"""Shares of the largest magnitude that calibration tries as the end of the range."""

SAMPLES = 1 << 14
"""Values of each call that calibration keeps of a tensor."""


def quantise(path: Path, unet: UNet, calls: Sequence[Mapping[str, Tensor]]) -> tuple[str, ...]:
    """Put the ResBlocks' 3x3 convolutions of an ONNX file into int8, in place; returns their names.

    path: the float16 network that export.to_onnx.export_onnx wrote; convolutions that it has in float32 are left. unet:
    the float32 network. calls: its inputs by name, to calibrate with. Raises ExportError for a file without such
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
    Path(f"{path}.data").unlink(missing_ok=True)
    is_large = model.ByteSize() > EXTERNAL_DATA_BYTES
    onnx.save_model(model, str(path), save_as_external_data=is_large, location=f"{path.name}.data")
    return tuple(done)


def calibrate(unet: UNet, calls: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """The input scale of each convolution, by its name such as "blocks.3.conv1"."""
    samples: dict[str, list[Tensor]] = {}
    largest: dict[str, float] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, block in unet.named_modules():
            if isinstance(block, ResBlock):
                for part in ("conv1", "conv2"):

                    def keep(_module: Any, given: Any, name: str = f"{name}.{part}") -> None:
                        values = given[0].abs().flatten()
                        largest[name] = max(largest.get(name, 0.0), float(values.max()))
                        samples.setdefault(name, []).append(values[:: max(1, len(values) // SAMPLES)].clone())

                    hooks.callback(getattr(block, part).register_forward_pre_hook(keep).remove)
        for inputs in calls:
            unet(**inputs)
    return {name: best_scale(torch.cat(values), largest[name]) for name, values in samples.items()}


def best_scale(magnitudes: Tensor, largest: float) -> float:
    """The scale of least squared error for these magnitudes [N], of which the tensor's largest is `largest`."""
    scales = [max(largest * clip / LEVELS, SMALLEST) for clip in CLIPS]
    return min(
        scales, key=lambda s: float(((magnitudes / s).round().clamp(max=LEVELS) * s - magnitudes).square().sum())
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
