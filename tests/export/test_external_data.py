"""Weights in a second file: what lies there, and that every runtime opens such a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import FP32_OTHER_ORDER, adm_classifier, adm_unet, random_network

import export.int8.quantise
import export.onnx.onnx_file
from engine.networks.classifier import Classifier
from engine.networks.inputs import Conditions, Inputs
from engine.networks.unet import UNet
from export.int8.quantise import quantise
from export.onnx.gradient import export_gradient
from export.precision import Precision, typed_unet
from export.to_onnx import export_onnx

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}

# Attention, resampling and a label table: graphs with split sizes, shapes and axes.
CONFIG = adm_unet(num_classes=3)


@pytest.fixture(autouse=True)
def every_graph_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.onnx.onnx_file, "EXTERNAL_DATA_BYTES", 0)


def unet_file(folder: Path, precision: Precision) -> tuple[UNet, Path]:
    unet = random_network(CONFIG)
    assert isinstance(unet, UNet)
    export_onnx(typed_unet(unet, precision), folder / "unet.onnx")
    return unet, folder / "unet.onnx"


def assert_only_weights_are_outside(path: Path, weights: set[int] = FLOATS) -> None:
    graph = onnx.load(str(path), load_external_data=False).graph
    outside = [tensor for tensor in graph.initializer if tensor.external_data]
    assert outside
    assert {tensor.data_type for tensor in outside} <= weights
    assert path.with_name("unet.onnx.data").is_file()
    left = [t for t in graph.initializer if not t.external_data and t.data_type in FLOATS and np.prod(t.dims) > 4096]
    assert not left, "a weight is left in the graph"


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_only_weights_lie_outside(tmp_path: Path, precision: Precision) -> None:
    assert_only_weights_are_outside(unet_file(tmp_path, precision)[1])


def test_onnx_runtime_and_openvino_run_it(tmp_path: Path) -> None:
    ort, ov = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    unet, path = unet_file(tmp_path, Precision.FP32)
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    given = {"x_t": x_t, "timestep": torch.tensor([5.0, 700.0]), "label": torch.tensor([0, 2])}
    wanted = unet(**given)
    feed = {name: value.numpy() for name, value in given.items()}
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    model = ov.compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    results = session.run(None, feed)[0], model(feed)[model.outputs[0]]
    for result in results:
        assert float((torch.from_numpy(result) - wanted).abs().max()) < FP32_OTHER_ORDER * float(wanted.abs().max())


def test_eight_bit_weights_lie_outside_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export.int8.quantise, "EXTERNAL_DATA_BYTES", 0)
    unet, path = unet_file(tmp_path, Precision.FP16)
    x_t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = Inputs(x_t, torch.tensor([5.0, 700.0]), Conditions(torch.tensor([0, 2])))
    quantise(path, unet, [inputs])
    assert_only_weights_are_outside(path, FLOATS | {onnx.TensorProto.INT8})
    ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_onnx_runtime_loads_float16(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    ort.InferenceSession(str(unet_file(tmp_path, Precision.FP16)[1]), providers=["CPUExecutionProvider"])


@pytest.mark.trt
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16, Precision.BF16])
def test_tensorrt_reads_it(tmp_path: Path, precision: Precision) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    _, path = unet_file(tmp_path, precision)
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, builder.logger)
    assert parser.parse_from_file(str(path)), [str(parser.get_error(i)) for i in range(parser.num_errors)]
    assert network.num_layers > 0


def test_a_classifiers_gradient(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    classifier = random_network(adm_classifier())
    assert isinstance(classifier, Classifier)
    export_gradient(classifier, tmp_path / "unet.onnx")
    assert_only_weights_are_outside(tmp_path / "unet.onnx")
    ort.InferenceSession(str(tmp_path / "unet.onnx"), providers=["CPUExecutionProvider"])
