"""The CPU engine's library as a file: what it exports, and its C++ tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.native import library

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"
HEADER = ROOT / "kernels" / "native" / "include" / "unetrt_native.h"

needs_build = pytest.mark.skipif(
    not (BUILD / "CTestTestfile.cmake").is_file() or shutil.which("ctest") is None,
    reason="no build of the CPU engine with its tests (make native)",
)
needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="no cmake or no C++ compiler",
)
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")


def call(*command: object, **environment: str) -> str:
    """stdout of a command that must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@needs_build
@needs_nm
def test_the_library_shows_its_header_and_nothing_else() -> None:
    path = library.find_library()
    assert path is not None
    shown = {line.split()[-1] for line in call("nm", "-D", "--defined-only", path).splitlines()}
    assert shown == set(library._FUNCTIONS)
    assert all(f"{name}(" in HEADER.read_text(encoding="utf-8") for name in shown)


@needs_build
@needs_nm
def test_kernels_share_no_function_between_instruction_sets() -> None:
    """The linker keeps one copy of a weak function: it could be one for another processor."""
    objects = list((BUILD / "kernels" / "native" / "CMakeFiles").glob("unetrt_*.dir/src/kernels_*.o"))
    assert objects
    weak = [line for path in objects for line in call("nm", path).splitlines() if line.split()[-2] in "WVu"]
    assert weak == []


@needs_build
def test_the_tests_in_cpp() -> None:
    call("ctest", "--test-dir", BUILD, "--output-on-failure")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_the_tests_in_cpp_under_sanitizers(tmp_path: Path, sanitizer: str) -> None:
    call("cmake", "-S", ROOT, "-B", tmp_path, f"-DUNETRT_SANITIZE={sanitizer}", "-DUNETRT_WARNINGS_AS_ERRORS=ON")
    call("cmake", "--build", tmp_path, "--parallel", os.cpu_count() or 1)
    call("ctest", "--test-dir", tmp_path, "--output-on-failure")


@needs_compiler
@pytest.mark.slow
def test_tiles_in_plain_cpp(tmp_path: Path) -> None:
    """The AMX kernels on a CPU without AMX, where it has AVX-512-bf16: the checks in C++, then networks."""
    call("cmake", "-S", ROOT, "-B", tmp_path, "-DUNETRT_EMULATED_TILES=ON", "-DUNETRT_WARNINGS_AS_ERRORS=ON")
    call("cmake", "--build", tmp_path, "--parallel", os.cpu_count() or 1)
    call("ctest", "--test-dir", tmp_path, "--output-on-failure")
    built = {library.LIBRARY_VARIABLE: str(tmp_path / library.LIBRARY_NAME)}
    tests = [ROOT / "tests" / "engine" / "backends" / f"test_native_{name}.py" for name in ("backend", "int8")]
    call(sys.executable, "-m", "pytest", "-q", *tests, **built)
