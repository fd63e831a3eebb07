"""Where the pages of a site are, as addresses within it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode


def table_link(root: str, **values: Any) -> str:
    """Return the address of the table of cells that shows those with these values; None is left out.

    >>> table_link("../", attack="blended alpha=0.1", poison_rate=None)
    '../table.html#attack=blended+alpha%3D0.1'
    """
    return f"{root}table.html#{urlencode({name: value for name, value in values.items() if value is not None})}"


def page_of(row: Mapping[str, Any]) -> str:
    """Return where the page of a cell is, from the root of the site."""
    return f"{'victims' if row['kind'] == 'victim' else 'cells'}/{row['key']}.html"


def file_name(method: str) -> str:
    """Return a method's name as the name of a file, one for each method.

    >>> file_name("i_bau"), file_name("../a b")
    ('i_bau', '-002e-002e-002fa-0020b')
    """
    return re.sub(r"[^A-Za-z0-9_]", lambda found: f"-{ord(found[0]):04x}", method) or "-"
