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
from simulated_steps import SimulatedBackend, SimulatedMachine, opener_of

from benchmarks import peak_memory, step_device, step_latency, step_loop, step_measure
from benchmarks.peak_memory import in_child, resident_bytes
from benchmarks.report import Row, read_report
from benchmarks.step_latency import main
from benchmarks.step_loop import Network, SlotLoop, StepKind, slot_loop
from benchmarks.step_measure import Growth, Measured, available_bytes, measure_batch
from benchmarks.step_parts import CudaMarks, PartRecorder, WallMarks, recorded_loop
from benchmarks.step_picture import draw
from benchmarks.subject import real_inputs
from benchmarks.timing import Series, Variant, interleave, on_stream
from engine.backends.eager.eager_backend import EagerBackend
from engine.bundle.folder import Bundle
from engine.diffusion.guidance import ClassifierGuidance
from engine.diffusion.solvers import ddim_table
from engine.errors import BackendError, RequestError
from engine.networks import config as c
from engine.sampling.slots import Slots
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
    monkeypatch.setattr(step_latency, "draw", lambda *_: None)


def run(bundle: Path, out: Path, faults: dict, *options: str) -> tuple[int, dict]:
    """The command on a simulated machine: its exit status and its report."""
    machine = SimulatedMachine()
    variants = ",".join(":".join(name) for name in faults)
    argv = [str(bundle), "--out", str(out), "--variants", variants, "--batches", "1", "--memory", "none"]
    status = main([*argv, "--rounds", "16", *options], machine.timers, opener_of(machine, faults))
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
    assert metrics["network_ms"] == pytest.approx(metrics["p50_ms"], rel=0.2)
    assert (metrics["update_ms"], metrics["noise_ms"], metrics["gradient_ms"]) == (0.0, 0.0, None)
    assert metrics["host_ms"] == pytest.approx(0.0, abs=1e-9)
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


def test_a_variant_beside_itself_on_a_simulated_machine(bundle, tmp_path):
    status, report = run(bundle, tmp_path, {AUTO: {}}, "--again")
    assert (status, verdicts(report)) == (0, {"eager fp32 again": "no difference"})


def test_a_restless_machine_is_red(bundle, tmp_path):
    """The second of two same variants is the slower one: what --again is there to show."""
    machine = SimulatedMachine()
    opened = []

    def opener(bundle, names, threads):
        opened.append(names)
        backend = SimulatedBackend(bundle, machine, slow=1.0 if len(opened) == 1 else 1.1)
        return {"eager fp32": backend}, ()

    argv = [str(bundle), "--out", str(tmp_path), "--batches", "1", "--memory", "none", "--rounds", "16", "--again"]
    assert main(argv, machine.timers, opener) == 1
    report = json.loads((tmp_path / "step_latency.json").read_text())
    assert failed(report) == ["eager fp32 again: no difference beside itself (batch=1)"]


def test_a_variant_beside_itself_on_this_machine(bundle, tmp_path):
    """Real times. One run in a hundred may see a difference that is none; three in a row do not."""
    argv = [str(bundle), "--out", str(tmp_path), "--variants", "eager:fp32", "--again", "--batches", "1"]
    argv += ["--rounds", "40", "--memory", "none", "--threads", "1"]
    assert any(main(argv) == 0 for _ in range(3))
    report = json.loads((tmp_path / "step_latency.json").read_text())
    assert verdicts(report) == {"eager fp32 again": "no difference"}
    metrics = report["rows"][0]["metrics"]
    assert all(metrics[f"{name}_ms"] > 0 for name in ("network", "update", "noise", "host", "first", "warm_up"))


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


def test_growth_is_foreseen():
    growth = Growth(before_bytes=100)
    assert growth.settle(64) == 1
    assert growth.reason_against(64, -1.0, 0) is None, "the first batch is always tried"
    growth.add(measured(2, 100.0), peak_bytes=1100)
    assert growth.reason_against(4, 60.0, 10_000) is None
    assert growth.reason_against(4, 60.0, None) is None
    assert "a step would take about 20.0 s" in growth.reason_against(400, 1e9, None)
    # 2 * 8 turns and three steps before them, of 0.2 s; shorter ones take two steps a turn.
    assert "8 rounds would take about 4 s of 3 s left" in growth.reason_against(4, 3.0, None)
    assert "8 rounds would take about 5 s of 5 s left" in growth.reason_against(3, 5.0, None)
    assert [growth.settle(batch) for batch in (2, 3, 4)] == [1, 1, 0]
    assert "are free" in growth.reason_against(4, 60.0, 2_100)


