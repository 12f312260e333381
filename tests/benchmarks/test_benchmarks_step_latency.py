"""step_latency: what it reports, and that each deliberate fault turns it red through the command itself."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from device_fakes import CapturableGuide, OnDevice, RecordingDevice
from elementwise import CountingGuide
from helpers import adm_unet, random_network, tiny_manifest, write_bundle
from PIL import Image
from report_cases import check_schema
from simulated_steps import SimulatedMachine, opener_of

from benchmarks import step_latency
from benchmarks.core.measured_network import real_inputs
from benchmarks.core.pictures import draw_step_latency
from benchmarks.core.report import Row, read_report
from benchmarks.core.timing import Series, Variant, interleave, on_stream
from benchmarks.step_latency import main
from benchmarks.steps import batch_measure, peak_memory, slot_loop
from benchmarks.steps.batch_measure import Measured, measure_batch, reason_against, settle_calls
from benchmarks.steps.peak_memory import in_child, resident_bytes
from benchmarks.steps.slot_loop import StepKind, StepNetwork
from engine.backends.eager.eager_backend import EagerBackend
from engine.bundle.bundle_folder import Bundle
from engine.diffusion.guidance import ClassifierGuidance
from engine.errors import BackendError, RequestError
from engine.networks import config as c
from engine.sampling import pool
from engine.sampling.sampler import Sampler
from engine.sampling.step_program import torch_update

pytestmark = pytest.mark.usefixtures("no_native_engine")

TINY = adm_unet(size=(4, 4), mult=(1,), attention=())
AUTO, OTHER = ("eager", "fp32"), ("ort", "fp32")
"""What "auto" takes of a bundle without ONNX, and a name beside it."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small have nothing for a second one, which a busy machine wakes late."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "tiny.engine", TINY)


@pytest.fixture(autouse=True)
def _no_picture(monkeypatch):
    """Pictures have a test of their own."""
    monkeypatch.setattr(step_latency, "draw_step_latency", lambda *_: None)


def run(bundle: Path, out: Path, faults: dict, *options: str) -> tuple[int, dict]:
    """The command on a simulated machine: its exit status and its report."""
    machine = SimulatedMachine()
    variants = ",".join(":".join(name) for name in faults)
    argv = [str(bundle), "--out", str(out), "--variants", variants, "--batches", "1", "--rounds", "16"]
    argv += [] if "memory" in options else ["--no-memory"]
    options = tuple(each for each in options if each != "memory")
    status = main([*argv, *options], machine.make_clock, opener_of(machine, faults))
    report = json.loads((out / "step_latency.json").read_text())
    check_schema(report)
    return status, report


def failed(report: dict) -> list[str]:
    return [check["name"] for check in report["checks"] if not check["passed"]]


def verdicts(report: dict) -> dict[str, str]:
    return {comparison["variant"]: comparison["verdict"] for comparison in report["comparisons"]}


def test_a_sound_run_is_green(bundle, tmp_path):
    status, report = run(bundle, tmp_path, {AUTO: {}, OTHER: {}}, "--batches", "1,3")
    assert (status, report["passed"], failed(report)) == (0, True, [])
    assert verdicts(report) == {"ort fp32": "no difference"}
    assert [row["case"] for row in report["rows"]] == [
        {"variant": name, "batch": batch, "step": "ddpm"} for batch in (1, 3) for name in ("eager fp32", "ort fp32")
    ]
    metrics = report["rows"][0]["metrics"]
    assert metrics["count"] == 32
    assert metrics["p10_ms"] < metrics["p50_ms"] < metrics["p90_ms"] < metrics["p99_ms"]
    assert metrics["images_per_s"] == pytest.approx(1e3 / (50 * metrics["p50_ms"]))
    assert report["rows"][2]["metrics"]["images_per_s"] == pytest.approx(metrics["images_per_s"], rel=0.1)
    # On this machine only the network takes time.
    assert metrics["network_ms"] == pytest.approx(metrics["p50_ms"], rel=0.05)
    assert metrics["rest_ms"] == pytest.approx(metrics["p50_ms"] - metrics["network_ms"])
    assert report["settings"]["auto"] == report["settings"]["baseline"] == "eager fp32"


