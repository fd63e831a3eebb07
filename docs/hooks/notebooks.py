"""Notebooks without Jupyter: run the cells in order in one namespace, and turn them into a page with what they show.

The tests run the tutorials with ``run``, the site with ``as_page``: both do what a notebook server does with these cells.
"""

from __future__ import annotations

import ast
import contextlib
import html
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a notebook.

    Attributes:
        kind: "markdown" or "code".
        source: its text.
        printed: what it wrote to standard output; "" before it ran.
        shown: its last value as HTML; "" where there is none.
    """

    kind: str
    source: str
    printed: str = ""
    shown: str = ""


def read(path: Path) -> list[Cell]:
    """Return the cells of a notebook file, format 4; nothing in it runs."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return [Cell(kind=cell["cell_type"], source="".join(cell["source"])) for cell in content["cells"]]


def run(cells: list[Cell], names: dict[str, Any]) -> Iterator[Cell]:
    """Run code cells in the current folder and yield every cell with its output.

    Args:
        cells: of a notebook.
        names: the namespace of all of them; changed.
    """
    for number, cell in enumerate(cells, 1):
        if cell.kind != "code":
            yield cell
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            value = last_value(cell.source, f"<cell {number}>", names)
        yield Cell(kind="code", source=cell.source, printed=printed.getvalue(), shown=as_html(value))


def last_value(source: str, name: str, names: dict[str, Any]) -> Any:
    """Run a cell and return the value of its last line, if that is an expression; a semicolon behind it hides it."""
    tree = ast.parse(source, name)
    last = tree.body[-1] if tree.body else None
    if not isinstance(last, ast.Expr) or source.rstrip().endswith(";"):
        exec(compile(tree, name, "exec"), names)
        return None
    exec(compile(ast.Module(tree.body[:-1], []), name, "exec"), names)
    return eval(compile(ast.Expression(last.value), name, "eval"), names)


def as_html(value: Any) -> str:
    """Return a value as notebooks show it."""
    if value is None:
        return ""
    rich = getattr(value, "_repr_html_", None)
    return str(rich()) if rich is not None else f"<pre>{html.escape(repr(value))}</pre>"


def as_page(cells: list[Cell], file_name: str) -> str:
    """Return a notebook as Markdown, with the outputs that its cells have and a link to the file."""
    parts = []
    for cell in cells:
        if cell.kind == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        shown = cell.shown
        if cell.printed:
            shown = f"<pre>{html.escape(cell.printed)}</pre>{shown}"
        if shown:
            one_line = "\n".join(
                line for line in shown.splitlines() if line.strip()
            )  # a blank line would end the block
            parts.append(f'<div class="cell-output">\n{one_line}\n</div>')
    parts.insert(1, f"[The notebook itself]({file_name}){{download}}")
    return "\n\n".join(parts) + "\n"
