"""Plans built once for each key, and what the build log says of their kernels."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from engine.bundle.manifest import FusionReport, PlanEntry
from engine.errors import ExportError
from engine.json_form import decode, encode
from engine.networks.unet import UNet
from export.precision import Precision, typed_unet
from export.to_onnx import export_onnx
from export.trt.build import PlanBuilder, find_builders
from export.trt.fusion import Fusable, fusable, fusion_report, read_kernels, warn_unfused
from export.trt.plan_cache import load_plan, plan_cache_folder, plan_key, store_plan
from recipes.digits_net import digits_unet


def line(tactic: str, nodes: str, kind: str = "Half", name: str = "a") -> str:
    """One kernel of a build log: [2, 4, 3, 3] in and out."""

    def tensor(name: str) -> str:
        layout = "Format: (NHWC) Channel major format"
        return f"{{ Name: {name}, Dimensions: [2,4,3,3], Strides: [1], StrideOrder: [0], Datatype: {kind}, {layout} }}"

    return (
        f"Name: {tactic}_myl0_1, LayerType: kgen, Inputs: [ {tensor('x')}], Constants: [], "
        f"Outputs: [ {tensor(name)}], TacticName: {tactic}, StreamId: 0, Metadata: "
        + "".join(f"[ONNX Layer: {node}]" for node in nodes.split())
    )


LOG = (
    "Total Activation Memory: 1000 bytes",
    "Total Weights Memory: 70 bytes",
    "Layers:",
    line("__myl_SiluGnor_0x1", "norm1 sigmoid1"),
    line("__myl_CastSiluCastGnor_0x2", "norm2"),
    line("__myl_CastSilu_0x3", "norm3"),
    line("_gemm_mha_v2_0x4", "softmax1"),
)


def test_report_counts_what_was_fused(caplog):
    report = fusion_report(LOG, Fusable(("norm1", "norm2", "norm3"), ("softmax1",)))
    assert report is not None
    assert (report.norm_silu, report.norm_silu_expected) == (2, 3)
    assert (report.attention, report.attention_expected) == (1, 1)
    assert report.unfused == ("norm3",)
    assert report.launches == 4
    assert report.kernel_types == {"Half": 4}
    assert (report.activation_bytes, report.weight_bytes) == (1000, 70)
    assert report.traffic_bytes == 4 * 2 * (2 * 4 * 3 * 3 * 2)
    assert decode(json.loads(json.dumps(encode(report))), FusionReport) == report
    with caplog.at_level(logging.WARNING):
        warn_unfused("unet.rtx.plan", report)
    assert "unet.rtx.plan: not fused: norm3." in caplog.text


def test_an_fp32_image_between_kernels_is_named():
    """From a kernel that reads half precision to one that writes it; the network's own ends do not count."""
    floats, half = line("__myl_A", "", "Float", name="x"), line("__myl_B", "", name="y")
    writes_float = floats.replace("Datatype: Float", "Datatype: Half", 1)
    reads_float = half.replace("Datatype: Half", "Datatype: Float", 1)
    for log, found in (
        ((writes_float, reads_float), ("x",)),
        ((floats, reads_float), ()),
        ((writes_float, floats), ()),
    ):
        report = fusion_report(log, Fusable((), ()))
        assert report is not None
        assert report.fp32_activations == found


def test_traffic_of_an_open_batch_is_not_known():
    report = fusion_report([text.replace("[2,4,3,3]", "[-1,4,3,3]") for text in LOG], Fusable((), ()))
    assert report is not None
    assert report.traffic_bytes is None


def test_a_log_without_kernels_gives_no_report():
    assert fusion_report(("Total Activation Memory: 1 bytes",), Fusable((), ())) is None
    assert not list(read_kernels(["Name: but nothing more"]))


def test_key_changes_with_all_that_is_built_from(tmp_path):
    onnx = tmp_path / "unet.fp16.onnx"
    onnx.write_bytes(b"graph")
    first = plan_key(onnx, {"batch": (1, 8, 64), "version": "1"})
    assert plan_key(onnx, {"version": "1", "batch": (1, 8, 64)}) == first
    others = {plan_key(onnx, {"batch": (1, 8, 32), "version": "1"}), plan_key(onnx, {"batch": (1, 8, 64)})}
    (tmp_path / "unet.fp16.onnx.data").write_bytes(b"weights")
    others.add(plan_key(onnx, {"batch": (1, 8, 64), "version": "1"}))
    (tmp_path / "unet.fp16.onnx.data").write_bytes(b"Weights")
    others.add(plan_key(onnx, {"batch": (1, 8, 64), "version": "1"}))
    assert len(others | {first}) == 5


