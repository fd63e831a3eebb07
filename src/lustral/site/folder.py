"""The folder of a site: what may be replaced, and how the new one takes the old one's place. Imports no torch."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKER = "lustral-site.json"
LAYOUT = 1
PAGES = ("index.html", "table.html", "charts.html", "methods.html")
FOLDERS = ("assets", "cells", "victims", "methods", "pictures")
STALE_SECONDS = 3600.0  # unfinished folders of killed runs are removed once they are so old


class SiteError(ValueError):
    """The site cannot be written; the message says why."""


def require_ours(out: Path) -> None:
    """Raise ``SiteError`` unless a folder may be replaced: it is not there, empty, or a site and nothing else."""
    if not out.exists():
        return
    if not out.is_dir():
        raise SiteError(f"{out} is a file; name a folder")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    try:
        layout = json.loads((out / MARKER).read_text(encoding="utf-8"))["lustral_site"]
    except (OSError, ValueError, TypeError, KeyError):
        raise SiteError(f"{out} is not empty and no site of lustral: name a new folder, or an existing site") from None
    if layout != LAYOUT:
        raise SiteError(
            f"{out} is a site of layout {layout}, this version writes {LAYOUT}; remove it, or name a new folder"
        )
    if others := sorted(names - {MARKER, *PAGES, *FOLDERS}):
        raise SiteError(
            f"{out} also holds {', '.join(others[:5])}, which the new site would remove; move that away first"
        )


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of ``out`` when the block ends without an error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{secrets.token_hex(6)}.new")
    folder.mkdir()
    try:
        yield folder
        require_ours(out)  # whoever put something there meanwhile keeps it
        if out.exists():
            aside = folder.with_suffix(".old")
            os.rename(out, aside)
            try:
                os.rename(folder, out)
            except OSError:
                os.rename(aside, out)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def recover(out: Path) -> None:
    """Put back a site whose replacement was killed between its two renames, and remove what older killed runs left."""
    pattern = re.compile(re.escape(f".{out.name}.") + r"[0-9a-f]{12}\.(new|old)")
    if not out.parent.is_dir():
        return
    for path in sorted(out.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if found is None or not path.is_dir():
            continue
        if found[1] == "old" and not out.exists():
            os.rename(path, out)
        elif time.time() - path.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
