"""The wheel: what it holds, and that it exports and samples where the sources are not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from judging.digits import fact_arguments
from kernels.native.library import LIBRARY_NAME, LIBRARY_VARIABLE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("engine", "export", "kernels", "judging", "benchmarks")

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="no cmake or no C++ compiler",
)


def call(*command: object, cwd: Path, **environment: str) -> str:
    """stdout of a command that must succeed and that nothing points to the checkout."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", LIBRARY_VARIABLE)}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def build_wheel(folder: Path, **environment: str) -> Path:
    """The wheel of a copy of this checkout, in which nothing was built before."""
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "demo", "runs", "*.engine", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, copy, cwd=folder, **environment)
    shutil.rmtree(copy)
    (wheel,) = folder.glob("*.whl")
    assert "-py3-none-" in wheel.name
    return wheel


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as opened:
        return opened.namelist()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@dataclass(frozen=True)
class Installed:
    """An environment that holds the wheel, and a folder to work in, outside the checkout."""

    programs: Path
    folder: Path

    def python(self, *arguments: object) -> str:
        return call(self.programs / "python", *arguments, cwd=self.folder)

    def script(self, *arguments: object) -> str:
        return call(self.programs / "unet-rt", *arguments, cwd=self.folder)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Packages of others are those of the tests' environment; its editable install of the checkout is not reached.

    Python reads the .pth files, by which an editable install works, in an environment's own folder alone.
    """
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False, symlinks=True)
    python = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    call(*pip, "install", "--no-deps", "--no-index", wheel, cwd=environment)
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "packages_of_others.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return Installed(python.parent, tmp_path_factory.mktemp("work"))


@needs_compiler
def test_the_wheel_holds_the_library_and_not_its_sources(wheel: Path) -> None:
    names = names_in(wheel)
    assert f"kernels/native/{LIBRARY_NAME}" in names
    assert not [name for name in names if name.endswith((".cpp", ".o"))]
    # The digits are files of the repository.
    assert "judging/scorers.py" in names
    assert "judging/digits.py" not in names
    assert not [name for name in names if name.startswith("recipes/")]


def test_a_wheel_without_a_compiler(tmp_path: Path) -> None:
    names = names_in(build_wheel(tmp_path, CXX="/nonexistent/c++"))
    assert "kernels/native/library.py" in names
    assert not [name for name in names if name.endswith(".so")]


def samples(folder: Path) -> np.ndarray:
    """The PNG files of a folder, int64 [n, 32, 32]."""
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("*.png"))])


@needs_compiler
def test_the_installed_wheel_exports_and_samples(wheel: Path, installed: Installed) -> None:
    packages = ", ".join(PACKAGES)
    assert "show this help" in installed.python("-m", "benchmarks.quality", "--help")
    where = installed.python("-c", f"import {packages}\nfor package in ({packages}): print(package.__file__)").split()
    assert len(where) == len(PACKAGES)
    assert all(Path(file).is_relative_to(installed.programs.parent) for file in where)

    shutil.copy(ROOT / "assets" / "digits.pt", installed.folder)
    installed.python("-m", "export.to_onnx", "digits.pt", *fact_arguments())
    assert {path.name for path in installed.folder.iterdir()} == {"digits.pt", "digits.engine"}

    def sample(program: Sequence[object], backend: str, out: str) -> np.ndarray:
        run = installed.python if program else installed.script
        options = ("-n", 10, "--per-class", "--steps", 10, "--seed", 0, "--backend", backend, "--precision", "fp32")
        printed = run(*program, "sample", "digits.engine", *options, "--out", out)
        assert f"backend {backend} fp32" in printed
        return samples(installed.folder / out)

    native = sample(("-m", "engine"), "native", "native")
    assert native.shape == (10, 32, 32)
    # Ten digits in white on black, of which no two are alike.
    assert native.max() == 255
    assert len(np.unique(native.reshape(10, -1), axis=0)) == 10
    np.testing.assert_array_equal(sample((), "native", "script"), native)
    # The library against torch: rounding, carried through ten steps.
    assert np.abs(sample(("-m", "engine"), "eager", "eager") - native).max() <= 1

    data = json.loads(installed.script("info", "digits.engine", "--json"))
    assert data["versions"]["unet-rt"] == wheel.name.split("-")[1]
