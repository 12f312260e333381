"""Options, skips and settings that every test shares. Collecting the tests touches no device."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from golden_folder import GOLDEN_VARIABLE, golden_root

from engine.threads import torch_threads

# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers of pytest-xdist share the cores, so a worker and the processes that its tests start take one thread each: here
# for libraries that read it when they are loaded, below for torch, which is loaded.
os.environ["OMP_NUM_THREADS"] = "1"

# A worker takes about 1.5 GiB.
MOST_WORKERS = 8

# A busy machine must not fail a property test by its clock, and CI tries the same examples every time.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        metavar="DIR",
        default=None,
        help=f"reference data of the original implementations (default: variable {GOLDEN_VARIABLE})",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Workers of `-n auto`: one a core that this process may run on, hardware threads included."""
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    golden_root(config)


def pytest_report_header(config: pytest.Config) -> str:
    root = golden_root(config)
    return f"golden: {root or f'none, its tests are skipped (--golden DIR or {GOLDEN_VARIABLE})'}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    if item.get_closest_marker("trt"):
        names = ("tensorrt_rtx", "tensorrt")
        if not any(importlib.util.find_spec(name) for name in names):
            pytest.skip("needs TensorRT: pip install tensorrt-rtx-cu13")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """The order of float sums depends on the thread count; one is what every worker has."""
    with torch_threads(1):
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """For tests of who gets how many of torch's threads."""
    with torch_threads(2):
        yield


@pytest.fixture
def no_native_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without a compiler, so that auto takes eager of a bundle without ONNX."""
    monkeypatch.setenv("UNETRT_NATIVE_LIBRARY", str(tmp_path / "none.so"))


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a command keeps for the user stays out of the user's folder, and none of it is there before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
