"""Results of single blocks, from the torch network and from its ONNX file, so that an error can be located."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.backends.ort.ort_backend import open_session, run_session
from engine.errors import MissingPackageError
from engine.networks.inputs import Inputs
from engine.networks.unet import UNet

_BLOCK = re.compile(r"blocks\.(\d+)/")


def torch_layers(unet: UNet, inputs: Inputs) -> dict[int, Tensor]:
    """The result of every block that computes something, by its index in the config's block list, for one call."""
    results: dict[int, Tensor] = {}
    with ExitStack() as hooks, torch.no_grad():
        for index, block in enumerate(unet.blocks):

            def keep(_module: Any, _args: Any, output: Tensor, index: int = index) -> None:
                results[index] = output

            hooks.callback(block.register_forward_hook(keep).remove)
        unet(**inputs.tensors())
    return results


class OnnxLayers:
    """An ONNX file in ONNX Runtime with every block's result as a further output."""

    def __init__(self, path: Path) -> None:
        """Raises MissingPackageError without onnx or onnxruntime."""
        try:
            import onnx
        except ImportError as error:
            raise MissingPackageError("onnx", "looking into an ONNX file", "onnx") from error
        model = onnx.load(str(path), load_external_data=False)
        found = block_outputs(model.graph)
        known = {value.name: value for value in model.graph.value_info}
        outputs = {value.name for value in model.graph.output}
        for name in found.values():
            if name not in outputs:
                value = known.get(name) or onnx.helper.make_empty_tensor_value_info(name)
                model.graph.output.append(value)
        # Beside the original, so that external weights are found.
        temporary = path.with_name(f".layers-{path.name}")
        try:
            temporary.write_bytes(model.SerializeToString())
            self._session = open_session(temporary, None)
        finally:
            temporary.unlink(missing_ok=True)
        self._names = found

    def __call__(self, inputs: Inputs) -> dict[int, Tensor]:
        """Block index -> result, for one call of the network."""
        results = run_session(self._session, inputs.tensors(), list(self._names.values()))
        return dict(zip(self._names, results, strict=True))


def block_outputs(graph: Any) -> dict[int, str]:
    """Block index -> name of the value that leaves the block.

    A node belongs to the block that its name begins with (export.onnx.passes.name_nodes); the block's result is the
    last of its values that a node outside it, or the graph's caller, reads.
    """
    owner: dict[str, int] = {}
    leaving: set[str] = {value.name for value in graph.output}
    for node in graph.node:
        match = _BLOCK.match(node.name)
        block = int(match[1]) if match else -1
        leaving |= {name for name in node.input if owner.get(name, block) != block}
        owner |= dict.fromkeys(node.output, block)
    return {block: name for name, block in owner.items() if name in leaving and block >= 0}
