# ruff: noqa: UP006, UP007
"""GroupNorm+SiLU of a network as a Triton kernel inside a plan of data-centre TensorRT.

The ONNX file gets one node for each float16 pair, with a function body, so that any other reader computes the same. The
plugin is compiled while the plan is built, and the plan runs it without Python or Triton. A launch is one program a
group: the form that one kernel can be.

TensorRT reads the annotations of the functions it is given and knows those of `typing`, so that they are neither
strings nor of another spelling here.
"""

import functools
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Tuple, Union  # noqa: UP035

from engine.errors import ExportError, MissingPackageError

NAMESPACE, NAME = "unet_rt", "GroupNormSiLU"
_OPSET = 21


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernel is compiled for: x [N, groups * group_channels, H, W] with H * W = positions."""

    groups: int
    group_channels: int
    positions: int
    eps: float


def plugin_nodes(onnx_file: Path, out: Path) -> int:
    """Write an ONNX file whose float16 GroupNormalization, Sigmoid, Mul are one node; returns how many are.

    Only where nothing else reads what is between them; where there is none, nothing is written. Raises
    MissingPackageError without onnx.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingPackageError("onnx", "writing plugin nodes", "onnx") from error
    model = onnx.load(str(onnx_file), load_external_data=False)
    graph = model.graph
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weights = {value.name: value for value in graph.initializer}
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.value_info, *graph.input)
    }
    replaced: dict[str, Any] = {}
    dropped: set[str] = set()
    for norm in (node for node in graph.node if node.op_type == "GroupNormalization"):
        after = _silu(norm, readers)
        x, weight = norm.input[0], weights.get(norm.input[1])
        is_half = weight is not None and weight.data_type == onnx.TensorProto.FLOAT16
        if after is None or not is_half or len(shapes.get(x, ())) != 4 or 0 in shapes[x][1:]:
            continue
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in norm.attribute}
        fused = onnx.helper.make_node(
            NAME,
            list(norm.input),
            list(after[1].output),
            name=norm.name,
            domain=NAMESPACE,
            num_groups=attributes["num_groups"],
            epsilon=attributes.get("epsilon", 1e-5),
            channels=shapes[x][1],
            positions=shapes[x][2] * shapes[x][3],
            plugin_namespace=NAMESPACE,
            plugin_version="1",
        )
        # Where the product stood: everything that the node reads comes before.
        replaced[after[1].name] = fused
        dropped |= {norm.name, after[0].name}
    if not replaced:
        return 0
    nodes = [replaced.get(node.name, node) for node in graph.node if node.name not in dropped]
    del graph.node[:]
    graph.node.extend(nodes)
    model.functions.append(_function(onnx))
    model.opset_import.append(onnx.helper.make_opsetid(NAMESPACE, 1))
    onnx.save(model, str(out))
    return len(replaced)


def _silu(norm: Any, readers: dict[str, list[Any]]) -> tuple[Any, Any] | None:
    """The Sigmoid and Mul that alone read a norm's output, or None."""
    (output,) = norm.output
    after = sorted(readers.get(output, []), key=lambda node: str(node.op_type))
    if [node.op_type for node in after] != ["Mul", "Sigmoid"]:
        return None
    product, sigmoid = after
    is_silu = set(product.input) == {output, sigmoid.output[0]} and readers.get(sigmoid.output[0]) == [product]
    return (sigmoid, product) if is_silu else None


def _function(onnx: Any) -> Any:
    """What the node computes, in standard operators."""
    make_node = onnx.helper.make_node
    norm = make_node("GroupNormalization", ["x", "weight", "bias"], ["normal"])
    for name, kind in (("num_groups", onnx.AttributeProto.INT), ("epsilon", onnx.AttributeProto.FLOAT)):
        norm.attribute.append(onnx.AttributeProto(name=name, ref_attr_name=name, type=kind))
    nodes = [norm, make_node("Sigmoid", ["normal"], ["gate"]), make_node("Mul", ["normal", "gate"], ["y"])]
    attributes = ["num_groups", "epsilon", "channels", "positions", "plugin_namespace", "plugin_version"]
    opsets = [onnx.helper.make_opsetid("", _OPSET)]
    return onnx.helper.make_function(NAMESPACE, NAME, ["x", "weight", "bias"], ["y"], nodes, opsets, attributes)


