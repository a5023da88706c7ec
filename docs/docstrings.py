"""Docstrings as the package has them (Markdown within Google's sections) made into what Sphinx reads."""

import ast
import dataclasses
import inspect
import re
import textwrap
from typing import Any

import jaxprune

SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:", "References:", "Example:")
INLINE = re.compile(
    r"""
    `(?P<code>[^`]+)`(?P<glued>\w?)
    | \$(?P<formula>[^$]+)\$
    | (?P<marked>\*\*?[A-Za-z][A-Za-z\ ]*\*\*?(?!\w))    # emphasis, which both have
    | (?P<sign>[*|](?!\ -)|(?<=\w)_(?!\w))               # not the bullets of a list table
    """,
    re.VERBOSE,
)


def to_rst(app, what, name, obj, options, lines) -> None:
    """Tables, formulas, names and indented examples of a docstring, in place."""
    found: list[str] = []
    for is_code, block in _blocks(lines):
        if is_code:
            found += [
                *([] if not found or not found[-1] else [""]),
                "::",
                "",
                *block,
                "",
            ]
        else:
            found += INLINE.sub(_inline, "\n".join(_tables(block))).split("\n")
    lines[:] = found


def _blocks(lines: list[str]) -> list[tuple[bool, list[str]]]:
    """Runs of text and of code; code is what is indented outside of a section."""
    runs: list[tuple[bool, list[str]]] = []
    in_section = in_code = False
    for line in lines:
        if line.strip():
            indented = line.startswith("    ")
            in_section = in_section if indented else line.strip() in SECTIONS
            in_code = (indented and not in_section) or ">>> " in line
        if not runs or runs[-1][0] != in_code:
            runs.append((in_code, []))
        runs[-1][1].append(line)
    return [(is_code and ">>> " not in block[0], block) for is_code, block in runs]


def _tables(lines: list[str]) -> list[str]:
    """Markdown's tables as list tables."""
    found: list[str] = []
    for line in lines:
        cells = line.strip("| ").split(" | ")
        if not line.startswith("|"):
            found.append(line)
        elif set(line) <= set("|-: "):
            continue
        else:
            if not found or not found[-1].startswith("   "):
                found += [".. list-table::", "   :header-rows: 1", ""]
            found += [
                f"   {'  -' if i else '* -'} {cell.strip()}"
                for i, cell in enumerate(cells)
            ]
    return found


def _inline(match: re.Match) -> str:
    if match["code"]:
        code = " ".join(match["code"].split())
        is_name = re.fullmatch(r"[A-Za-z_][\w.]*", code)
        return (f"`{code}`" if is_name else f"``{code}``") + (
            rf"\ {match['glued']}" if match["glued"] else ""
        )
    if match["marked"]:
        return match["marked"]
    if match["formula"]:
        return f":math:`{' '.join(match['formula'].split())}`"
    return "\\" + match["sign"]


def as_written(app, what, name, obj, options, signature, returns):
    """The signature as its source has it: `params: Params`, not what the alias stands for."""
    if inspect.isclass(obj):
        fields = _fields(obj)
        return (f"({', '.join(fields)})", None) if fields else None
    function = inspect.unwrap(obj) if callable(obj) else obj
    node = _source(function) if inspect.isfunction(function) else None
    if not isinstance(node, ast.FunctionDef):
        return None
    if node.args.args and node.args.args[0].arg in ("self", "cls"):
        node.args.args = node.args.args[1:]
    return f"({ast.unparse(node.args)})", ast.unparse(
        node.returns
    ) if node.returns else None


def _fields(of: type) -> list[str]:
    """What a dataclass or a named tuple is made of."""
    names = (
        [field.name for field in dataclasses.fields(of) if field.init]
        if dataclasses.is_dataclass(of)
        else []
    )
    names = names or list(getattr(of, "_fields", ()))
    found: dict[str, str] = {}
    for one in reversed(of.__mro__):
        for node in (
            getattr(_source(one), "body", [])
            if one.__module__.startswith("jaxprune")
            else []
        ):
            if isinstance(node, ast.AnnAssign):
                found[ast.unparse(node.target)] = ast.unparse(node)
    return [found.get(name, name) for name in names]


def _source(obj: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(obj))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None


def skipped(app, what, name, obj, skip, options):
    """Leave out, in a module, what is documented as `jaxprune.NAME`; in a class, defaults and aliases of fields."""
    at_the_top = (
        what == "module" and name in jaxprune.__all__ and getattr(jaxprune, name) is obj
    )
    default = (
        what == "class" and inspect.isfunction(obj) and "." not in obj.__qualname__
    )
    alias = str(getattr(obj, "__doc__", "")).startswith("Alias for field number")
    return True if at_the_top or default or alias else None


def setup(app) -> dict[str, bool]:
    """Connect all three, the first before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", to_rst, priority=100)
    app.connect("autodoc-process-signature", as_written)
    app.connect("autodoc-skip-member", skipped)
    return {"parallel_read_safe": True}