def test_auto_a_tenth_slower_than_another_is_red(bundle, tmp_path):
    status, report = run(bundle, tmp_path, {AUTO: {"slow": 1.1}, OTHER: {}})
    assert (status, report["passed"]) == (1, False)
    assert failed(report) == ["eager fp32 is not slower than ort fp32 (batch=1 step=ddpm)"]
    assert report["comparisons"][0]["ratio"]["value"] == pytest.approx(1 / 1.1, abs=0.02)


def test_another_a_tenth_slower_is_said_and_green(bundle, tmp_path):
    status, report = run(bundle, tmp_path, {AUTO: {}, OTHER: {"slow": 1.1}})
    assert (status, verdicts(report)) == (0, {"ort fp32": "slower"})


def test_a_faster_variant_at_a_lower_precision_is_no_fault(bundle, tmp_path):
    half = {"slow": 0.5, "spoil": lambda out: out.bfloat16().float()}
    status, report = run(bundle, tmp_path, {AUTO: {}, ("ov", "bf16"): half})
    assert (status, verdicts(report)) == (0, {"ov bf16": "faster"})


FAULTS = {
    "bf16 that says fp32": (OTHER, lambda out: out.bfloat16().float(), "error beside fp32 is one of fp32"),
    "fp32 that says bf16": (("ov", "bf16"), lambda out: out, "computes in bf16, not above"),
    "a wrong network": (OTHER, lambda out: out + 1e-3, "error beside fp32 is one of fp32"),
    "a bad bf16": (("ov", "bf16"), lambda out: out.bfloat16().float() * 1.2, "error beside fp32 is one of bf16"),
}


@pytest.mark.parametrize(("name", "spoil", "check"), FAULTS.values(), ids=FAULTS)
def test_wrong_results_are_red(bundle, tmp_path, name, spoil, check):
    status, report = run(bundle, tmp_path, {AUTO: {}, name: {"spoil": spoil}}, "--rounds", "8")
    assert (status, report["passed"]) == (1, False)
    assert failed(report) == [f"{' '.join(name)}: {check}"]


def test_results_that_are_no_numbers_are_red(bundle, tmp_path):
    spoil = {"spoil": lambda out: out * math.nan}
    status, report = run(bundle, tmp_path, {AUTO: {}, OTHER: spoil}, "--rounds", "8")
    assert status == 1
    assert set(failed(report)) == {"ort fp32: error beside fp32 is one of fp32", "ort fp32: its images are finite"}
    assert report["rows"][1]["metrics"]["max_error"] is None


def test_a_variant_beside_itself_on_this_machine(bundle, tmp_path, monkeypatch):
    """Real times. One run in a hundred may see a difference that is none; three in a row do not."""

    def twice(opened, names, threads):
        backends = {f"eager fp32 {i}": step_latency.open_variants(opened, [AUTO], threads)[0] for i in range(2)}
        return {name: next(iter(each.values())) for name, each in backends.items()}, ()

    argv = [str(bundle), "--out", str(tmp_path), "--batches", "1", "--rounds", "40", "--no-memory", "--threads", "1"]

    def is_the_same() -> bool:
        assert main(argv, opener=twice) == 0
        report = json.loads((tmp_path / "step_latency.json").read_text())
        metrics = report["rows"][0]["metrics"]
        assert all(metrics[f"{name}_ms"] > 0 for name in ("network", "rest", "first", "warm_up"))
        return verdicts(report) == {"eager fp32 1": "no difference"}

    assert any(is_the_same() for _ in range(3))


def test_a_batch_that_takes_too_long_is_left_out(bundle, tmp_path):
    """10 ms an image on the simulated machine, 6000 times as slow: a batch of two takes two minutes a step."""
    status, report = run(bundle, tmp_path, {AUTO: {"slow": 600.0}}, "--batches", "1,2,4", "--rounds", "8")
    assert status == 0
    assert {row["case"]["batch"] for row in report["rows"]} == {1}
    (missing,) = report["missing"]
    assert missing["variant"] == "every variant at batch 2, 4"
    assert "the limit is 10 s" in missing["reason"]


