"""The benchmark of exports: children are measured alone, failures and excess memory turn it red."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from helpers import openai_state
from report_cases import check_schema
from safetensors.torch import save_file

from benchmarks import export_cost, random_models
from benchmarks.core.report import EXIT_RED, Missing, read_report
from benchmarks.export_cost import (
    NAMES,
    Export,
    ExportModel,
    exports_of,
    make_model,
    make_models,
    memory_limit,
    parse_models,
    usable_targets,
)
from benchmarks.exports.export_run import PHASES, ExportRun, phases, run_export
from engine.bundle.file_names import UNET, weights_name
from engine.errors import BackendError, ExportError, MissingPackageError, RequestError
from engine.files import make_folder
from judging.digits import CHECKPOINT, fact_arguments
from recipes.digits_net import digits_unet

MIB = 1 << 20


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_a_run_knows_its_memory_time_and_phases(tmp_path):
    code = """
        import sys
        print("writing weights and fp32 ONNX", file=sys.stderr, flush=True)
        held = bytearray(200 << 20)
        held[::4096] = b"1" * len(held[::4096])
        print("verifying against the checkpoint", file=sys.stderr)
        sum(range(2_000_000))
        print("done")
    """
    run = run_export(python(code), tmp_path)
    assert run.status == 0
    assert 200 * MIB < run.peak_bytes < 300 * MIB
    assert run.wall_s > 0
    assert run.cpu_s > 0
    assert list(run.phases_s) == ["read_s", "onnx_s", "verify_s"]
    assert run.last_lines[-1] == "done"


def test_the_memory_of_who_measures_does_not_count(tmp_path):
    """A process made by a large one has its peak until it starts its program, and ru_maxrss keeps that."""
    held = bytearray(200 * MIB)
    held[::4096] = b"1" * len(held[::4096])
    assert run_export(python("pass"), tmp_path).peak_bytes < 100 * MIB


def test_a_run_that_fails_keeps_its_last_lines(tmp_path):
    run = run_export(python("import sys; print('error: no'); sys.exit(2)"), tmp_path)
    assert (run.status, run.last_lines) == (2, ("error: no",))
    killed = run_export(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), tmp_path)
    assert killed.status == -9


def test_what_cannot_be_started_is_said(tmp_path):
    with pytest.raises(BackendError, match="could not be measured: .*no-such-program"):
        run_export(["no-such-program"], tmp_path)


def test_cores_are_left_to_the_run(tmp_path):
    code = "import os; print(len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else 1)"
    assert run_export(python(code), tmp_path, cores=1).last_lines == ("1",)


def test_phases_follow_each_other_to_the_end():
    lines = [(1.0, "assumed x"), (2.0, PHASES["onnx_s"]), (5.0, ""), (6.0, PHASES["plans_s"]), (7.0, "bundle")]
    assert phases(lines, 10.0) == {"read_s": 2.0, "onnx_s": 4.0, "plans_s": 4.0}
    assert phases([], 3.0) == {"read_s": 3.0}


def test_phases_are_what_export_says():
    """Each line is reported by one of the two commands, whose words these are."""
    folder = Path(export_cost.__file__).parents[1] / "export"
    source = (folder / "to_onnx.py").read_text() + (folder / "to_trt.py").read_text()
    for line in [line for line in PHASES.values() if line]:
        assert line.replace("fp16", "{precision.value}") in source or line in source


def test_names_of_models():
    assert parse_models("digits, adm-64,digits") == ("digits", "adm-64")
    with pytest.raises(RequestError, match="unknown model 'x'; --models takes some of digits,"):
        parse_models("digits,x")
    assert set(export_cost.SHORT_MODELS) < set(NAMES)


def test_the_digits_are_the_shipped_ones(tmp_path, monkeypatch):
    model = make_model("digits", tmp_path)
    assert (model.checkpoint, model.arguments) == (CHECKPOINT, fact_arguments())
    assert "--classifier" in model.classifier
    monkeypatch.setitem(sys.modules, "judging.digits", None)
    monkeypatch.delattr("judging.digits")
    with pytest.raises(BackendError, match="part of the repository"):
        make_model("digits", tmp_path)


def test_a_random_model_is_a_folder_with_a_size(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    small = random_models.DDPM_CIFAR10 | {"block_out_channels": (32, 32, 32, 32)}
    monkeypatch.setitem(random_models.MODELS, "ddpm-cifar10", small)
    model = make_model("ddpm-cifar10", tmp_path)
    assert (model.name, model.arguments, model.classifier) == ("ddpm-cifar10", (), ())
    weights = next(model.checkpoint.rglob("*.safetensors")).stat().st_size
    assert weights < model.checkpoint_bytes < weights + 10_000


def test_the_ways_to_export_a_model():
    model = ExportModel("m", Path("m.pt"), ("--image-size", "8x8"), ("--classifier", "c.pt"))
    found = exports_of(model, ("sm86", "sm89"), short=False)
    assert [(e.what, e.module) for e in found] == [
        ("onnx", "export.to_onnx"),
        ("onnx + plan sm86 sm89", "export.to_trt"),
        ("onnx + classifier", "export.to_onnx"),
    ]
    command = found[1].command(Path("out.engine"))
    assert command[1:6] == ["-m", "export.to_trt", "m.pt", "--out", "out.engine"]
    # A plan from the cache would cost nothing.
    assert command[6:] == ["--image-size", "8x8", "--target", "sm86,sm89", "--no-cache"]
    (short,) = exports_of(model, None, short=True)
    assert (short.what, short.arguments) == ("onnx + classifier + int8", ("--classifier", "c.pt", "--native-int8"))
    assert [e.what for e in exports_of(ExportModel("m", Path("m.pt")), None, short=True)] == ["onnx + int8"]


def test_plans_where_there_is_a_library(monkeypatch):
    assert "add --targets sm86" in usable_targets(None, True)[1][0].reason
    monkeypatch.setattr(export_cost.importlib.util, "find_spec", lambda _: None)
    targets, missing = usable_targets(("sm89",), True)
    assert targets is None
    assert "TensorRT-RTX is not installed" in missing[0].reason
    monkeypatch.setattr(export_cost.importlib.util, "find_spec", lambda _: object())
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(export_cost, "find_builders", lambda targets: asked.append(targets) or ())
    assert usable_targets(None, False) == (("sm86",), ())
    assert usable_targets(("sm89",), True) == (("sm89",), ())
    assert asked == [("sm86",), ("sm89",)]

    def refuse(_targets):
        raise ExportError("unknown target sm1")

    monkeypatch.setattr(export_cost, "find_builders", refuse)
    with pytest.raises(ExportError, match="unknown target"):
        usable_targets(("sm1",), True)


def test_models_that_cannot_be_made_or_held_are_missing(monkeypatch, tmp_path):
    def make(name, folder):
        if name == "adm-64":
            raise MissingPackageError("diffusers", "random models", "bench")
        make_folder(folder)
        (folder / name).write_bytes(bytes(4000))
        return ExportModel(name, folder / name)

    monkeypatch.setattr(export_cost, "make_model", make)
    first, second = make_models(("ddpm-small", "adm-64"), tmp_path)
    assert isinstance(first, ExportModel)
    assert isinstance(second, Missing)
    assert "diffusers" in second.reason
    assert not (tmp_path / "models").exists()
    monkeypatch.setattr(export_cost, "cpu", lambda: {"memory_bytes": 1e9})
    (absent,) = make_models(("ddpm-small",), tmp_path)
    assert isinstance(absent, Missing)
    assert "may take 2 GB and this machine has 1 GB" in absent.reason


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Two models: one that exports in seconds, and one whose facts do not fit it."""
    path = tmp_path / "tiny.safetensors"
    save_file(openai_state(digits_unet(mult=(1, 1))), path)
    models = {
        name: ExportModel(stands_for, path, tuple(word.replace("32x32", size) for word in fact_arguments()))
        for name, stands_for, size in (("digits", "tiny", "8x8"), ("ddpm-cifar10", "bad", "9x9"))
    }
    monkeypatch.setattr(export_cost, "make_model", lambda name, _: models[name])
    return tmp_path / "bench"


