"""kernels.aot: no kernel spills, each stays under its ceilings, and a launcher passes what the PTX asks for."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("triton")

from aot_runs import ROOT, run

from kernels.aot import ARCHITECTURES, GPUS, entry_parameters, least_seconds, main

# Compiles in a process of its own: here the kernels may be the interpreter's.
PROGRAM = """
import dataclasses, json, sys
from kernels.aot import compile_case, expected_parameters
from kernels.aot_cases import cases
chosen = [case for case in cases() if sys.argv[1] in ("all", case.name)]
assert chosen
for case in chosen:
    for architecture in map(int, sys.argv[2:]):
        result = dataclasses.asdict(compile_case(case, architecture))
        limits = {"most_registers": case.most_registers, "most_shared": case.most_shared}
        print(json.dumps(result | limits | {"expected": expected_parameters(case)}))
"""


def compiled(name: str, *architectures: int) -> list[dict[str, object]]:
    return [json.loads(line) for line in run(PROGRAM, name, *map(str, architectures)).splitlines()]


def assert_fits(results: list[dict[str, object]]) -> None:
    for result in results:
        assert result["spilled"] == 0, result
        assert result["registers"] <= result["most_registers"], result
        assert result["shared"] <= result["most_shared"], result
        assert result["scratch"] == 0, "a launcher passes null for the hidden buffers"
        assert result["parameters"] == result["expected"]


@pytest.mark.parametrize(
    "name",
    ["GroupNorm+SiLU, channels-last, two inputs", "attention", "update, everything", "quantile of abs(x0)"],
)
def test_one_kernel_of_each_kind_fits_the_oldest_architecture(name: str) -> None:
    assert_fits(compiled(name, 80))


def test_a_launch_with_ones_compiles() -> None:
    """One slot, one group, one pixel: Triton makes constants of such parameters, which have fewer methods."""
    program = """
from kernels.aot import compile_case
from kernels.aot_cases import cases
for case in {case.kernel.__name__: case for case in cases()}.values():
    print(compile_case(case, 80, with_ones=True).parameters.count(".u32"))
"""
    done = run(program)
    assert done.split() == ["0"] * 6


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_fits(architecture: int) -> None:
    assert_fits(compiled("all", architecture))


def test_the_document_holds_every_case_without_a_spill() -> None:
    from kernels.aot_cases import cases

    text = (ROOT / "docs" / "kernels.md").read_text()
    rows = [line for line in text.partition("## Bytes")[0].splitlines() if line.startswith("| ") and "/" in line]
    assert [row.split(" | ")[:2] for row in rows] == [[f"| {case.name}", case.shape] for case in cases()]
    for row in rows:
        spills = re.findall(r"\d+ / (\d+) / \d+", row)
        assert spills == ["0"] * len(ARCHITECTURES)


def test_the_bound_is_the_slower_of_memory_and_arithmetic() -> None:
    from kernels.aot_cases import cases

    every = {case.name + case.shape: case for case in cases()}
    gpu = GPUS[0]
    norm = every["GroupNorm+SiLU, NCHWB=64 C=128 groups=32 HW=1024, fp16"]
    assert least_seconds(norm, gpu) == 2 * 2 * 64 * 128 * 1024 / gpu.bandwidth
    single = every["attentionB=1 heads=1 N=1024 head_dim=512, fp32"]
    assert least_seconds(single, gpu) == 4 * 1024 * 1024 * 512 / gpu.fp32


def test_entry_parameters_are_read_in_order() -> None:
    ptx = ".visible .entry f(\n.param .u64 .ptr .global .align 1 f_0,\n.param .u32 f_1,\n.param .f32 f_2\n)"
    assert entry_parameters(ptx) == (".u64", ".u32", ".f32")


@pytest.mark.parametrize(("arguments", "text"), [(["--arch", "75"], "invalid choice"), ([], "TRITON_INTERPRET is set")])
def test_bad_use_ends_with_status_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert text in capsys.readouterr().err