def test_a_batch_that_does_not_fit_the_memory_is_left_out(bundle, tmp_path):
    def spoil(out: torch.Tensor) -> torch.Tensor:
        if len(out) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out

    status, report = run(bundle, tmp_path, {AUTO: {"spoil": spoil}}, "--batches", "1,2", "--rounds", "8")
    assert status == 0
    assert "does not fit the memory: CUDA out of memory" in report["missing"][0]["reason"]


def measured(batch: int, ms: float) -> Measured:
    return Measured(batch, {"x": Series(ms, (), np.full((8, 2), ms))}, {}, {}, {})


def test_what_the_next_batch_takes_is_foreseen():
    last = measured(2, 100.0)
    assert settle_calls(64, None) == 1
    assert reason_against(64, None, -1.0) is None, "the first batch is always tried"
    assert reason_against(4, last, 60.0) is None
    assert "a step would take about 20.0 s" in reason_against(400, last, 1e9)
    # A step and a network call of 0.2 s, in 2 * 8 turns and three times before; shorter ones twice a turn.
    assert "8 rounds would take about 8 s of 7 s left" in reason_against(4, last, 7.0)
    assert "8 rounds would take about 10 s of 10 s left" in reason_against(3, last, 10.0)
    assert [settle_calls(batch, last) for batch in (2, 3, 4)] == [1, 1, 0]


def test_what_does_not_open_is_missing(bundle, tmp_path):
    argv = [str(bundle), "--out", str(tmp_path), "--variants", "eager:fp32,ov:fp32", "--rounds", "8", "--batches", "1"]
    assert main([*argv, "--no-memory"]) == 0
    report = json.loads((tmp_path / "step_latency.json").read_text())
    assert [missing["variant"] for missing in report["missing"]] == ["ov fp32"]
    assert "unet.onnx" in report["missing"][0]["reason"]
    assert report["comparisons"] == []