@pytest.mark.slow
def test_an_export_that_succeeds_and_one_that_fails(tiny):
    pytest.importorskip("onnx")
    assert export_cost.main(["--short", "--out", str(tiny)]) == EXIT_RED
    data = json.loads((tiny / "export_cost.json").read_text())
    check_schema(data)
    (row,) = data["rows"]
    metrics = row["metrics"]
    assert row["case"] == {"model": "tiny", "what": "onnx + int8"}
    # The state dict is the weights; the bundle has them twice, and the manifest.
    assert metrics["parameters"] == pytest.approx(metrics["checkpoint_bytes"] / 4, rel=0.1)
    assert 2 * 4 * metrics["parameters"] < metrics["bundle_bytes"] < 3 * 4 * metrics["parameters"]
    assert 100 * MIB < metrics["peak_bytes"] < memory_limit(metrics["parameters"])
    assert sum(metrics[name] or 0 for name in PHASES) == pytest.approx(metrics["wall_s"], rel=0.01)
    assert [name for name in PHASES if metrics[name] is not None] == ["read_s", "onnx_s", "verify_s", "native_int8_s"]
    missing = {each["variant"]: each["reason"] for each in data["missing"]}
    assert "exit status 2: " in missing["bad: onnx + int8"]
    assert "image size" in missing["bad: onnx + int8"]
    failed = [check["name"] for check in data["checks"] if not check["passed"]]
    assert failed == ["bad: onnx + int8: the export succeeds"]


