"""Rendering templates and writing files of a site, fast enough for ten thousand pages. Imports no torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

import lustral
from lustral.core.characters import visible
from lustral.report.rendering import page_environment
from lustral.site.folder import FOLDERS

SEPARATOR = "\x1f"  # ASCII's own; it has no business in a page

Link = tuple[str, str, str]
"""A link to another cell: its text, its address, and its most telling number."""

OnPages = Callable[[int, int], None]


@dataclass
class PageWriter:
    """Renders templates and writes files below a folder."""

    folder: Path
    title: str
    on_progress: OnPages | None
    size: int = 0
    pages: int = 0
    total: int = 0
    made: dict[Link, Markup] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the folders, and get the templates ready."""
        self.environment = page_environment("lustral.site")
        self.environment.filters.update(cells=table_cells, lines=table_lines, links=self.links)
        self.environment.globals["site"] = {
            "title": self.title,
            "version": lustral.__version__,
            "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        }
        for name in FOLDERS:
            (self.folder / name).mkdir()

    def links(self, links: Sequence[Link]) -> Markup:
        """Return links to cells as items of a list; each is escaped once, however many pages show it."""
        for link in links:
            if link not in self.made:
                text, href, number = link
                self.made[link] = Markup('<li><a href="{}">{}</a> <span class="soft">{}</span></li>').format(
                    href, text, number
                )
        return Markup("").join(self.made[link] for link in links)

    def page(self, template: str, path: str, **values: Any) -> None:
        """Write a page."""
        root = "../" * path.count("/")
        self.file(path, self.environment.get_template(template).render(root=root, page=path, **values))
        self.pages += 1
        if self.on_progress is not None:
            self.on_progress(self.pages, self.total)

    def file(self, path: str, content: str | bytes) -> None:
        """Write a file. No waiting for the disk: the folder gets its name only when all are written."""
        data = content.encode("utf-8", "replace") if isinstance(content, str) else content
        with open(f"{self.folder}/{path}", "xb", buffering=0) as file:
            file.write(data)
        self.size += len(data)


def table_cells(texts: Sequence[str]) -> Markup:
    """Return texts as cells of a table; escaped in one go, because the pages have a million of them.

    >>> table_cells(["1", "<b>"])
    Markup('<td>1</td><td>&lt;b&gt;</td>')
    """
    return _split(texts, "<td>", "</td><td>", "</td>")


def table_lines(texts: Sequence[str]) -> Markup:
    """Return texts as one cell of a table, those after the first in small print.

    >>> table_lines(["98%", "n = 9"])
    Markup('<td>98%<span class="soft">n = 9</span></td>')
    """
    first, *rest = texts
    first = visible(first)
    small = _split(rest, '<span class="soft">', '</span><span class="soft">', "</span>") if rest else ""
    return Markup(f"<td>{escape(first)}{small}</td>")


def _split(texts: Sequence[str], start: str, between: str, end: str) -> Markup:
    joined = visible(SEPARATOR.join(text.replace(SEPARATOR, " ") for text in texts), keep=SEPARATOR)
    return Markup(start + str(escape(joined)).replace(SEPARATOR, between) + end)
