"""export.trt.plugin_triton: the ONNX file with plugin nodes, the kernel's signature, what TensorRT is told."""

from __future__ import annotations

import json
import re
import sys
import typing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from aot_runs import run
from helpers import adm_unet, random_network

from engine.errors import ExportError
from export.precision import Precision, typed_unet
from export.to_onnx import export_onnx
from export.trt import plugin_triton
from export.trt.fusion import fusable
from export.trt.plugin_triton import NAME, NAMESPACE, declare_plugin, plugin_nodes, register_plugin, strip_hidden
from kernels import reference

CONFIG = adm_unet(width=32)
COMPILES = """
import json, sys
from kernels.aot import _resources, entry_parameters
from export.trt import plugin_triton
kept = plugin_triton.strip_hidden
originals = []
plugin_triton.strip_hidden = lambda ptx: originals.append(ptx) or kept(ptx)
for groups, channels, positions in json.loads(sys.argv[1]):
    shape = plugin_triton.Shape(groups, channels // groups, positions, 1e-5)
    for architecture in (80, 90, 100):
        name, ptx, warps, shared = plugin_triton.compile_plugin(shape, architecture)
        assert f".entry {name}(" in ptx
        print(json.dumps([_resources(ptx), _resources(originals.pop()), entry_parameters(ptx), warps, shared]))
"""


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    file = tmp_path_factory.mktemp("plugin") / "unet.fp16.onnx"
    export_onnx(typed_unet(random_network(CONFIG), Precision.FP16), file)
    return file


def test_every_pair_becomes_a_node_that_computes_the_same(half, tmp_path):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    out = tmp_path / "unet.plugins.onnx"
    count = plugin_nodes(half, out)
    assert count >= 8
    model = onnx.load(out)
    onnx.checker.check_model(model)
    nodes = [node for node in model.graph.node if node.op_type == NAME]
    assert len(nodes) == count
    assert {node.name for node in nodes} <= set(fusable(half).norm_silu)
    inputs = {"x_t": np.random.default_rng(0).standard_normal((2, 1, 8, 8), np.float32)}
    inputs |= {"timestep": np.array([3.0, 900.0], np.float32)}
    results = [
        ort.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(["out"], inputs)[0]
        for file in (half, out)
    ]
    np.testing.assert_allclose(results[0], results[1], atol=2e-3 * float(np.abs(results[0]).max()))


def test_a_network_without_half_norms_is_left(tmp_path):
    pytest.importorskip("onnx")
    export_onnx(random_network(CONFIG), tmp_path / "unet.onnx")
    assert plugin_nodes(tmp_path / "unet.onnx", tmp_path / "out.onnx") == 0
    assert not (tmp_path / "out.onnx").exists()


def test_the_kernel_takes_what_tensorrt_passes():
    """Three inputs, an integer, the output: without the hidden pointers, and otherwise the same machine code."""
    pytest.importorskip("triton")
    lines = run(COMPILES, json.dumps([[32, 128, 1024], [32, 96, 49], [32, 256, 16384]])).splitlines()
    assert len(lines) == 9
    for resources, original, parameters, warps, shared in map(json.loads, lines):
        assert parameters == [".u64", ".u64", ".u64", ".u32", ".u64"]
        assert resources == original
        assert resources[2] == 0, "spilled bytes"
        assert warps in (2, 4, 8)
        assert shared <= 2048


def test_hidden_parameters_that_are_read_are_an_error():
    ptx = (
        ".visible .entry k(\n.param .u64 k_param_0,\n.param .u64 k_param_1,\n.param .u64 k_param_2\n)\n{ ld %r, [%s]; }"
    )
    assert re.findall(r"k_param_\d", strip_hidden(ptx.replace("%s", "k_param_0"))) == ["k_param_0", "k_param_0"]
    with pytest.raises(ExportError, match="uses k_param_1 and k_param_2"):
        strip_hidden(ptx.replace("%s", "k_param_2"))
    with pytest.raises(ExportError, match="no entry"):
        strip_hidden("")