class FakeExport:
    """In the place of run_export: writes a bundle of 1000 weights, unless the image size is 9x9."""

    def __init__(self, peak_bytes: int = 1 << 30) -> None:
        self.peak_bytes = peak_bytes

    def __call__(self, command, work, cores) -> ExportRun:
        if "9x9" in command:
            return ExportRun(2, 1.0, 1.0, 1000, {"read_s": 1.0}, ("error: image size 9x9 does not fit",))
        out = Path(command[command.index("--out") + 1])
        assert not out.exists()
        out.mkdir()
        save_file({"weight": torch.zeros(10, 100)}, out / weights_name(UNET))
        return ExportRun(0, 3.0, 6.0, self.peak_bytes, {"read_s": 3.0}, ())


class FakeBundle:
    """A bundle without a manifest."""

    def __init__(self, path: Path) -> None:
        self.path = path

    open = classmethod(lambda cls, path: cls(path))

    def file(self, name: str) -> Path:
        return self.path / name


@pytest.fixture
def fake_bundle(monkeypatch):
    monkeypatch.setattr(export_cost, "Bundle", FakeBundle)


def test_report_of_one_that_succeeds_and_one_that_fails(tiny, fake_bundle, monkeypatch, capsys):
    monkeypatch.setattr(export_cost, "run_export", FakeExport())
    assert export_cost.main(["--short", "--out", str(tiny)]) == EXIT_RED
    data = json.loads((tiny / "export_cost.json").read_text())
    check_schema(data)
    assert (tiny / "export_cost.png").read_bytes().startswith(b"\x89PNG")
    (row,) = data["rows"]
    assert (row["case"]["model"], row["metrics"]["parameters"], row["metrics"]["wall_s"]) == ("tiny", 1000, 3.0)
    missing = {each["variant"]: each["reason"] for each in data["missing"]}
    assert missing["bad: onnx + int8"] == "exit status 2: error: image size 9x9 does not fit"
    assert data["comparisons"] == []
    assert "no ratio is claimed" in data["settings"]["note"]
    printed = capsys.readouterr()
    assert "FAILED: bad: onnx + int8: the export succeeds; exit status 2" in printed.out
    assert "tiny: onnx + int8: 3.0 s, peak 1.07 GB" in printed.err


@pytest.mark.parametrize(("peak_bytes", "passed"), [(1 << 30, True), (1 << 40, False)])
def test_too_much_memory_is_red_and_bundles_are_kept(tmp_path, fake_bundle, monkeypatch, peak_bytes, passed):
    monkeypatch.setattr(export_cost, "run_export", FakeExport(peak_bytes))
    (tmp_path / "x.pt").write_bytes(bytes(7))
    export = Export(ExportModel("x", tmp_path / "x.pt"), "onnx", "export.to_onnx", ())
    (tmp_path / "kept").mkdir()
    result = export_cost.measure_export(export, tmp_path, None, tmp_path / "kept")
    assert (tmp_path / "kept" / "x.engine" / weights_name(UNET)).is_file()
    assert result.row is not None
    metrics = result.row.metrics
    assert (metrics["wall_s"], metrics["cpu_s"], metrics["read_s"], metrics["plans_s"]) == (3.0, 6.0, 3.0, None)
    assert (metrics["parameters"], metrics["checkpoint_bytes"]) == (1000, 7)
    assert 4000 < metrics["bundle_bytes"] < 4200
    assert [check.passed for check in result.checks] == [True, passed]
    assert "GB, more than" in result.checks[1].remedy


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models", "x"], "unknown model 'x'"),
        (["--models", "digits,"], "unknown model ''"),
    ],
)
def test_bad_input(tmp_path, capsys, argv, message):
    assert export_cost.main(["--short", *argv, "--out", str(tmp_path / "bench")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "bench").iterdir())


def test_a_report_without_rows_has_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(export_cost, "make_models", lambda *_: iter([Missing("a", "not here")]))
    assert export_cost.main(["--short", "--out", str(tmp_path)]) == 0
    assert read_report(tmp_path / "export_cost.json").missing[-1] == Missing("a", "not here")
    assert (tmp_path / "export_cost.png").is_file()
