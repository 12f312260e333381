"""What only data-centre TensorRT can do, on a stand-in for it: flags, timings, plugins, plans without weights."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.backends.trt.trt_library import Library, load_library, runs_on
from engine.backends.trt.trt_log import make_log
from engine.bundle.manifest import PlanEntry
from engine.errors import ExportError
from export import to_trt
from export.trt import build as trt_build
from export.trt.build import BuildOptions, PlanBuilder, find_builders


class Config:
    def __init__(self) -> None:
        self.flags: list[str] = []
        self.hardware_compatibility_level = self.timings = None

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def add_optimization_profile(self, profile: Any) -> None: ...

    def create_timing_cache(self, blob: bytes) -> Any:
        return None if blob == b"of another GPU" else SimpleNamespace(serialize=lambda: blob + b"+1")

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.timings = cache
        return True

    def get_timing_cache(self) -> Any:
        return self.timings


class ILogger:
    Severity = SimpleNamespace(ERROR=1, WARNING=2)


def fake_tensorrt(seen: list[Any]) -> SimpleNamespace:
    """As much of `tensorrt` as a build uses; configs and the names of the files read are seen."""

    def build(_network: Any, config: Config) -> bytes:
        seen.append(config)
        return b"plan"

    builder = SimpleNamespace(
        create_network=lambda _flags: SimpleNamespace(num_inputs=0),
        create_builder_config=Config,
        create_optimization_profile=lambda: None,
        build_serialized_network=build,
    )

    def parse(file: str) -> bool:
        seen.append(Path(file).name)
        return Path(file).exists()

    class Module(SimpleNamespace):
        __hash__ = object.__hash__

    return Module(
        __version__="10.16",
        ILogger=type("ILogger", (ILogger,), {"__init__": lambda self: None}),
        Builder=lambda _log: builder,
        OnnxParser=lambda _network, _log: SimpleNamespace(parse_from_file=parse),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        BuilderFlag=SimpleNamespace(STRIP_PLAN="strip", REFIT_IDENTICAL="identical"),
        HardwareCompatibilityLevel=SimpleNamespace(AMPERE_PLUS="ampere+"),
    )


@pytest.fixture
def onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(trt_build, "fusable", lambda _file: None)
    monkeypatch.setattr(trt_build, "fusion_report", lambda *_: None)
    (tmp_path / "unet.fp16.onnx").write_bytes(b"a network")
    return tmp_path / "unet.fp16.onnx"


def build(onnx: Path, options: BuildOptions, cache: Path | None = None) -> tuple[PlanEntry, list[Any]]:
    seen: list[Any] = []
    trt = fake_tensorrt(seen)
    library = Library("tensorrt", trt, make_log(trt))
    builder = PlanBuilder(library, "trt.sm90", ("sm90",), "NVIDIA H100", options)
    return builder.build(onnx, (1, 8, 64), "fp16", cache), seen


def test_a_plan_without_options(onnx):
    plan, (file, config) = build(onnx, BuildOptions())
    assert (plan.weights_file, plan.file, file) == (None, "unet.trt.sm90.plan", onnx.name)
    assert (config.flags, config.hardware_compatibility_level, config.timings) == ([], None, None)


def test_a_plan_without_weights_names_where_they_are(onnx):
    plan, (_, config) = build(onnx, BuildOptions(strip_weights=True))
    assert config.flags == ["strip", "identical"]
    assert plan.weights_file == onnx.name


def test_timings_are_kept_for_the_next_build(onnx, tmp_path, caplog):
    cache = tmp_path / "cache"
    _, (_, first) = build(onnx, BuildOptions(), cache)
    assert first.timings.serialize() == b"+1"
    (file,) = cache.glob("*.timings")
    assert file.name == "tensorrt-10-16-nvidia-h100.timings"
    assert file.read_bytes() == b"+1"
    _, (_, second) = build(onnx, BuildOptions(hardware_compatible=True), cache)
    assert second.hardware_compatibility_level == "ampere+"
    assert file.read_bytes() == b"+1+1"
    assert build(onnx, BuildOptions(), cache)[1] == [], "a plan that was built before is not built again"
    file.write_bytes(b"of another GPU")
    caplog.set_level("INFO")
    build(onnx, BuildOptions(strip_weights=True), cache)
    assert "are another library's or GPU's" in caplog.text
    assert file.read_bytes() == b"+1"


def test_plugins_are_read_from_a_file_of_the_moment(onnx, monkeypatch, caplog):
    registered = []
    monkeypatch.setattr(trt_build, "register_plugin", registered.append)
    monkeypatch.setattr(trt_build, "plugin_nodes", lambda _file, out: out.write_bytes(b"rewritten"))
    _, (file, _) = build(onnx, BuildOptions(triton_plugins=True))
    assert (file, registered) == ("plugins.unet.fp16.onnx", ["sm90"])
    assert {path.name for path in onnx.parent.iterdir()} == {onnx.name, "unet.trt.sm90.plan"}
    monkeypatch.setattr(trt_build, "plugin_nodes", lambda *_: 0)
    _, (file, _) = build(onnx, BuildOptions(triton_plugins=True))
    assert file == onnx.name
    assert "no float16 GroupNorm before SiLU" in caplog.text


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with a GPU and tensorrt, and without TensorRT-RTX."""
    library = fake_tensorrt([])
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    return library


def test_the_builder_of_a_machine_with_a_gpu(machine, monkeypatch):
    (builder,) = find_builders(None)
    assert (builder.built_by, builder.targets) == ("trt.sm90", ("sm90",))
    (builder,) = find_builders(None, BuildOptions(hardware_compatible=True))
    assert (builder.built_by, builder.targets) == ("trt.sm80plus", ("sm80+",))
    with pytest.raises(ExportError, match="do not go together"):
        find_builders(None, BuildOptions(strip_weights=True, triton_plugins=True))
    with pytest.raises(ExportError, match="--target sm89 needs TensorRT-RTX, which is not used with --plugins"):
        find_builders(("sm89",), BuildOptions(triton_plugins=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ExportError, match="needs compute capability 8.0 or above, and this is sm75"):
        find_builders(None, BuildOptions(hardware_compatible=True))


def test_plugins_keep_tensorrt_rtx_out(machine, monkeypatch):
    def load(name: str) -> Library | None:
        assert name != "tensorrt_rtx", "tensorrt_rtx is loaded"
        return load_library(name)

    monkeypatch.setattr(trt_build, "load_library", load)
    assert len(find_builders(None, BuildOptions(triton_plugins=True))) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize("flags", [["--hardware-compatible"], ["--strip-weights"], ["--plugins", "triton"]])
def test_options_without_a_gpu(flags, tmp_path, capsys):
    (tmp_path / "net.pt").write_bytes(b"is not read")
    assert to_trt.main([str(tmp_path / "net.pt"), *flags]) == 2
    message = capsys.readouterr().err.strip()
    assert f"{' '.join(flags)} needs the package tensorrt and an NVIDIA GPU" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("target", "here", "expected"),
    [("sm80+", "sm90", True), ("sm80+", "sm75", False), ("sm80+", "sm120", True), ("sm89", "sm90", False)],
)
def test_where_a_plan_runs(target, here, expected):
    assert runs_on(target, here) is expected