@pytest.mark.parametrize(("channels", "size"), [(32, 8), (96, 7), (64, 96)])
def test_the_kernel_is_the_reference(channels, size):
    triton = pytest.importorskip("triton")
    from triton_cases import DEVICE, assert_as_good_as_torch

    from kernels.triton.group_norm_silu import plan_launch
    from kernels.triton.plugin import group_norm_silu_plugin

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, size, size, generator=generator).half().to(DEVICE)
    weight, bias = (torch.randn(channels, generator=generator).half().to(DEVICE) for _ in range(2))
    launch = plan_launch(1 << 16, 32, channels // 32, size * size, False)
    assert launch.splits == 1
    y = torch.empty_like(x)
    group_norm_silu_plugin[(2, 32)](
        x, weight, bias, size * size, y, 1e-5, 32, channels // 32, launch.channel_tile, launch.position_tile,
        launch.is_resident, num_warps=launch.num_warps,
    )  # fmt: skip
    assert triton is not None
    exact = reference.group_norm_silu(x.float(), weight.float(), bias.float(), 32, 1e-5)
    assert_as_good_as_torch(y, torch.nn.functional.silu(torch.group_norm(x, 32, weight, bias, 1e-5)), exact)


class Recorder:
    """tensorrt.plugin, keeping the functions that it is given."""

    def __init__(self) -> None:
        self.functions: dict[str, Any] = {}
        self.KernelLaunchParams = SimpleNamespace
        self.SymInt32 = self.AutoTuneCombination = lambda *values: values
        self.SymExprs = type("SymExprs", (), {})
        self.SymIntExprs = SimpleNamespace(from_tuple=list)
        self.TensorDesc = type("TensorDesc", (), {"like": lambda self: "as x", "shape_expr": ("batch", 64, 8, 8)})

    def __getattr__(self, kind: str) -> Any:
        def decorator(identifier: str) -> Any:
            assert identifier == f"{NAMESPACE}::{NAME}"
            return lambda function: self.functions.setdefault(kind, function)

        return decorator


def test_what_tensorrt_is_told(monkeypatch):
    trtp = Recorder()
    asked = []
    monkeypatch.setattr(
        plugin_triton, "compile_plugin", lambda *args: asked.append(args) or ("entry", "the ptx", 4, 512)
    )
    declare_plugin(trtp, 90)
    assert set(trtp.functions) == {"register", "autotune", "aot_impl"}
    x = trtp.TensorDesc()
    given = (x, x, x, 32, 1e-5, 64, 64)
    assert trtp.functions["register"](*given) == "as x"
    assert trtp.functions["autotune"](*given, (x,)) == [("FP16, FP16, FP16, FP16", "LINEAR")]
    name, ptx, launch, extra = trtp.functions["aot_impl"](*given, (x,), 0)
    assert (name, ptx, extra) == ("entry", "the ptx", [(64,)])
    assert launch == SimpleNamespace(grid_x="batch", grid_y=32, block_x=128, shared_mem=512)
    assert asked == [(plugin_triton.Shape(32, 2, 64, 1e-5), 90)]


def test_annotations_are_those_that_tensorrt_compares():
    trtp = Recorder()
    declare_plugin(trtp, 90)
    kernel = trtp.functions["aot_impl"].__annotations__
    text = typing.Union[str, bytes]  # noqa: UP007
    assert kernel["return"] == typing.Tuple[text, text, trtp.KernelLaunchParams, trtp.SymExprs]  # noqa: UP006
    assert list(kernel)[-3:] == ["outputs", "tactic", "return"]
    attributes = {
        name: kind for name, kind in trtp.functions["register"].__annotations__.items() if kind in (int, float)
    }
    assert attributes == {"num_groups": int, "epsilon": float, "channels": int, "positions": int}
    assert not any(
        isinstance(kind, str) for function in trtp.functions.values() for kind in function.__annotations__.values()
    )


def test_what_cannot_have_plugins(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", ModuleType("tensorrt_rtx"))
    with pytest.raises(ExportError, match="without tensorrt_rtx"):
        register_plugin("sm90")
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    with pytest.raises(ExportError, match="leave out --hardware-compatible"):
        register_plugin("sm80+")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match="needs tensorrt 10.9 or later"):
        register_plugin("sm90")
