"""The benchmark of single operators: its shapes are real, its errors are caught, its arithmetic is right."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import adm_unet
from report_cases import check_schema
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.core import timing
from benchmarks.core.checks import error_of
from benchmarks.core.report import EXIT_RED, read_report
from benchmarks.kernels import machine_limits, providers
from benchmarks.kernels import operator_benchmark as kernels
from benchmarks.kernels.machine_limits import MIB, Limits, measure_limits
from benchmarks.kernels.network_shapes import NETWORKS, heaviest
from benchmarks.kernels.operator_measure import TOLERANCES, Error, error_checks
from benchmarks.kernels.providers import Provider, find_providers, torch_provider, triton_provider
from benchmarks.kernels.shapes import AttentionShape, ConvShape, NormShape, Place
from engine.device import CpuDevice
from engine.networks.operators import use_operators
from engine.networks.unet import UNet
from kernels import reference
from kernels.native.library import reason_against
from recipes.digits_net import digits_unet

CONFIGS = {
    "ddpm-cifar10": partial(
        adm_unet, channels=3, size=(32, 32), width=128, mult=(1, 2, 2, 2), depth=2, heads=1, scale_shift=False
    ),
    "adm-64": partial(
        adm_unet, channels=3, size=(64, 64), width=192, mult=(1, 2, 3, 4), depth=3, attention=(1, 2, 3), head_dim=64,
        updown=True, learn_sigma=True, num_classes=1000,
    ),
    "digits": digits_unet,
}  # fmt: skip

SMALL = (
    NormShape(64, 4, 1),
    NormShape(64, 4, 1, modulated=True),
    AttentionShape(2, 16, 16, 1),
    ConvShape(4, 6, 5, 1),
)


def place(precision: str = "fp32", channels_last: bool = False) -> Place:
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    return Place(CpuDevice(), precision, dtype, channels_last)


def largest_error(shape, provider: Provider, where: Place, batch: int = 2) -> float | None:
    """None where the provider does not have the operator."""
    task = shape.task(batch, where)
    work = task.work(provider)
    if work is None:
        return None
    error = error_of(work().float(), task.wanted)
    return error.max_abs / error.wanted_rms


class Recorder:
    """Operators that only note what they are called with."""

    def __init__(self) -> None:
        self.calls: Counter[tuple] = Counter()

    def group_norm(self, x, *_):
        return x

    def group_norm_silu(self, x, weight, bias, num_groups, eps):
        assert num_groups == 32
        self.calls["norm+SiLU", x.shape[1], x.shape[2]] += 1
        return x

    def adaptive_group_norm_silu(self, x, weight, bias, num_groups, eps, scale, shift):
        assert num_groups == 32
        self.calls["modulated norm+SiLU", x.shape[1], x.shape[2]] += 1
        return x

    def attention(self, q, k, v):
        self.calls["attention", *q.shape[1:]] += 1
        return q

    def convolution(self, module, inputs, _out):
        if module.kernel_size == (3, 3) and module.stride == (1, 1):
            self.calls["convolution 3x3", module.in_channels, module.out_channels, inputs[0].shape[2]] += 1


@pytest.mark.parametrize("name", NETWORKS)
def test_shapes_are_those_of_the_network(name):
    config, recorder = CONFIGS[name](), Recorder()
    with torch.device("meta"), torch.no_grad():
        network = UNet(config)
        use_operators(network, recorder)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(recorder.convolution)
        y = torch.zeros(2, dtype=torch.int64) if config.num_classes else None
        network(torch.zeros(2, config.in_channels, *config.image_size), torch.zeros(2), y)
    for shape in NETWORKS[name]:
        size = dataclasses.astuple(shape)
        key = size[: {NormShape: 2, AttentionShape: 3, ConvShape: 3}[type(shape)]]
        assert recorder.calls[shape.operator, *key] == shape.calls, shape


def test_the_short_form_takes_one_shape_of_each_operator():
    for shapes in NETWORKS.values():
        assert [s.operator for s in heaviest(shapes)] == list(dict.fromkeys(s.operator for s in shapes))
        assert set(heaviest(shapes)) <= set(shapes)


@pytest.mark.parametrize("shape", [AttentionShape(2, 16, 8, 1), ConvShape(4, 6, 5, 1)])
def test_flops_are_those_that_torch_counts(shape):
    # The reference's two products; torch's own attention would be counted as one operator.
    provider = dataclasses.replace(torch_provider(), attention=reference.attention)
    work = shape.task(3, place()).work(provider)
    with FlopCounterMode(display=False) as counter:
        work()
    assert shape.flops(3) == counter.get_total_flops()


def test_bytes_are_those_of_the_tensors():
    fp16 = place("fp16")
    x, weights = 3 * 64 * 16, 2 * 64
    assert NormShape(64, 4, 1).moved_bytes(3, fp16) == 2 * (2 * x + weights)
    assert NormShape(64, 4, 1, modulated=True).moved_bytes(3, fp16) == 2 * (2 * x + weights + 3 * weights)
    assert AttentionShape(2, 16, 8, 1).moved_bytes(3, place()) == 4 * 4 * 3 * 2 * 16 * 8
    assert ConvShape(4, 6, 5, 1).moved_bytes(3, place()) == 4 * (3 * 4 * 25 + 3 * 6 * 25 + 6 * 4 * 9 + 6)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels-last"])
def test_torch_agrees_with_the_reference(precision, channels_last):
    where = place(precision, channels_last)
    errors = {shape: largest_error(shape, torch_provider(), where) for shape in SMALL}
    assert all(error is not None and error <= TOLERANCES[precision] for error in errors.values()), errors
    if precision != "fp32":
        # It really is computed in this precision.
        assert all(error > 1e-4 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("precision", "channels_last"), [("fp32", False), ("fp32", True), ("fp16", True), ("bf16", True)]
)
def test_the_triton_kernels_agree_with_the_reference(precision, channels_last):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled kernels do not take CPU tensors")
    where = place(precision, channels_last)
    for shape in SMALL:
        error = largest_error(shape, triton_provider(), where, batch=1)
        assert (error is None) == isinstance(shape, ConvShape)
        assert error is None or error <= TOLERANCES[precision], shape


def test_operands_are_the_same_everywhere_and_lie_as_asked():
    x = place("fp16", channels_last=True).normal(2, 3, 4, 5)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, place("fp16").normal(2, 3, 4, 5))
    assert place().normal(7).std() > 0.1


def test_limits_by_size():
    limits = Limits((MIB, 4 * MIB, 16 * MIB), (1e9, 4e9, 2e9), {"fp32": 8e9})
    assert limits.memory_bandwidth == 2e9
    # What a larger size can do, a smaller one can.
    assert limits.bandwidth_at(MIB) == limits.bandwidth_at(100) == 4e9
    assert limits.bandwidth_at(8 * MIB) == pytest.approx(3e9)
    assert limits.bandwidth_at(999 * MIB) == 2e9
    assert limits.least_ms(4 * MIB, 1, "fp32") == pytest.approx(1e3 * 4 * MIB / 4e9)
    assert limits.least_ms(1, 8e6, "fp32") == pytest.approx(1.0)


def test_sizes_go_beyond_the_caches(monkeypatch):
    monkeypatch.setattr(machine_limits, "_last_cache", lambda: 200 * MIB)
    found = machine_limits.sizes(torch.device("cpu"))
    assert found[0] == MIB // 4
    assert found[-1] >= 800 * MIB
    assert all(b == 4 * a for a, b in zip(found, found[1:], strict=False))


@pytest.fixture
def quick(monkeypatch):
    """Small limits and shapes, one round of the fewest."""
    monkeypatch.setattr(machine_limits, "sizes", lambda _: (1 << 14, 1 << 16))
    monkeypatch.setattr(machine_limits, "MATRIX_SIDE", {"cpu": 32, "cuda": 256})
    monkeypatch.setattr(machine_limits, "BUDGET_S", 0.0)
    monkeypatch.setattr(kernels, "SHORT", dataclasses.replace(kernels.SHORT, seconds=0.0))
    monkeypatch.setattr(timing, "TURN_MS", 0.01)
    monkeypatch.setattr(kernels, "NETWORKS", {"small": SMALL})


def test_limits_are_measured(quick):
    limits = measure_limits(CpuDevice(), {"fp32": torch.float32, "bf16": torch.bfloat16})
    assert limits.sizes_bytes == (1 << 14, 1 << 16)
    assert all(math.isfinite(value) and value > 0 for value in (*limits.bandwidths, *limits.flops.values()))
    assert [(row.case["operator"], row.case["precision"]) for row in limits.rows[-2:]] == [
        ("matrix product", "fp32"),
        ("matrix product", "bf16"),
    ]
    assert {row.metrics["moved_bytes"] for row in limits.rows[:4]} == set(limits.sizes_bytes)


def run(monkeypatch, out: Path, *providers: Provider) -> int:
    """The command, on a CPU, with torch and these providers."""
    monkeypatch.setattr(kernels, "find_providers", lambda *_: ((torch_provider(), *providers), ()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return kernels.main(["--short", "--batches", "1", "--threads", "1", "--out", str(out)])


def test_report(quick, monkeypatch, tmp_path, capsys):
    """Of the command as it is on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = ["--short", "--shapes", "small", "--batches", "1,2", "--threads", "1", "--out", str(tmp_path)]
    assert kernels.main(argv) == 0
    data = json.loads((tmp_path / "kernels.json").read_text())
    check_schema(data)
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
    measured = [row for row in data["rows"] if row["case"]["network"] == "small"]
    assert {row["case"]["operator"] for row in measured} == {shape.operator for shape in SMALL}
    assert {row["case"]["batch"] for row in measured} == {1, 2}
    for row in measured:
        metrics = row["metrics"]
        assert metrics["gb_per_s"] == pytest.approx(metrics["moved_bytes"] / metrics["p50_ms"] / 1e6)
        assert metrics["gflop_per_s"] == pytest.approx(metrics["flops"] / metrics["p50_ms"] / 1e6)
        limit = data["settings"]["memory_bytes_per_s"]
        assert metrics["of_bandwidth"] == pytest.approx(1e9 * metrics["gb_per_s"] / limit)
        assert metrics["of_roof"] >= 0.999 * metrics["of_flops"] > 0
    compared = {(c["case"]["operator"], c["variant"], c["baseline"]) for c in data["comparisons"]}
    has_native = "native" in {variant for _, variant, _ in compared}
    assert has_native == (reason_against() is None)
    assert {baseline for _, _, baseline in compared} <= {"torch"}
    missing = {each["variant"].split()[0]: each["reason"] for each in data["missing"]}
    assert "interpreter" in missing["triton"]
    assert "agrees with the fp32 reference" in capsys.readouterr().out


