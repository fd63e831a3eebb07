"""Numbers in words for the pages of the site. Like ``lustral.report.wording``, which cannot be had without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlencode

MISSING = "–"
ABBREVIATIONS = ("acc", "asr", "ra", "der", "rir")


def is_number(value: object) -> bool:
    """Say whether a value is a finite number; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(share: float | None) -> str:
    """Return a fraction as percent.

    >>> percent(0.9834), percent(None)
    ('98.3%', '–')
    """
    return f"{100 * share:.1f}%" if share is not None and is_number(share) else MISSING


def points(change: float | None) -> str:
    """Return a difference of two fractions in percentage points, with its sign.

    >>> points(-0.0123), points(0.5), points(0.0), points(None)
    ('−1.2', '+50.0', '0.0', '–')
    """
    if change is None or not is_number(change):
        return MISSING
    rounded = round(100 * change, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.1f}"


def score(value: float | None) -> str:
    """Return a score with three decimals.

    >>> score(0.8731), score(math.nan)
    ('0.873', '–')
    """
    return f"{value:.3f}" if value is not None and is_number(value) else MISSING


def duration(seconds: float | None) -> str:
    """Return a time span.

    >>> duration(0.4312), duration(48.2), duration(75), duration(7300), duration(None)
    ('0.43 s', '48.2 s', '1 min 15 s', '2 h 1 min', '–')
    """
    if seconds is None or not is_number(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def memory(size: float | None) -> str:
    """Return a number of bytes.

    >>> memory(512 * 2**20), memory(3 * 2**30), memory(None)
    ('512 MiB', '3.0 GiB', '–')
    """
    if size is None or not is_number(size):
        return MISSING
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def count(number: float | None) -> str:
    """Return a count with separators.

    >>> count(156438.7), count(None)
    ('156,439', '–')
    """
    return f"{number:,.0f}" if number is not None and is_number(number) else MISSING


def plain(value: object) -> str:
    """Return any small value of a record as text.

    >>> plain(0.123456), plain(None), plain(True), plain([1, 2]), plain(1e-9), plain(12345.6)
    ('0.1235', '–', 'yes', '1, 2', '1e-09', '12,346')
    """
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value):
            return MISSING
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or "none"
    return str(value)


def is_share(name: str) -> bool:
    """Say whether a field of an evidence table holds fractions, by its name.

    >>> is_share("recovered_asr"), is_share("learning_rate"), is_share("loss")
    (True, False, False)
    """
    return name.endswith(("accuracy", "asr", "_acc", "success_rate", "natural_rate")) or name in ("acc", "ra")


def spaced(name: str) -> str:
    """Return the name of a field in words.

    >>> spaced("clean_accuracy"), spaced("recovered_asr")
    ('clean accuracy', 'recovered ASR')
    """
    return " ".join(word.upper() if word in ABBREVIATIONS else word for word in name.split("_"))


PRINTS: dict[str, Callable[[float | None], str]] = {
    "percent": percent,
    "points": points,
    "score": score,
    "seconds": duration,
    "passes": count,
    "bytes": memory,
}


def plus_minus(form: str, half: float | None) -> str:
    """Return half the width of an interval, or nothing.

    >>> plus_minus("percent", 0.0123), plus_minus("score", 0.01), plus_minus("seconds", 2.0), plus_minus("score", None)
    ('±1.2', '±0.010', '±2.0 s', '')
    """
    if half is None or not is_number(half):
        return ""
    return f"±{100 * half:.1f}" if form in ("percent", "points") else f"±{PRINTS[form](half)}"


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
