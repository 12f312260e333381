"""What a build of the site checks beside links: every public name is documented, and nothing comes from elsewhere."""

from __future__ import annotations

import ast
import dataclasses
import html
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
            # What all methods take alike is said once, of the class.
            yield from _arguments(function, f"{name}.{method}", f"{said} {text}")


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


def messages() -> dict[str, list[tuple[str, str]]]:
    """Error -> (message, file that raises it), from the raise statements of engine and export; "..." for values."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted([*(ROOT / "engine").rglob("*.py"), *(ROOT / "export").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            error = ast.unparse(node.exc.func)
            text = " ".join(_template(node.exc.args[0]).split())
            if error.endswith("Error") and error not in ("ValueError", "MissingPackageError") and len(text) > 8:
                found.setdefault(error, []).append((text, path.relative_to(ROOT).as_posix()))
    return {error: sorted(set(rows)) for error, rows in sorted(found.items())}


def _template(value: ast.expr) -> str:
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_template(part) for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _template(left) + _template(right)
        case _:
            return "..."


def messages_table() -> str:
    """The messages as one table for each error."""
    lines = []
    for error, rows in messages().items():
        lines += [f"### {error}", "", "| message | raised in |", "|---|---|"]
        lines += [f"| {html.escape(text, quote=False).replace('|', '&#124;')} | `{file}` |" for text, file in rows]
        lines.append("")
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
    """Puts what is made from the code where a page asks for it."""
    makers = {
        "families.md": ("<!-- flags -->", flags_table),
        "troubleshooting.md": ("<!-- messages -->", messages_table),
    }
    if page.file.src_uri not in makers:
        return markdown
    mark, make = makers[page.file.src_uri]
    return markdown.replace(mark, make())


def on_post_build(config: Any) -> None:
    """Stops the build at pages that load something from another host."""
    _stop_at(list(foreign_assets(Path(config.site_dir))), "pages that load something from another host:")
