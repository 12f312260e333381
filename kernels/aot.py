"""Compile every Triton kernel without a GPU, and say what it takes: registers, spills, shared memory, least time.

    python -m kernels.aot --out docs/kernels.md --json kernels.json

The least time is a roofline (Williams, Waterman & Patterson, 2009): the larger of bytes over the GPU's published
memory bandwidth and operations over its published dense rate. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.aot_cases import KernelCase

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
HIDDEN = (".u64", ".u64")
"""What Triton appends to a kernel's parameters: global_scratch and profile_scratch, null where their sizes are 0."""

_PTX_TYPES = {"i32": ".u32", "fp32": ".f32"}


@dataclass(frozen=True, slots=True)
class Gpu:
    """Published figures: bytes a second, and operations a second of fp16 tensor cores (dense) and of fp32."""

    name: str
    bandwidth: float
    fp16: float
    fp32: float


GPUS = (
    Gpu("A100 80GB SXM", 2039e9, 312e12, 19.5e12),
    Gpu("RTX 4090", 1008e9, 165.2e12, 82.6e12),
    Gpu("L4", 300e9, 121e12, 30.3e12),
    Gpu("H100 SXM", 3350e9, 989e12, 67e12),
    Gpu("B200", 8000e9, 2250e12, 75e12),
)


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel on one architecture. spilled: bytes of spill stores and loads a thread; shared: bytes a program.

    parameters: types of the PTX entry in order; scratch: bytes of both hidden buffers.
    """

    name: str
    shape: str
    architecture: int
    registers: int
    spilled: int
    stack: int
    shared: int
    scratch: int
    parameters: tuple[str, ...]


def compile_case(case: KernelCase, architecture: int, with_ones: bool = False) -> Compiled:
    """Compile for compute capability architecture / 10. Raises RuntimeError where the kernels are interpreted.

    with_ones: every integer parameter is the constant 1, which is how a launch compiles one that is 1.
    """
    types = tuple("constexpr" if with_ones and kind == "i32" else kind for kind in case.types)
    kernel = compile_kernel(case.kernel, types, case.constants, architecture, case.num_warps, case.num_stages)
    metadata = kernel.metadata
    registers, stack, spilled = _resources(kernel.asm["ptx"])
    return Compiled(
        name=case.name,
        shape=case.shape,
        architecture=architecture,
        registers=registers,
        spilled=spilled,
        stack=stack,
        shared=metadata.shared,
        scratch=metadata.global_scratch_size + metadata.profile_scratch_size,
        parameters=entry_parameters(kernel.asm["ptx"]),
    )


def compile_kernel(
    kernel: Any, types: Sequence[str], constants: Sequence[Any], architecture: int, num_warps: int, num_stages: int = 3
) -> Any:
    """Triton's compiled kernel. types: of the parameters in order, "constexpr" for the constant 1; then the constants.

    Raises RuntimeError where the kernels are interpreted.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    if not hasattr(kernel, "params"):
        raise RuntimeError("the kernels were loaded for Triton's interpreter; unset TRITON_INTERPRET and start again")
    names = [parameter.name for parameter in kernel.params]
    signature = dict(zip(names, [*types, *["constexpr"] * len(constants)], strict=True))
    values = {(at,): 1 for at, kind in enumerate(types) if kind == "constexpr"}
    values |= {(len(types) + at,): value for at, value in enumerate(constants)}
    aligned: Any = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(types) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def entry_parameters(ptx: str) -> tuple[str, ...]:
    """Types of the entry's parameters in order, as .u64, .u32, .f32."""
    head = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)
    if head is None:
        raise ValueError("the PTX has no entry")
    return tuple(re.findall(r"\.param\s+(\.\w+)", head[1]))


def expected_parameters(case: KernelCase) -> tuple[str, ...]:
    """What a launcher passes: the case's parameters in order, then the hidden ones."""
    return (*(".u64" if kind.startswith("*") else _PTX_TYPES[kind] for kind in case.types), *HIDDEN)


def _resources(ptx: str) -> tuple[int, int, int]:
    """Registers, stack bytes and spilled bytes by the assembler that comes with triton."""
    from triton import knobs

    target = re.search(r"\.target\s+(\w+)", ptx)
    assert target is not None
    is_blackwell = int(re.sub(r"\D", "", target[1])) >= 100
    tool = knobs.nvidia.ptxas_blackwell if is_blackwell else knobs.nvidia.ptxas
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [tool.path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert registers is not None
    assert frame is not None
    return int(registers[1]), int(frame[1]), int(frame[2]) + int(frame[3])


def least_seconds(case: KernelCase, gpu: Gpu) -> float:
    """The roofline's bound for one launch."""
    is_fp32 = case.types[0] == "*fp32"
    return max(case.moved / gpu.bandwidth, case.operations / (gpu.fp32 if is_fp32 else gpu.fp16))


def table(cases: Sequence[KernelCase], results: Sequence[Compiled]) -> str:
    """docs/kernels.md: resources by architecture and the bounds on named GPUs, as Markdown."""
    architectures = sorted({result.architecture for result in results})
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        "Written by `python -m kernels.aot --out docs/kernels.md`, without a GPU. Registers are a thread's; spills",
        "are bytes that a thread stores and loads because registers ran out; shared memory is a program's. The last",
        "table is a bound from published bandwidth and dense rates, not a measurement. A quantile reads its input 32",
        "times, from the cache where it fits; the bound counts once.",
        "",
        "## Registers, spilled bytes, shared memory",
        "",
        "| kernel | shape | " + " | ".join(f"sm_{a}" for a in architectures) + " |",
        "|---|---|" + "---|" * len(architectures),
    ]
    by_case = {(result.name, result.shape, result.architecture): result for result in results}
    for case in cases:
        cells = [by_case[case.name, case.shape, a] for a in architectures]
        text = " | ".join(f"{c.registers} / {c.spilled} / {c.shared}" for c in cells)
        lines.append(f"| {case.name} | {case.shape} | {text} |")
    lines += ["", "## Bytes moved and least microseconds", ""]
    lines.append("| kernel | shape | MB | " + " | ".join(gpu.name for gpu in GPUS) + " |")
    lines.append("|---|---|---|" + "---|" * len(GPUS))
    for case in cases:
        times = " | ".join(f"{least_seconds(case, gpu) * 1e6:.1f}" for gpu in GPUS)
        lines.append(f"| {case.name} | {case.shape} | {case.moved / 1e6:.2f} | {times} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 2 where triton is missing or an architecture unknown."""
    parser = argparse.ArgumentParser(prog="python -m kernels.aot", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--out", type=Path, help="Markdown table; standard output without it")
    parser.add_argument("--json", type=Path, help="the same figures as JSON")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, which replaces the compiler; unset it")
    try:
        from kernels.aot_cases import cases
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed; pip install 'triton>=3.3,<4'")
    every = cases()
    results = []
    for case in every:
        results += [compile_case(case, architecture) for architecture in chosen.arch]
        print(f"{case.name}, {case.shape}", file=sys.stderr)
    if chosen.json is not None:
        _write(chosen.json, json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n")
    if chosen.out is not None:
        _write(chosen.out, table(every, results))
    else:
        print(table(every, results), end="")
    return 0


def _write(path: Path, text: str) -> None:
    """By rename when whole."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