def test_a_provider_with_one_operator_is_compared_there(quick, monkeypatch, tmp_path):
    """As a native library that comes with its convolution first."""
    native = Provider("native", convolution=lambda x, w, b: torch.conv2d(x, w, b, padding=1))
    assert run(monkeypatch, tmp_path, native) == 0
    report = read_report(tmp_path / "kernels.json")
    assert [(c.case["operator"], c.variant) for c in report.comparisons] == [("convolution 3x3", "native")]


def test_triton_goes_through_the_command(quick, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled kernels do not take CPU tensors")
    # The interpreter takes a second for most operators, and as long again for every call.
    monkeypatch.setattr(kernels, "NETWORKS", {"small": (AttentionShape(1, 16, 16, 1), ConvShape(4, 6, 5, 1))})
    assert run(monkeypatch, tmp_path, triton_provider()) == 0
    report = read_report(tmp_path / "kernels.json")
    assert [(c.case["operator"], c.variant) for c in report.comparisons] == [("attention", "triton")]
    assert {check.name.partition(":")[0] for check in report.checks} == {"torch", "triton"}


def off_by_one_key(q, k, v):
    return reference.attention(q, k.roll(1, dims=2), v)


def not_a_number(x, weight, bias):
    return torch.conv2d(x, weight, bias, padding=1) * math.nan


@pytest.mark.parametrize(
    "wrong",
    [
        Provider("wrong", attention=off_by_one_key),
        Provider("wrong", convolution=not_a_number),
    ],
    ids=["attention", "convolution"],
)
def test_a_wrong_kernel_turns_the_report_red(quick, monkeypatch, tmp_path, capsys, wrong):
    assert run(monkeypatch, tmp_path, wrong) == EXIT_RED
    failed = [check for check in read_report(tmp_path / "kernels.json").checks if not check.passed]
    assert failed
    assert all(check.name.startswith("wrong: ") for check in failed)
    assert "small, C=" in failed[0].remedy or "small, heads=" in failed[0].remedy
    assert "FAILED: wrong: " in capsys.readouterr().out


def test_the_worst_shape_decides():
    errors = [Error("a", "attention", "fp16", where, value) for where, value in (("x", 1e-3), ("y", 0.5), ("z", 0.01))]
    (check,) = error_checks(errors)
    assert (check.passed, check.value, check.limit) == (False, 0.5, TOLERANCES["fp16"])
    assert "at y an element" in check.remedy
    (good,) = error_checks([errors[0], errors[2]])
    assert good.passed
    assert "2 shapes" in good.name


def test_providers_of_a_gpu(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda _: object())
    found, missing = find_providers(cuda)
    assert [provider.name for provider in found] == ["torch", "triton"]
    assert missing == ()
    monkeypatch.setattr(providers.importlib.util, "find_spec", lambda _: None)
    assert "pip install triton" in find_providers(cuda)[1][0].reason


@pytest.mark.skipif(reason_against() is not None, reason="the native engine is not here or not fast")
def test_the_native_kernels_are_timed_without_the_copies_around_them():
    found, _ = find_providers(torch.device("cpu"))
    native = found[-1]
    assert native.name == "native"
    errors = [largest_error(shape, native, place()) for shape in SMALL]
    assert [error is not None for error in errors] == [True, True, True, True]
    assert max(error for error in errors if error is not None) <= TOLERANCES["fp32"]
    work = SMALL[-1].task(2, place()).work(native)
    variant = native.variant("native", work, place().device)
    start = time.perf_counter()
    own_ms = variant.clock(variant.work)
    assert 0 < own_ms < 1e3 * (time.perf_counter() - start)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--shapes", "ddpm,small"], "unknown network 'ddpm'; --shapes takes some of small"),
        (["--batches", "1,0"], "--batches is '1,0'; expected whole numbers from 1 up"),
    ],
)
def test_bad_input(quick, tmp_path, capsys, argv, message):
    assert kernels.main([*argv, "--out", str(tmp_path / "bench")]) == 2
    assert message in capsys.readouterr().err
    assert not list((tmp_path / "bench").iterdir())


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path):
    assert kernels.main(["--short", "--shapes", "digits", "--out", str(tmp_path)]) == 0
    report = read_report(tmp_path / "kernels.json")
    assert {c.case["operator"] for c in report.comparisons if c.variant == "triton"} == {
        "modulated norm+SiLU",
        "attention",
    }