def test_a_damaged_entry_is_no_entry(tmp_path):
    store_plan(tmp_path / "plans", "key", b"plan", None)
    assert load_plan(tmp_path / "plans", "key") == (b"plan", None)
    (tmp_path / "plans" / "key.plan").write_bytes(b"plaN")
    assert load_plan(tmp_path / "plans", "key") is None
    assert load_plan(tmp_path / "plans", "other") is None


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        store_plan(tmp_path / "file", "key", b"plan", None)
    assert "the plan is not kept" in caplog.text


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan_cache_folder() == tmp_path / "unet-rt" / "plans"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert plan_cache_folder() == tmp_path / ".cache" / "unet-rt" / "plans"


@pytest.fixture(scope="module")
def onnx(tmp_path_factory):
    """A network of 64 channels, two to a group, that TensorRT can fuse throughout."""
    pytest.importorskip("tensorrt_rtx", reason="plans without a GPU need TensorRT-RTX: pip install 'unet-rt[trt]'")
    path = tmp_path_factory.mktemp("plans") / "unet.fp16.onnx"
    torch.manual_seed(0)
    export_onnx(typed_unet(UNet(digits_unet(64, (1, 2), 1, 32)), Precision.FP16), path)
    return path


def rtx(*targets: str) -> PlanBuilder:
    return next(b for b in find_builders(targets) if b.library.name == "tensorrt_rtx")


@pytest.mark.trt
def test_second_build_of_a_key_builds_nothing(onnx, tmp_path, monkeypatch):
    builds: list[str] = []
    build = PlanBuilder._build

    def counted(self, path, file, batch, cache):
        builds.append(file)
        return build(self, path, file, batch, cache)

    monkeypatch.setattr(PlanBuilder, "_build", counted)
    first = rtx("sm89").build(onnx, (2, 2, 2), "fp16", tmp_path)
    plan = (onnx.parent / first.file).read_bytes()
    assert rtx("sm89").build(onnx, (2, 2, 2), "fp16", tmp_path) == first
    assert (onnx.parent / first.file).read_bytes() == plan
    assert builds == ["unet.b2.rtx.plan"]
    rtx("sm86").build(onnx, (2, 2, 2), "fp16", tmp_path)
    rtx("sm89").build(onnx, (1, 2, 4), "fp16", tmp_path)
    rtx("sm89").build(onnx, (2, 2, 2), "fp16", None)
    assert builds == ["unet.b2.rtx.plan"] * 2 + ["unet.rtx.plan", "unet.b2.rtx.plan"]


def group_width(path: Path, name: str) -> int:
    """Channels to a group of one GroupNormalization of a file."""
    graph = pytest.importorskip("onnx").load(str(path)).graph
    node = next(node for node in graph.node if node.name == name)
    (channels,) = next(value.dims for value in graph.initializer if value.name == node.input[1])
    return int(channels // next(a.i for a in node.attribute if a.name == "num_groups"))


@pytest.mark.trt
def test_fusion_of_a_real_build(onnx):
    entry = rtx("sm75", "sm89").build(onnx, (4, 4, 4), "fp16")
    assert isinstance(entry, PlanEntry)
    report, wanted = entry.fusion, fusable(onnx)
    assert report is not None
    assert report.norm_silu_expected == len(wanted.norm_silu) > 5
    # The concatenations of the decoder have 3 or 6 channels to a group, for which there is no fused kernel.
    assert report.unfused == tuple(name for name in wanted.norm_silu if group_width(onnx, name) in (3, 6))
    assert report.norm_silu == report.norm_silu_expected - len(report.unfused)
    assert report.attention == report.attention_expected
    assert report.attention_expected == len(wanted.attention) > 0
    assert report.kernel_types["Half"] > report.launches / 2
    assert report.traffic_bytes is not None
    assert report.traffic_bytes > 0
    assert report.activation_bytes > 0
    assert report.weight_bytes > 0


def test_data_centre_targets_say_what_they_need():
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is what lacks them: pip install 'unet-rt[trt]'")
    with pytest.raises(ExportError, match="sm90, sm100 is a data-centre GPU.*on a machine with that GPU.*tensorrt"):
        find_builders(("sm90", "sm100"))