def test_free_memory(tmp_path):
    assert available_bytes(tmp_path / "none") is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   7 kB\n")
    assert available_bytes(tmp_path / "meminfo") == 7168


def test_what_does_not_open_is_missing(bundle, tmp_path):
    argv = [str(bundle), "--out", str(tmp_path), "--variants", "eager:fp32,ov:fp32", "--rounds", "8", "--batches", "1"]
    assert main([*argv, "--memory", "none"]) == 0
    report = json.loads((tmp_path / "step_latency.json").read_text())
    assert [missing["variant"] for missing in report["missing"]] == ["ov fp32"]
    assert "unet.onnx" in report["missing"][0]["reason"]
    assert report["comparisons"] == []


BAD = {
    "rounds": (["--rounds", "7"], "expected 8 or more"),
    "batches": (["--batches", "1,x"], "expected numbers from 1 on"),
    "no batch": (["--batches", "0,1"], "expected numbers from 1 on"),
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


class Counter:
    """Marks of a clock that moves by one whenever it is read."""

    def __init__(self) -> None:
        self.time = 0

    def now(self) -> int:
        self.time += 1
        return self.time

    def between_ms(self, start: int, end: int) -> float:
        return float(end - start)


def test_recorder():
    marks = Counter()
    recorder = PartRecorder(marks)

    def spend(ms: int) -> int:
        marks.time += ms
        return ms

    network, noise = recorder.around("network", spend), recorder.around("noise", spend)

    def step(is_last: bool) -> None:
        assert network(10) == 10
        network(5)
        if not is_last:
            noise(3)
        spend(20)

    network(1000)
    assert recorder(lambda: step(False)) == 15 + 3 + 20 + 7
    for is_last in (False, False, True):
        recorder(lambda is_last=is_last: step(is_last))
    split = recorder.split(3)
    # A part's own mark counts as one.
    assert (split.network_ms, split.noise_ms, split.gradient_ms, split.update_ms) == (17.0, 4.0, None, None)
    assert split.host_ms == 24.0
    assert recorder.split(1).noise_ms is None


NETWORKS = {
    "labels": adm_unet(size=(4, 4), mult=(1,), num_classes=11, null_class=10, learn_sigma=True),
    "condition": adm_unet(size=(4, 4), mult=(1,), super_resolution=True),
}


def cpu_backend(config: c.UNetConfig) -> EagerBackend:
    return EagerBackend(tiny_manifest(config), random_network(config), "fp32", 1)


@pytest.mark.parametrize("config", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_slots_step_for_ever(config, sampler):
    """Past the end of the table; recorders leave the images as they are, to the bit."""
    kind, network = StepKind(sampler, 3), Network(cpu_backend(config))
    recorder = PartRecorder(WallMarks())
    loops = slot_loop(network, kind, 2, None), recorded_loop(network, kind, 2, recorder)
    with pytest.raises(RequestError, match="refill the slots"):
        loops[0].step()
    images = []
    for loop in loops:
        for _ in range(7):
            loop.refill()
            recorder(loop.step)
        assert loop.is_finite()
        images.append(torch.stack([step.x_prev for step in loop._latest]))
        assert [step.request.seed for step in loop._latest] == [4, 5]
    assert torch.equal(*images)
    assert not torch.equal(images[0][0], images[0][1])
    split = recorder.split(7)
    assert split.network_ms > 0
    assert split.update_ms > 0
    assert (split.noise_ms is None) == (sampler == "ddim")


def test_guided_steps_have_a_gradient():
    recorder = PartRecorder(Counter())
    network = Network(cpu_backend(TINY), ClassifierGuidance(CountingGuide()))
    loop = recorded_loop(network, StepKind("ddpm", 4, True), 2, recorder)
    for _ in range(3):
        loop.refill()
        recorder(loop.step)
    assert recorder.split(3).to_dict() == dict.fromkeys(("network_ms", "gradient_ms", "update_ms", "noise_ms"), 1.0) | {
        "host_ms": 5.0
    }


def test_vector_labels_are_vectors():
    config = dataclasses.replace(adm_unet(num_classes=3), label=c.LabelInput.VECTOR)
    loop = SlotLoop(Slots(cpu_backend(TINY), 1), config, ddim_table(tiny_manifest(config).diffusion, 2), None)
    assert loop._request(0).conditions.label.shape == (1, config.time_channels)


@pytest.mark.parametrize("guided", [False, True])
def test_steps_on_a_device(bundle, monkeypatch, guided):
    """Whole steps are replays; their split runs network and gradient one after the other on one stream."""
    device, opened = RecordingDevice(), Bundle.open(bundle)
    monkeypatch.setattr(step_measure, "cuda_device", lambda: device)
    for module in (step_loop, step_device):
        monkeypatch.setattr(module, "update_for", lambda _: torch_update)
    backend = OnDevice(opened.manifest, random_network(opened.manifest.config), "fp32", None)
    guidance = ClassifierGuidance(CapturableGuide()) if guided else None
    network = Network(backend, guidance)
    assert network.is_on_device
    monkeypatch.setattr(step_measure, "_error", lambda *_: None)
    found = measure_batch({"x": network}, StepKind(), 2, real_inputs(opened), 8, 60.0, 1, SimulatedMachine().timers)
    assert device.captures == 1
    assert device.replays == 2 + 2 * 2 * 8
    assert found.finite == {"x": True}
    split = found.splits["x"]
    assert None not in (split.network_ms, split.update_ms)
    assert split.noise_ms is None
    assert (split.gradient_ms is not None) == guided
    after = device.calls[max(i for i, call in enumerate(device.calls) if call == "allocate") :]
    assert guided == ("gradient on main" in after)
    assert "gradient on side1" not in after


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
    draw(dataclasses.replace(report, rows=rows), tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.width == 1430
        assert len(picture.convert("RGB").getcolors(2**20)) > 10


@pytest.mark.gpu
def test_clocks_of_a_gpu():
    stream = torch.cuda.Stream()
    matrix = torch.randn(2048, 2048, device="cuda")
    assert on_stream(stream)(lambda: matrix @ matrix) > 0
    recorder = PartRecorder(CudaMarks(stream))
    multiply = recorder.around("network", torch.matmul)
    with torch.cuda.stream(stream):
        whole = recorder(lambda: multiply(matrix, matrix))
    assert 0 < recorder.split(1).network_ms <= whole


def test_peak_memory_is_the_childs_own(bundle):
    """Not that of the process that starts it, which Linux counts in getrusage."""
    held = np.ones(800_000_000 // 8)
    found = in_child(bundle, "eager:fp32", 2, StepKind(steps=3), 1)
    assert 50e6 < found.resident_bytes < resident_bytes()
    assert resident_bytes() > held.nbytes
    assert (found.device_bytes is None) == (not torch.cuda.is_available())


def test_a_child_that_fails_is_missing(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(BackendError, match="ended with exit status 1: nothing on stderr"):
        in_child(bundle, "eager:fp32", 1, StepKind(), None)
    status, report = run(bundle, tmp_path, {AUTO: {}}, "--rounds", "8", "--memory", "largest")
    assert (status, report["missing"][0]["variant"]) == (0, "eager fp32 at batch 1, peak memory")
    assert report["rows"][0]["metrics"]["peak_memory_bytes"] is None
    capsys.readouterr()
    assert peak_memory.main([str(bundle), "eager:fp32,ov:fp32", "1"]) == 2
    assert "a process measures one" in capsys.readouterr().err


def test_many_metrics_fit_a_narrow_terminal(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.report._FILE_COLUMNS", 80)
    _, report = run(bundle, tmp_path, {AUTO: {}}, "--rounds", "8")
    printed = capsys.readouterr().out
    assert all(name in printed for name in report["rows"][0]["metrics"])
    assert max(map(len, printed.split("passed: ")[0].splitlines())) <= 80
