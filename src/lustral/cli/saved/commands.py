"""``lustral report``: read a saved result, write its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lustral.cli.commands import shown_command
from lustral.cli.console import Screen
from lustral.cli.saved.arguments import Report
from lustral.cli.saved.reading import read_result
from lustral.cli.tables import finding_text
from lustral.vision.verdict_files import RESULT_FILE, RESULT_SCHEMA


def report(command: Report, argv: Sequence[str], screen: Screen) -> int:
    """Render a page again from a saved result."""
    file = command.result / RESULT_FILE if command.result.is_dir() else command.result
    saved = read_result(file)
    page = page_path(file) if command.out is None else command.out
    if page.exists() and page.samefile(file):
        raise ValueError(f"--out {page} would write over the result; choose another name")
    page.parent.mkdir(parents=True, exist_ok=True)
    saved.write(page)
    screen.show(finding_text(saved.finding), *(f"Missing: {sentence}" for sentence in saved.data.missing))
    screen.show(f"Report: {page}")
    about = {"schema": RESULT_SCHEMA, "command": shown_command(argv)}
    screen.record({**about, "page": str(page), "missing": list(saved.data.missing)})
    return 0


def page_path(file: Path) -> Path:
    """Return where the page of a result goes: never to report.html, which holds pictures that a result does not.

    >>> page_path(Path("scan/result.json")).name, page_path(Path("report.json")).name
    ('result.html', 'report-again.html')
    """
    page = file.with_suffix(".html")
    return page.with_name("report-again.html") if page.name == "report.html" else page
