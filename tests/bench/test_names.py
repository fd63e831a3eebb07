"""Names in a store may be anyone's: what a reader cannot see, or a terminal would obey, reaches no page and no table."""

from __future__ import annotations

import io
import unicodedata

import pyarrow as pa
from jinja2 import Environment
from rich.console import Console

from lustral.api.progress import SafeConsole
from lustral.cli.bench_commands import flagged
from lustral.report.rendering import shown
from lustral.site import data as site_data
from lustral.site import page_writer as site_press
from lustral.tables.exports import cell_texts, rich_table, to_csv, to_latex, to_markdown
from lustral.tables.rows import ROW_SCHEMA
from lustral.tables.summary import Query, table
from tables.test_exports import cell

HOSTILE = "a\x1b[2J\x9b\u202eb\u200bc\u2066[/red]<b>"


def hidden(text: str) -> list[str]:
    return [c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf")]


def test_tables_of_a_foreign_store() -> None:
    summary = table(
        pa.Table.from_pylist([cell(HOSTILE, 0, acc=0.5)], schema=ROW_SCHEMA), Query(by=("defence",), metrics=("acc",))
    )
    for write in (to_markdown, to_latex, to_csv):
        text = write(summary).decode()
        assert "u202e" in text
        assert hidden(text) == []
    assert "\\u202e" in cell_texts(summary)[0][0]
    out = io.StringIO()
    Console(file=out, width=200).print(rich_table(summary))
    assert hidden(out.getvalue()) == []


def test_pages_of_a_foreign_store() -> None:
    environment = Environment(autoescape=True, finalize=shown)
    page = environment.from_string("{{ name }} {{ cells }} {{ number }}")
    text = page.render(name=HOSTILE, cells=site_press.table_cells([HOSTILE, "x"]), number=3)
    text += site_press.table_lines([HOSTILE, HOSTILE])
    assert hidden(text) == []
    assert "<b>" not in text
    assert text.count("\\u202e") == 4
    assert "\\\\u202e" in site_data.script_json(site_data._slim(HOSTILE))


def test_lines_of_the_command_line() -> None:
    out = io.StringIO()
    SafeConsole(file=out, width=300).print(flagged("fault", "red", f"{HOSTILE}\nNo fault."))
    assert hidden(out.getvalue()) == []
    assert "[/red]" in out.getvalue()
    assert out.getvalue().count("\n") == 1
