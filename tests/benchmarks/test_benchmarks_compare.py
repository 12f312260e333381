"""compare: two runs of one benchmark give the same ratios, and a variant that got slower is found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from report_cases import make_report, simulated

from benchmarks.compare import Change, Pair, main
from benchmarks.core.report import Comparison, Report
from benchmarks.core.stats import Ratio, paired_ratio
from benchmarks.core.timing import Series

VARIANTS = {"ort fp32": 1.3, "native fp32": 0.6}
"""Their true times beside the baseline's."""


def a_run(seed: int, changes: dict[str, float] | None = None, baseline: float = 1.0) -> Report:
    """A run on a restless machine; what changed since: factors of the variants' times, and of the baseline's."""
    comparisons = []
    for number, (name, slow) in enumerate(VARIANTS.items()):
        for batch in (1, 16):
            factor = slow * (changes or {}).get(name, 1.0) / baseline
            ratio = paired_ratio(*simulated(60, 100 * seed + 10 * number + batch, factor))
            comparisons.append(Comparison({"batch": batch}, name, "ov fp32", ratio))
    return dataclasses.replace(make_report(), comparisons=comparisons)


def compare(folder: Path, old: Report, new: Report) -> int:
    for name, report in (("old", old), ("new", new)):
        report.save(folder / f"{name}.json")
    return main([str(folder / "old.json"), str(folder / "new.json")])


def test_two_runs_give_the_same_ratios(tmp_path, capsys):
    assert compare(tmp_path, a_run(0), a_run(1)) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 ratios are the same" in printed
    assert "slower: " not in printed
    assert "not measured alike" not in printed


def test_a_tenth_slower_is_red(tmp_path, capsys):
    assert compare(tmp_path, a_run(0), a_run(1, {"ort fp32": 1.1})) == 1
    printed = capsys.readouterr().out
    assert "slower: ort fp32 beside ov fp32 (batch=1)" in printed
    assert "slower: ort fp32 beside ov fp32 (batch=16)" in printed
    assert "native" not in "".join(line for line in printed.splitlines() if line.startswith("slower"))
    assert "2 of 4 ratios are the same" in printed


def test_a_tenth_faster_is_said_and_green(tmp_path, capsys):
    assert compare(tmp_path, a_run(0), a_run(1, {"ort fp32": 0.9})) == 0
    assert "faster: ort fp32 beside ov fp32 (batch=1)" in capsys.readouterr().out


def test_a_slower_baseline_is_red(tmp_path, capsys):
    """Everything else seems faster, which is the same thing said the other way round."""
    assert compare(tmp_path, a_run(0), a_run(1, baseline=1.15)) == 1
    assert "slower: ov fp32 (batch=16), for every variant got faster beside it" in capsys.readouterr().out


def test_verdicts_are_as_rare_and_as_sure_as_intervals_say():
    """Pairs of simulated runs: no change is seldom called one, a tenth mostly is."""

    def change(seed: int, slow: float) -> Change:
        old, new = (
            Comparison({}, "a", "b", paired_ratio(*simulated(40, each, factor)))
            for each, factor in ((seed, 1.3), (1000 + seed, 1.3 * slow))
        )
        return Pair(old, new).change

    assert sum(change(seed, 1.0) is not Change.SAME for seed in range(100)) <= 2
    assert sum(change(seed, 1.1) is Change.SLOWER for seed in range(50)) >= 40


def test_sides_of_an_interval_are_their_own():
    """Slower is judged by the old ratio's upper side and the new one's lower side."""
    old = Comparison({}, "a", "b", Ratio(1.0, 0.5, 1.01, 0.99, 20))
    new = Comparison({}, "a", "b", Ratio(1.1, 1.09, 3.0, 0.99, 20))
    low, high = Pair(old, new).interval
    assert low == pytest.approx(1.1 * np.exp(-np.hypot(np.log(1.1 / 1.09), np.log(1.01))))
    assert high == pytest.approx(1.1 * np.exp(np.hypot(np.log(3.0 / 1.1), np.log(2.0))))
    assert Pair(old, new).change is Change.SLOWER
    assert Pair(new, old).change is Change.FASTER


def test_what_only_one_run_has_is_listed(tmp_path, capsys):
    old, new = a_run(0), a_run(1)
    gpu = {"name": "a GPU"}
    new = dataclasses.replace(
        new,
        comparisons=new.comparisons[1:],
        environment=dict(new.environment)
        | {"gpu": gpu, "threads": 9, "versions": {"torch": "0"}, "load_average": [7.0, 2.0, 2.0]},
    )
    old = dataclasses.replace(old, environment=dict(old.environment) | {"load_average": [1.5, 2.0, 2.0]})
    assert compare(tmp_path, old, new) == 0
    printed = capsys.readouterr().out
    assert "only in the old report: ort fp32 / ov fp32 (batch=1)" in printed
    assert "not measured alike: gpu: None and a GPU" in printed
    assert "not measured alike: threads: 2 and 9" in printed
    assert "not measured alike: load over a minute: 1.5 and 7.0" in printed
    assert "not measured alike: numpy: " in printed


UNLIKE = {
    "benchmark": ({"benchmark": "peers"}, "are of step_latency and peers"),
    "subject": ({"subject": {"name": "y"}}, "measured different subjects (name x and y)"),
    "nothing": ({"comparisons": []}, "no comparison in common"),
}


@pytest.mark.parametrize(("change", "message"), UNLIKE.values(), ids=UNLIKE)
def test_reports_that_do_not_belong_together(tmp_path, capsys, change, message):
    old = a_run(0)
    assert compare(tmp_path, old, dataclasses.replace(old, **change)) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_reports(tmp_path, capsys):
    assert main([str(tmp_path / "none.json"), str(tmp_path / "none.json")]) == 2
    assert "is no benchmark report" in capsys.readouterr().err


def test_a_series_beside_itself_is_the_same():
    series = Series(1.0, (), np.ones((8, 2)))
    same = Comparison({}, "a", "b", paired_ratio(series, series))
    assert Pair(same, same).change is Change.SAME
