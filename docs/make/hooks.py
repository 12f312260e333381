"""What a build of the site checks beside links: every public name is documented, and nothing comes from elsewhere."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_FOREIGN = re.compile(r"""<(?:script|img|source|iframe)\b[^>]*?\bsrc\s*=\s*["']?(?:https?:)?//"""
                      r"""|<link\b(?![^>]*\brel=["']?canonical)[^>]*\bhref\s*=\s*["']?(?:https?:)?//"""
                      r"""|url\(\s*["']?(?:https?:)?//|@import\s+["'](?:https?:)?//""")  # fmt: skip


def undocumented(package: Any, page: str) -> Iterator[str]:
    """What is missing of each name of package.__all__: its place on the page, its docstring, its arguments.

    page: the text of the API page, where a name stands as "::: engine.NAME". An argument is documented where its name
    is a word of the docstring of its function, method or class.
    """
    for name in package.__all__:
        value = getattr(package, name)
        if not re.search(rf"^::: {package.__name__}\.{re.escape(name)}$", page, re.MULTILINE):
            yield f"{package.__name__}.{name} is not on the API page"
        if isinstance(value, str):
            continue
        text = inspect.getdoc(value) or ""
        if not text or text.startswith(f"{name}("):
            yield f"{package.__name__}.{name} has no docstring"
        elif inspect.isclass(value) and issubclass(value, BaseException):
            continue
        elif inspect.isclass(value):
            yield from _of_class(value, name, text)
        else:
            yield from _arguments(value, name, text)


def _of_class(value: type, name: str, text: str) -> Iterator[str]:
    if "__init__" in vars(value):
        yield from _arguments(value.__init__, name, f"{text} {inspect.getdoc(value.__init__) or ''}")
    for method, member in vars(value).items():
        if method.startswith("_") or not (inspect.isroutine(member) or isinstance(member, property)):
            continue
        function = getattr(member, "__func__", getattr(member, "fget", member))
        said = inspect.getdoc(function) or ""
        if not said:
            yield f"{name}.{method} has no docstring"
        elif not isinstance(member, property):
            yield from _arguments(function, f"{name}.{method}", said)


def _arguments(function: Any, name: str, text: str) -> Iterator[str]:
    for argument, parameter in inspect.signature(function).parameters.items():
        if argument in ("self", "cls") or parameter.kind is parameter.VAR_KEYWORD:
            continue
        if not re.search(rf"\b{re.escape(argument)}\b", text):
            yield f"{name} does not say what {argument} is"


def foreign_assets(site: Path) -> Iterator[str]:
    """Files of a built site that would load something from another host."""
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        if found := _FOREIGN.search(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(site)}: {found[0][:120]}"


def flags_table() -> str:
    """Every flag for a fact of a checkpoint, as a table."""
    from engine.checkpoints.facts import Facts, flag

    lines = ["| flag | meaning | values |", "|---|---|---|"]
    for fact in dataclasses.fields(Facts):
        values = ", ".join(f"`{value}`" for value in fact.metadata.get("choices", ()))
        lines.append(f"| `{flag(fact.name)}` | {fact.metadata['help']} | {values} |")
    return "\n".join(lines)


def _stop_at(faults: Sequence[str], what: str) -> None:
    if faults:
        from mkdocs.exceptions import Abort

        raise Abort("\n  ".join([what, *faults]))


def on_pre_build(config: Any) -> None:
    """Stops the build at public names that are not documented."""
    sys.path.insert(0, str(ROOT))
    import engine

    page = (Path(config.docs_dir) / "api.md").read_text(encoding="utf-8")
    _stop_at(list(undocumented(engine, page)), "public names of engine that are not documented:")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the table of flags where families.md asks for it."""
    return markdown.replace("<!-- flags -->", flags_table()) if page.file.src_uri == "families.md" else markdown


def on_post_build(config: Any) -> None:
    """Stops the build at pages that load something from another host."""
    _stop_at(list(foreign_assets(Path(config.site_dir))), "pages that load something from another host:")
