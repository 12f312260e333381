"""Who may import whom: the arrows between our packages; optional packages only where they are needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Package -> what it may import of ours beside itself.
ARROWS = {
    "kernels": set(),
    "engine": {"kernels"},
    "export": {"kernels", "engine"},
    "judging": {"kernels", "engine"},
    "benchmarks": {"kernels", "engine", "export", "judging"},
    "recipes": {"engine", "judging"},
}

# Optional package -> the files that may import it, inside functions only.
OPTIONAL = {
    "tensorrt": ["export/trt/plugin_triton.py", "engine/backends/trt/trt_library.py"],
    "tensorrt_rtx": ["engine/backends/trt/trt_library.py"],
    "openvino": ["engine/backends/ov/ov_backend.py", "benchmarks/peers/libraries.py"],
    "onnxruntime": ["engine/backends/ort/ort_backend.py", "benchmarks/peers/libraries.py"],
    "onnx": ["export/*.py"],
    "onnxscript": ["export/*.py"],
    "onnx_ir": ["export/onnx/onnx_file.py"],
    "triton": ["kernels/triton/*.py", "kernels/aot.py", "export/trt/plugin_triton.py"],
    "mlxtend": ["judging/digits.py"],
    "diffusers": ["benchmarks/random_models.py", "benchmarks/peers/*.py", "recipes/diffusers_format.py"],
    "denoising_diffusion_pytorch": ["benchmarks/peers/lucidrains_package.py"],
    "matplotlib": ["benchmarks/core/pictures.py"],
    "torch_fidelity": ["judging/scorers.py"],
    "rich": ["benchmarks/core/terminal.py"],
    "jsonschema": [],
    "torchvision": [],
}

# Functions that import what a string names.
BY_NAME = ("import_module", "__import__")

# Files that are themselves imported on first use only, and so may import their package at the top.
LOADED_ON_FIRST_USE = ["kernels/triton/*.py", "kernels/aot_cases.py"]


@dataclass(frozen=True)
class Import:
    file: str
    line: int
    module: str
    at_top_level: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def our_files() -> list[str]:
    paths = (path for package in ARROWS for path in (ROOT / package).rglob("*.py"))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def run_by_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node outside function bodies and outside `if TYPE_CHECKING:`."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        yield node
        stack += ast.iter_child_nodes(node)


def imports_of(file: str) -> Iterator[Import]:
    """The imports of one file: statements, and import_module() or __import__() of a literal name.

    A name computed at run time cannot be checked; it is reported as the module "?".
    """
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"), file)
    top_level = set(map(id, run_by_import(tree)))
    package = Path(file).parent.parts
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            names = [".".join(filter(None, [origin, node.module]))]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            name = node.args[0] if node.args else None
            names = [name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else "?"]
        for name in names:
            yield Import(file, node.lineno, name, id(node) in top_level)


ALL_IMPORTS = [found for file in our_files() for found in imports_of(file)]


def matches(file: str, patterns: list[str]) -> bool:
    return any(fnmatch(file, pattern) for pattern in patterns)


@pytest.mark.parametrize("package", ARROWS)
def test_arrows(package):
    allowed = ARROWS[package] | {package}
    wrong = [
        str(found)
        for found in ALL_IMPORTS
        if found.file.startswith(f"{package}/") and found.top in (ARROWS.keys() | {"tests"}) - allowed
    ]
    assert not wrong, f"{package} may import {sorted(ARROWS[package]) or 'none of our packages'}: {wrong}"


def test_every_import_can_be_checked():
    assert not [str(found) for found in ALL_IMPORTS if found.module == "?"]


def module_graph() -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports, anywhere in it."""
    modules = {".".join(Path(file).with_suffix("").parts).removesuffix(".__init__"): file for file in our_files()}

    def module_of(name: str) -> str:
        while name and name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph: dict[str, set[str]] = {module: set() for module in modules}
    for module, file in modules.items():
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"), file)):
            if isinstance(node, ast.Import):
                graph[module] |= {module_of(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                graph[module] |= {module_of(f"{node.module}.{alias.name}") for alias in node.names}
    return {module: imported - {module, ""} for module, imported in graph.items()}


def circle_of(graph: dict[str, set[str]]) -> list[str]:
    """The modules of some circle of imports, in order; empty where there is none."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for imported in sorted(graph[module]):
            if circle := visit(imported):
                return circle
        done.add(path.pop())
        return []

    return next((circle for module in sorted(graph) if (circle := visit(module))), [])


def test_no_circle_of_imports():
    assert not circle_of(module_graph())


def test_circles_are_found():
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not circle_of({"a": {"b", "c"}, "b": {"c"}, "c": set()})


@pytest.mark.parametrize("package", OPTIONAL)
def test_optional_package_is_imported_where_it_is_needed(package):
    found = [found for found in ALL_IMPORTS if found.top == package]
    elsewhere = [str(each) for each in found if not matches(each.file, OPTIONAL[package])]
    assert not elsewhere, f"{package} belongs in {OPTIONAL[package]}: {elsewhere}"
    early = [str(each) for each in found if each.at_top_level and not matches(each.file, LOADED_ON_FIRST_USE)]
    assert not early, f"import {package} inside the function that uses it: {early}"


def test_walker_sees_each_kind_of_import(tmp_path, monkeypatch):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "sample.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "from . import unet\n"
        "from .backends import ort\n"
        "if TYPE_CHECKING:\n    import onnx\n"
        "try:\n    import triton\nexcept ImportError:\n    pass\n"
        "class A:\n    import openvino.runtime\n"
        "def f(name):\n    import tensorrt\n"
        "    importlib.import_module('export.to_onnx')\n    importlib.import_module(name)\n"
    )
    monkeypatch.setattr("test_imports.ROOT", tmp_path)
    assert {(each.module, each.at_top_level) for each in imports_of("engine/sample.py")} == {
        ("typing", True),
        ("engine", True),
        ("engine.backends", True),
        ("onnx", False),
        ("triton", True),
        ("openvino.runtime", True),
        ("tensorrt", False),
        ("export.to_onnx", False),
        ("?", False),
    }


PRELUDE = """
import importlib, importlib.abc, sys
import numpy, torch

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"{name} is absent in this test", name=name)

def touched(*_args, **_kwargs):
    raise AssertionError("a device was asked for during import")

before = set(sys.modules)
torch.cuda.is_available = torch.cuda.device_count = torch.cuda._lazy_init = touched
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds our packages first, whatever is installed."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); OPTIONAL = {set(OPTIONAL)!r}\n{PRELUDE}\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_engine_is_light():
    code = """
import engine
heavy = OPTIONAL | {"PIL", "matplotlib"}
print(sorted(name for name in set(sys.modules) - before if name in heavy))
assert not torch.cuda.is_initialized()
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_module_imports_without_the_optional_packages():
    modules = [
        ".".join(Path(file).with_suffix("").parts).removesuffix(".__init__")
        for file in our_files()
        if not file.endswith("__main__.py") and not matches(file, LOADED_ON_FIRST_USE)
    ]
    code = f"""
sys.meta_path.insert(0, Absent())
for name in {modules!r}:
    importlib.import_module(name)
print("imported", len({modules!r}))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"imported {len(modules)}"