@functools.cache
def register_plugin(target: str) -> None:
    """Let `tensorrt` of this process build the node for a GPU such as "sm90"; raises ExportError where it cannot."""
    if "tensorrt_rtx" in sys.modules:
        raise ExportError(
            "--plugins needs a process without tensorrt_rtx, which ends at a plugin; run it in a new process"
        )
    if target.endswith("+"):
        raise ExportError("--plugins compiles a kernel for one GPU; leave out --hardware-compatible")
    try:
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise ExportError(f"--plugins needs tensorrt 10.9 or later, with tensorrt.plugin: {error}") from error
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("triton", "--plugins triton", "triton") from error
    declare_plugin(trtp, int(target.removeprefix("sm")))


def declare_plugin(trtp: Any, architecture: int) -> None:
    """Register shape, type and kernel with tensorrt.plugin. architecture: 90 for compute capability 9.0."""
    identifier = f"{NAMESPACE}::{NAME}"

    @trtp.register(identifier)  # type: ignore[untyped-decorator]
    def describe(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        num_groups: int,
        epsilon: float,
        channels: int,
        positions: int,
    ) -> trtp.TensorDesc:
        return x.like()

    @trtp.autotune(identifier)  # type: ignore[untyped-decorator]
    def types(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        num_groups: int,
        epsilon: float,
        channels: int,
        positions: int,
        outputs: Tuple[trtp.TensorDesc],
    ) -> List[trtp.AutoTuneCombination]:
        return [trtp.AutoTuneCombination("FP16, FP16, FP16, FP16", "LINEAR")]

    @trtp.aot_impl(identifier)  # type: ignore[untyped-decorator]
    def kernel(
        x: trtp.TensorDesc,
        weight: trtp.TensorDesc,
        bias: trtp.TensorDesc,
        num_groups: int,
        epsilon: float,
        channels: int,
        positions: int,
        outputs: Tuple[trtp.TensorDesc],
        tactic: int,
    ) -> Tuple[Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymExprs]:
        shape = Shape(num_groups, channels // num_groups, positions, epsilon)
        name, ptx, warps, shared = compile_plugin(shape, architecture)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y = x.shape_expr[0], num_groups
        launch.block_x, launch.shared_mem = 32 * warps, shared
        return name, ptx, launch, trtp.SymIntExprs.from_tuple([trtp.SymInt32(positions)])


def compile_plugin(shape: Shape, architecture: int) -> tuple[str, str, int, int]:
    """Entry, PTX, warps a program and bytes of shared memory of the kernel."""
    from kernels.aot import compile_kernel
    from kernels.triton.group_norm_silu import plan_launch
    from kernels.triton.plugin import group_norm_silu_plugin

    # With very many images, one program a group is what fills the GPU.
    launch = plan_launch(1 << 16, shape.groups, shape.group_channels, shape.positions, False)
    tile = (launch.channel_tile, launch.position_tile, launch.is_resident)
    kernel = compile_kernel(
        group_norm_silu_plugin,
        ("*fp16", "*fp16", "*fp16", "i32", "*fp16"),
        (shape.eps, shape.groups, shape.group_channels, *tile),
        architecture,
        launch.num_warps,
    )
    return kernel.metadata.name, strip_hidden(kernel.asm["ptx"]), launch.num_warps, kernel.metadata.shared


def strip_hidden(ptx: str) -> str:
    """Without the two pointers that Triton appends to an entry's parameters, which TensorRT does not pass.

    Raises ExportError where the kernel reads them.
    """
    head = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    if head is None:
        raise ExportError("the compiled kernel has no entry; pip install triton==3.7.1")
    parameters = head[1].split(",")
    kept, hidden = parameters[:-2], [parameter.split()[-1] for parameter in parameters[-2:]]
    rest = ptx[head.end() :]
    if any(re.search(rf"\b{re.escape(name)}\b", rest) for name in hidden):
        raise ExportError(f"the compiled kernel uses {' and '.join(hidden)}; pip install triton==3.7.1")
    return ptx[: head.start(1)] + ",".join(kept) + "\n" + ptx[head.end(1) :]
