"""The documentation: what its build refuses, and that it builds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import engine

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "make" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def documented(x: int) -> int:
    """Twice x."""
    return 2 * x


def silent(x: int, hidden: int = 0) -> int:
    """Twice x."""
    return 2 * x + hidden


class Plain:
    """A thing."""

    def say(self, loudly: bool) -> None:
        """Speak."""

    def whisper(self) -> None:
        pass


def test_every_public_name_is_documented(hooks):
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert list(hooks.undocumented(engine, page)) == []


def test_a_name_that_is_not_on_the_page_is_found(hooks):
    package = SimpleNamespace(__name__="p", __all__=["documented"], documented=documented)
    assert list(hooks.undocumented(package, "::: p.documented_too\n")) == ["p.documented is not on the API page"]
    assert list(hooks.undocumented(package, "# API\n\n::: p.documented\n")) == []


def test_an_argument_that_no_docstring_names_is_found(hooks):
    package = SimpleNamespace(__name__="p", __all__=["silent", "Plain"], silent=silent, Plain=Plain)
    assert list(hooks.undocumented(package, "::: p.silent\n::: p.Plain\n")) == [
        "silent does not say what hidden is",
        "Plain.say does not say what loudly is",
        "Plain.whisper has no docstring",
    ]


@pytest.mark.parametrize(
    ("html", "is_foreign"),
    [
        ('<script src="https://elsewhere.example/a.js"></script>', True),
        ('<link rel="stylesheet" href="//elsewhere.example/a.css">', True),
        ('<img alt="x" src="http://elsewhere.example/a.png">', True),
        ('<a href="https://elsewhere.example/">a link is no asset</a>', False),
        ('<link rel="stylesheet" href="assets/a.css"><script src="assets/a.js"></script>', False),
    ],
)
def test_assets_of_other_hosts_are_found(hooks, tmp_path, html, is_foreign):
    (tmp_path / "page.html").write_text(html)
    assert bool(list(hooks.foreign_assets(tmp_path))) is is_foreign


def test_the_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link.partition("#")[0]).exists()] == []


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "api.html").exists() or (tmp_path / "site" / "api" / "index.html").exists()
