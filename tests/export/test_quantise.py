"""8-bit convolutions in an ONNX file: scales, what is changed and what is not, the error."""

import numpy as np
import onnx
import pytest
import torch
from helpers import adm_unet, random_network

from engine.backends.ort.ort_backend import open_session, run_session
from engine.errors import ExportError
from engine.networks.blocks import ResBlock
from engine.networks.inputs import Inputs
from engine.networks.unet import UNet
from export.int8.quantise import LEVELS, best_symmetric, calibrate, channel_scales, quantise
from export.precision import Precision, typed_unet
from export.to_onnx import export_onnx

CONFIG = adm_unet(width=32)
BLOCKS = [index for index, block in enumerate(CONFIG.blocks) if isinstance(block, ResBlock)]


def calls(size: int = 8) -> list[Inputs]:
    generator = torch.Generator().manual_seed(2)
    times = torch.tensor([999.0, 500.0, 20.0])
    return [Inputs(torch.randn(3, 1, size, size, generator=generator), times) for _ in range(2)]


@pytest.fixture(scope="module")
def unet() -> UNet:
    network = random_network(CONFIG)
    assert isinstance(network, UNet)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def fp16(unet, tmp_path_factory):
    """The float16 file, its last ResBlock in float32."""
    path = tmp_path_factory.mktemp("int8") / "unet.fp16.onnx"
    export_onnx(typed_unet(unet, Precision.FP16, [f"blocks.{BLOCKS[-1]}"]), path)
    return path


@pytest.fixture(scope="module")
def int8(unet, fp16):
    path = fp16.with_name("unet.int8.onnx")
    path.write_bytes(fp16.read_bytes())
    return path, quantise(path, unet, calls())


def test_both_convolutions_of_every_fp16_block(int8):
    _, done = int8
    assert sorted(done) == sorted(f"blocks.{i}.conv{k}" for i in BLOCKS[:-1] for k in (1, 2))


def test_convolutions_read_int8_times_a_scale(int8, unet):
    model = onnx.load(int8[0])
    onnx.checker.check_model(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    values = {v.name: onnx.numpy_helper.to_array(v) for v in model.graph.initializer}
    scales = calibrate(unet, calls())
    for layer in int8[1]:
        (conv,) = (n for n in model.graph.node if n.op_type == "Conv" and n.input[1].startswith(f"{layer}.weight"))
        image, weight = makers[conv.input[0]], makers[conv.input[1]]
        assert image.op_type == weight.op_type == "DequantizeLinear"
        assert makers[image.input[0]].op_type == "QuantizeLinear"
        assert values[image.input[1]] == np.float16(scales[layer])
        assert values[weight.input[0]].dtype == np.int8
        exact = unet.get_parameter(f"{layer}.weight").numpy()
        restored = values[weight.input[0]] * values[weight.input[1]].astype(np.float32)[:, None, None, None]
        assert np.abs(restored - exact).max() <= 0.51 * values[weight.input[1]].max() + np.abs(exact).max() * 2**-11
        assert f"{layer}.weight" not in values


def test_the_error_is_that_of_eight_bits(int8, fp16, unet):
    """More than float16's, and what seven bits and a sign at every convolution may cost."""
    errors = []
    for path in (fp16, int8[0]):
        session, squares, total = open_session(path, None), 0.0, 0.0
        for inputs in calls():
            with torch.no_grad():
                wanted = unet(**inputs.tensors())
            squares += float((run_session(session, inputs.tensors())[0] - wanted).square().sum())
            total += float(wanted.square().sum())
        errors.append((squares / total) ** 0.5)
    assert errors[0] < 3e-3 < errors[1] < 1e-1


def test_best_scale_is_the_better_of_clipping_and_rounding():
    even = torch.linspace(0, 1, 5000)
    assert best_symmetric(even, 1.0) == pytest.approx(1 / LEVELS)
    with_outlier = torch.cat([even.repeat(20), torch.tensor([1.7])])
    assert best_symmetric(with_outlier, 1.7) < 1.3 / LEVELS
    assert np.float16(best_symmetric(torch.zeros(10), 0.0)) > 0


def test_channel_scales_reach_the_largest_weight_and_are_never_zero():
    weight = np.zeros((3, 2, 3, 3), np.float16)
    weight[0, 1, 2, 2], weight[1, 0, 0, 0] = -1.27, 1e-6
    scales = channel_scales(weight)
    assert scales.dtype == np.float16
    assert scales[0] == pytest.approx(0.01, rel=1e-3)
    assert (scales > 0).all()


def test_a_network_without_such_convolutions(unet, tmp_path):
    path = tmp_path / "unet.int8.onnx"
    export_onnx(typed_unet(unet, Precision.FP16, [f"blocks.{i}" for i in BLOCKS]), path)
    before = path.read_bytes()
    with pytest.raises(ExportError, match="no 3x3 convolution in a ResBlock to quantise; use --precision fp16"):
        quantise(path, unet, calls())
    assert path.read_bytes() == before
