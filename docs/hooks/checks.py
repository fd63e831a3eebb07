"""What a built site is checked for: links that lead somewhere, and a search that knows its words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Addresses(HTMLParser):
    """Collects where a page links to, and the names that one can link to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.fetched: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of a tag."""
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.add(value)
            if value and "://" in value and (name == "src" or (tag == "link" and name == "href")):
                self.fetched.add(value)
            if value and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)


def broken_links(site: Path, ignored: str | None = None) -> list[str]:
    """Return a line for each address inside the site that leads nowhere, and for each script or picture that is elsewhere.

    Args:
        site: folder of the built pages.
        ignored: part of the paths that are not looked at.
    """
    site = site.resolve()
    found: dict[Path, _Addresses] = {}
    for path in sorted(site.rglob("*.html")):
        found[path] = _Addresses()
        found[path].feed(path.read_text(encoding="utf-8"))
    problems = []
    for page, addresses in found.items():
        problems += [f"{page.relative_to(site)} fetches {link}" for link in sorted(addresses.fetched)]
        for link in sorted(addresses.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or (ignored is not None and ignored in parts.path):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            there = target.exists() and target.is_relative_to(site)
            known = (
                None if "=" in parts.fragment else found.get(target)
            )  # name=value is a filter that the page's script reads
            if not there or (parts.fragment and known and unquote(parts.fragment) not in known.anchors | {"__top"}):
                problems.append(f"{page.relative_to(site)}: {link}")
    return problems


def missed_words(site: Path, least: Mapping[str, int]) -> list[str]:
    """Return a line for each word that fewer entries of the search index hold than it should be in."""
    entries = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    counts = {word: sum(word in entry["title"] + entry["text"] for entry in entries) for word in least}
    return [f"search finds {word!r} {counts[word]} times" for word in counts if counts[word] < least[word]]
