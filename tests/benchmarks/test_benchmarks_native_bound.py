"""The CPU engine's network beside its parts: each is found, counted and runs alone; a wrong kernel turns it red."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from helpers import adm_unet, write_bundle

from benchmarks import native_bound
from benchmarks.core.report import EXIT_RED, read_report
from benchmarks.native_bound import find_part, part_program
from engine.backends.native.lowering import build_program
from engine.backends.native.native_backend import NativeBackend
from engine.backends.native.program import Code
from engine.bundle.bundle_folder import Bundle
from kernels.native import library

pytestmark = pytest.mark.skipif(library.reason_against() is not None, reason="no CPU engine here")

PARTS = (Code.CONV, Code.ATTENTION, Code.NORM)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Bundle.open(write_bundle(tmp_path / "net.engine", adm_unet(mult=(1, 2), num_classes=3)))


def test_a_report_of_every_part(bundle: Bundle, tmp_path: Path) -> None:
    argv = [str(bundle.path), "--short", "--batches", "2", "--out", str(tmp_path / "out")]
    assert native_bound.main(argv) == 0
    report = read_report(tmp_path / "out" / "native_bound.json")
    assert (tmp_path / "out" / "native_bound.png").stat().st_size > 1000
    operators = [op for op in build_program(bundle.manifest.unet.config).operators if op.code in PARTS]
    for precision in {row.case["precision"] for row in report.rows}:
        rows = [row for row in report.rows if row.case["precision"] == precision]
        assert sum(int(row.metrics["count"] or 0) for row in rows[:-1]) == len(operators)
        assert all((row.metrics["alone_ms"] or 0) > 0 and (row.metrics["in_network_ms"] or 0) > 0 for row in rows)
        assert rows[-1].case["part"] == "network"
    assert {c.baseline for c in report.comparisons} == {"parts alone"}


@pytest.mark.parametrize("code", PARTS)
def test_a_part_alone_is_the_operator_of_the_network(bundle: Bundle, code: Code) -> None:
    program = build_program(bundle.manifest.unet.config)
    for op in program.operators:
        part = find_part(program, op)
        if op.code is not code or part is None:
            continue
        alone = part_program(part)
        placed = alone.operators[-2]
        shape = dataclasses.astuple(program.maps[op.dst])
        assert dataclasses.astuple(alone.maps[placed.dst]) == shape
        assert (placed.code, placed.kernel, placed.stride, placed.mode) == (op.code, op.kernel, op.stride, op.mode)
        channels = [sum(p.maps[m].channels for m in o.src) for p, o in ((alone, placed), (program, op))]
        assert channels[0] == channels[1]
        assert len(placed.extra) == len(op.extra)


def test_an_error_beyond_that_of_autocast_is_red(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = NativeBackend.__call__

    def rounded(self: NativeBackend, *inputs: torch.Tensor) -> torch.Tensor:
        return call(self, *inputs) * 1.2

    monkeypatch.setattr(NativeBackend, "__call__", rounded)
    argv = [str(bundle.path), "--short", "--batches", "1", "--out", str(tmp_path / "out")]
    assert native_bound.main(argv) == EXIT_RED


def test_batches_that_are_no_numbers(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert native_bound.main([str(bundle.path), "--batches", "1,x", "--out", str(tmp_path)]) == 2
    assert "--batches is '1,x'" in capsys.readouterr().err
