"""Rewrites of the exported graph. Each takes a model and changes it in place; none changes a number."""

from __future__ import annotations

import ast
from typing import Any

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: Any) -> None:
    """Name every node after the module it came from, "blocks.7/node_conv2d_8", and drop the exporter's metadata.

    model: an onnx_ir.Model. The names are what TensorRT and ONNX Runtime show in their logs and profiles, and how
    verification finds a block's result. The metadata repeats them beside source lines and paths of the exporting
    machine, which do not belong in a file that is passed on.
    """
    for node in model.graph:
        scope = module_scope(node.metadata_props.get(_SCOPES, ""))
        node.name = f"{scope}/{node.name}" if scope else node.name
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()


def drop_unused_inputs(model: Any) -> None:
    """Remove inputs that no node reads, as the timestep of a network that does not see it.

    model: an onnx_ir.Model. Runtimes differ in whether such an input must be given, may be, or is an error.
    """
    read = [value for value in model.graph.inputs if value.uses()]
    model.graph.inputs[:] = read


def module_scope(scopes: str) -> str:
    """ "blocks.7" from the exporter's "['', 'blocks.7', 'blocks.7.qkv', 'conv2d_7']"; "" where there is none."""
    try:
        names = ast.literal_eval(scopes) if scopes else []
    except (ValueError, SyntaxError):
        return ""
    return str(names[1]) if len(names) > 2 else ""