BAD = {
    "rounds": (["--rounds", "7"], "expected 8 or more"),
    "batches": (["--batches", "1,x"], "expected whole numbers from 1 up"),
    "no batch": (["--batches", "0,1"], "expected whole numbers from 1 up"),
    "variants": (["--variants", "eager"], "expected BACKEND:PRECISION"),
    "baselines": (["--baseline", "eager:fp32,ov:fp32"], "names 2 variants"),
    "baseline": (["--variants", "eager:fp32", "--baseline", "ov:fp32"], "the baseline ov fp32 does not open here"),
    "nothing": (["--variants", "ov:fp32"], "no variant opens here: ov fp32"),
    "guided": (["--variants", "eager:fp32", "--guided"], "holds no classifier"),
    "steps": (["--variants", "eager:fp32", "--steps", "101"], "101"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_input(bundle, tmp_path, capsys, options, message):
    assert main([str(bundle), "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_prepare_runs_before_every_call_and_is_not_timed():
    calls: list[str] = []

    def clock(work):
        calls.append("[")
        work()
        calls.append("]")
        return 1.0

    variant = Variant("A", lambda: calls.append("w"), clock, lambda: calls.append("p"))
    interleave([variant], 1, warm_up=1, settle=1)
    assert "".join(calls) == "p[w]" + "p[w]" + 2 * "pwp[w]"


NETWORKS = {
    "labels": adm_unet(size=(4, 4), mult=(1,), num_classes=11, null_class=10, learn_sigma=True),
    "condition": adm_unet(size=(4, 4), mult=(1,), super_resolution=True),
}


def cpu_network(config: c.UNetConfig) -> StepNetwork:
    return StepNetwork(Sampler(EagerBackend(tiny_manifest(config), random_network(config), "fp32", 1)))


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_slots_step_for_ever(config, sampler):
    """Past the end of the table, where every image begins anew with the same seed."""
    with slot_loop.slot_loop(cpu_network(config), StepKind(sampler, 3), 2) as loop:
        with pytest.raises(RequestError, match="refill the slots"):
            loop.step()
        images = []
        for _ in range(7):
            loop.refill()
            loop.step()
            images.append(torch.stack([step.x_prev.clone() for step in loop._latest]))
        assert loop.is_finite()
    assert torch.equal(images[0], images[6])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0][0], images[0][1])


def test_guided_steps_call_the_guide():
    guide = CountingGuide()
    network = StepNetwork(cpu_network(TINY).sampler, ClassifierGuidance(guide))
    with slot_loop.slot_loop(network, StepKind("ddpm", 4, True), 2) as loop:
        for _ in range(3):
            loop.refill()
            loop.step()
    assert len(guide.calls) == 3


@pytest.mark.parametrize("guided", [False, True])
def test_steps_on_a_device(bundle, monkeypatch, guided):
    """Whole steps are replays, and so is the network alone."""
    device, opened = RecordingDevice(), Bundle.open(bundle)
    for module in (slot_loop, pool):
        monkeypatch.setattr(module, "cuda_device", lambda: device)
    monkeypatch.setattr(pool.SlotPool.__init__, "__defaults__", (lambda: device,))
    monkeypatch.setattr(pool, "update_for", lambda _: torch_update)
    backend = OnDevice(opened.manifest, random_network(opened.manifest.unet.config), "fp32", None)
    network = StepNetwork(Sampler(backend), ClassifierGuidance(CapturableGuide()) if guided else None)
    assert network.device is device
    monkeypatch.setattr(batch_measure, "_error", lambda *_: None)
    machine = SimulatedMachine()
    found = measure_batch({"x": network}, StepKind(), 2, real_inputs(opened), 8, 60.0, 1, machine.make_clock)
    assert device.captures == 2
    # Of the step the first is enqueued and the second captured; each is one call and two that warm up, then rounds.
    assert device.replays >= 2 * 2 * 2 * 8
    assert found.finite == {"x": True}
    assert found.networks["x"].rounds_ms.shape == (8, 2)


def test_the_picture(tmp_path, bundle):
    """Ten variants, which is what there are colours for, over seven batches."""
    _, data = run(bundle, tmp_path, {AUTO: {}}, "--rounds", "8")
    row = data["rows"][0]
    report = read_report(tmp_path / "step_latency.json")
    rows = [
        Row({"variant": f"variant {i}", "batch": 2**power, "step": "ddpm"}, row["metrics"])
        for i in range(10)
        for power in range(7)
    ]
    draw_step_latency(dataclasses.replace(report, rows=rows), tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.width == 1430
        assert len(picture.convert("RGB").getcolors(2**20)) > 10


@pytest.mark.gpu
def test_the_clock_of_a_gpu():
    matrix = torch.randn(2048, 2048, device="cuda")
    assert on_stream(torch.cuda.Stream())(lambda: matrix @ matrix) > 0


def test_peak_memory_is_the_childs_own(bundle):
    """Not that of the process that starts it, which Linux counts in getrusage."""
    held = np.ones(800_000_000 // 8)
    found = in_child(bundle, ("eager", "fp32"), 2, StepKind(steps=3), 1)
    assert 50e6 < found.resident_bytes < resident_bytes()
    assert resident_bytes() > held.nbytes
    assert (found.device_bytes is None) == (not torch.cuda.is_available())


def test_a_child_that_fails_is_missing(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="ended with exit status 1: nothing on stderr"):
        in_child(bundle, ("eager", "fp32"), 1, StepKind(), None)
    status, report = run(bundle, tmp_path, {AUTO: {}}, "--rounds", "8", "memory")
    assert (status, report["missing"][0]["variant"]) == (0, "eager fp32 at batch 1, peak memory")
    assert report["rows"][0]["metrics"]["peak_memory_bytes"] is None
    capsys.readouterr()
    assert peak_memory.main([str(bundle), "eager:fp32,ov:fp32", "1"]) == 2
    assert "a process measures one" in capsys.readouterr().err


def test_many_metrics_fit_a_narrow_terminal(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.core.terminal._FILE_COLUMNS", 80)
    _, report = run(bundle, tmp_path, {AUTO: {}}, "--rounds", "8")
    printed = capsys.readouterr().out
    assert all(name in printed for name in report["rows"][0]["metrics"])
    assert max(map(len, printed.split("passed: ")[0].splitlines())) <= 80
