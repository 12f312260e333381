"""The timer, the ratios and their intervals, reports, and the checks that turn a report red."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import threading
import time

import numpy as np
import pytest
import torch
from report_cases import check_schema, make_report, simulated

from benchmarks.core import harness, timing
from benchmarks.core.checks import error_of, not_slower, precision_checks
from benchmarks.core.environment import describe, environment
from benchmarks.core.report import EXIT_RED, Check, Comparison, read_report
from benchmarks.core.stats import LEAST_ROUNDS, PLACEMENT, Ratio, Verdict, bootstrap_median, paired_ratio, spread
from benchmarks.core.terminal import print_report
from benchmarks.core.timing import Series, Variant, interleave, per_call, wait_until_quiet, wall_ms
from engine.device import CpuDevice
from engine.errors import BundleError, RequestError


def test_variants_take_turns_there_and_back():
    calls: list[str] = []
    variants = [Variant(name, lambda name=name: calls.append(name)) for name in "ABC"]
    result = interleave(variants, 2, warm_up=1, settle=0)
    assert "".join(calls) == "ABC" + "ABC" + 2 * "ABCCBA"
    assert {name: series.rounds_ms.shape for name, series in result.items()} == dict.fromkeys("ABC", (2, 2))
    assert all(len(series.warm_up_ms) == 1 and series.first_ms > 0 for series in result.values())
    with pytest.raises(ValueError, match="names of their own"):
        interleave([variants[0], variants[0]], 1)


def test_a_turn_settles_for_a_while(monkeypatch):
    """Untimed calls of 10 ms: at least as many as are asked for, and until the time is over."""
    now = [0.0]
    monkeypatch.setattr("benchmarks.core.timing.time.monotonic", lambda: now[0])
    monkeypatch.setattr("benchmarks.core.timing.wait_until_quiet", lambda: None)

    def work() -> None:
        now[0] += 0.01

    def calls(settle: int, settle_s: float) -> int:
        now[0] = 0.0
        interleave([Variant("A", work)], 1, warm_up=0, settle=settle, settle_s=settle_s)
        return round(now[0] / 0.01) - 3  # The first call and the two that are timed.

    assert calls(1, 0.0) == 2
    assert calls(1, 0.035) == 8
    assert calls(5, 0.035) == 10


def test_settling_calls_do_not_count():
    clock = iter(range(100))

    def timed(work):
        work()
        return float(next(clock))

    calls: list[int] = []
    series = interleave([Variant("A", lambda: calls.append(1), timed)], 2, warm_up=0, settle=3)["A"]
    assert len(calls) == 1 + 2 * 2 * 4
    assert series.rounds_ms.tolist() == [[1, 2], [3, 4]]


def test_a_budget_ends_the_rounds_but_not_below_the_least():
    assert len(interleave([Variant("A", lambda: None)], 50, budget_s=0, least_rounds=5)["A"].rounds_ms) == 5


def test_wall_ms_measures_the_work():
    assert wall_ms(lambda: time.sleep(0.02)) >= 20


def test_a_turn_waits_for_threads_that_still_compute():
    is_spinning = threading.Event()
    is_spinning.set()

    def spin() -> None:
        while is_spinning.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    assert wall_ms(lambda: wait_until_quiet(0.1)) >= 100
    is_spinning.clear()
    thread.join()
    # Well before the limit.
    assert wall_ms(lambda: wait_until_quiet(30.0)) < 20_000


def test_spread():
    found = spread(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (found.p50_ms, found.count) == (2.5, 4)
    assert found.p10_ms == pytest.approx(1.3)
    assert found.cv == pytest.approx(np.std([1, 2, 3, 4]) / 2.5)


def test_a_variant_beside_itself_is_no_different():
    """False verdicts stay as rare as the confidence says, on a machine with drift and neighbours."""
    wrong = sum(paired_ratio(*simulated(24, seed)).verdict is not Verdict.NONE for seed in range(200))
    assert wrong <= 4


def test_a_real_a_a_run_says_no_difference():
    matrix = torch.randn(96, 96)
    result = interleave([Variant(name, lambda: matrix @ matrix) for name in ("one", "same")], 100)
    assert paired_ratio(result["one"], result["same"]).verdict is Verdict.NONE


def test_a_tenth_slower_is_found():
    found = [paired_ratio(*simulated(60, seed, slow=1.1)) for seed in range(50)]
    assert sum(ratio.verdict is Verdict.SLOWER for ratio in found) >= 45
    assert np.median([ratio.value for ratio in found]) == pytest.approx(1.1, abs=0.02)
    assert paired_ratio(*simulated(60, 0, slow=0.8)).verdict is Verdict.FASTER


def test_intervals_hold_the_true_ratio():
    held = 0
    for seed in range(100):
        ratio = paired_ratio(*simulated(40, seed, slow=1.3))
        held += ratio.low <= 1.3 <= ratio.high
    assert held >= 97


def test_too_few_rounds_have_no_interval():
    with pytest.raises(ValueError, match="8 rounds or more, got 7"):
        bootstrap_median(np.zeros(LEAST_ROUNDS - 1), 0.99, 0)
    assert bootstrap_median(np.arange(9.0), 0.99, 0)[0] < 4


def test_an_interval_is_never_narrower_than_the_placement():
    same = Series(1.0, (), np.ones((20, 2)))
    ratio = paired_ratio(same, same)
    assert (ratio.low, ratio.high) == pytest.approx((1 / (1 + PLACEMENT), 1 + PLACEMENT))


def test_a_report_comes_back_from_its_file(tmp_path, capsys):
    report = make_report((Check("it holds", True, 0.1, 0.2),))
    report.save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    check_schema(data)
    assert read_report(tmp_path / "r.json").to_dict() == report.to_dict() == data
    print_report(report)
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("ov fp32", "1.400 to 1.600", "slower", "no plan", "passed: it holds"))


def test_the_schema_refuses_another_form():
    jsonschema = pytest.importorskip("jsonschema")
    data = make_report().to_dict()
    del data["environment"]["versions"]["torch"]
    with pytest.raises(jsonschema.ValidationError):
        check_schema(data)


def test_files_that_hold_no_report(tmp_path):
    path = tmp_path / "r.json"
    path.write_text("{}")
    with pytest.raises(BundleError, match="is no benchmark report"):
        read_report(path)
    path.write_text(json.dumps(make_report().to_dict() | {"schema_version": 9}))
    with pytest.raises(BundleError, match="schema version 9, this version reads 1"):
        read_report(path)


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, EXIT_RED)])
def test_a_red_report_is_written_and_exits_with_its_own_status(tmp_path, capsys, passed, status):
    report = make_report((Check("it holds", passed, 2.0, 1.0, "mend it"),))
    parser = harness.make_parser("step_latency", "Test.", takes_bundle=False)
    argv = ["--out", str(tmp_path / "bench")]
    assert harness.run_benchmark("step_latency", parser, lambda _, __: report, lambda *_: None, argv) == status
    assert json.loads((tmp_path / "bench" / "step_latency.json").read_text())["passed"] is passed
    assert ("FAILED: it holds (2, limit 1); mend it" in capsys.readouterr().out) is not passed


def test_bad_input_exits_with_2_and_writes_nothing(tmp_path, capsys):
    def work(_args, _command):
        raise BundleError("no bundle here")

    parser = harness.make_parser("step_latency", "Test.")
    argv = [str(tmp_path / "none"), "--out", str(tmp_path / "bench")]
    assert harness.run_benchmark("step_latency", parser, work, lambda *_: None, argv) == 2
    assert not list((tmp_path / "bench").iterdir())
    assert "error: no bundle here" in capsys.readouterr().err


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).float()


def test_a_backend_in_the_wrong_precision_is_caught():
    """One that says fp32 and computes in bf16, and one that says bf16 and computes in fp32."""
    wanted = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    half, whole = error_of(rounded(wanted, torch.bfloat16), wanted), error_of(wanted * (1 + 1e-7), wanted)
    assert [c.passed for c in precision_checks("a", "fp32", whole)] == [True, True]
    assert [c.passed for c in precision_checks("a", "bf16", half)] == [True, True]
    assert [c.passed for c in precision_checks("a", "fp32", half)] == [False, True]
    assert [c.passed for c in precision_checks("a", "bf16", whole)] == [True, False]


def test_an_error_above_the_limit_is_caught():
    wanted = torch.ones(8)
    assert not precision_checks("a", "int8", error_of(wanted + 0.5, wanted))[0].passed
    assert not precision_checks("a", "fp16", error_of(wanted * torch.nan, wanted))[0].passed


def test_slower_than_the_baseline_is_caught():
    comparison = Comparison({"batch": 2}, "auto", "ov fp32", Ratio(1.1, 1.05, 1.15, 0.99, 40))
    found = not_slower(comparison)
    assert not found.passed
    assert "auto is not slower than ov fp32 (batch=2)" in found.name
    assert "1.10 times as long" in found.remedy
    undecided = dataclasses.replace(comparison, ratio=Ratio(1.1, 0.99, 1.2, 0.99, 40))
    assert not_slower(undecided).passed


def test_the_environment_is_described():
    block = environment(3)
    assert (block["threads"], block["versions"]["torch"]) == (3, importlib.metadata.version("torch"))
    assert block["cpu"]["memory_bytes"] > 1e8
    assert "3 threads" in describe(block)
    assert environment()["threads"] == block["cpu"]["cores"]


def test_one_reading_of_the_clock_is_many_calls(monkeypatch):
    readings: list[int] = []
    calls: list[int] = []

    def clock(work):
        work()
        readings.append(1)
        return 0.25

    monkeypatch.setattr(timing, "clock_for", lambda _: clock)
    variant = per_call("short", lambda: calls.append(1), CpuDevice())
    calls.clear()
    readings.clear()
    assert variant.clock(variant.work) == 0.25 / 4
    assert (len(calls), len(readings)) == (4, 1)


def test_numbers_of_a_command_line():
    assert harness.parse_numbers("8, 1,8", "--batches") == (8, 1)
    for text in ("1,x", "0", "", "1,,2"):
        with pytest.raises(RequestError, match="--batches is .*; expected whole numbers from 1 up"):
            harness.parse_numbers(text, "--batches")
    assert [harness.choose(given, 9, 3, short) for given, short in ((0, True), (None, True), (None, False))] == [
        0,
        3,
        9,
    ]
    harness.check_least("--rounds", None, 8)
    with pytest.raises(RequestError, match="--rounds is 7; expected 8 or more"):
        harness.check_least("--rounds", 7, 8)
