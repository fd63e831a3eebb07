"""Numbers and findings in words, for an engineer who has to show them to someone else."""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_NAMES = 4  # listed in a sentence before "and N more"


def percent(share: float | None, digits: int = 1) -> str:
    """Return a fraction as percent; "n/a" for None or NaN.

    >>> percent(0.983), percent(0.9999), percent(1.0, 0), percent(None)
    ('98.3%', '>99.9%', '100%', 'n/a')
    """
    if share is None or math.isnan(share):
        return "n/a"
    text = f"{100 * share:.{digits}f}%"
    if digits and share < 1 and text == f"{100:.{digits}f}%":
        return f">{100 - 10**-digits:.{digits}f}%"
    return text


def points(change: float | None) -> str:
    """Return a difference of two fractions in percentage points, with its sign.

    >>> points(-0.0123), points(0.5), points(0.0)
    ('−1.2 points', '+50.0 points', '±0.0 points')
    """
    if change is None or math.isnan(change):
        return "n/a"
    rounded = round(100 * change, 1)
    sign = "+" if rounded > 0 else "−" if rounded < 0 else "±"
    return f"{sign}{abs(rounded):.1f} points"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed decimals; "–" for None, NaN and infinities.

    >>> number(5.417), number(float("nan"))
    ('5.42', '–')
    """
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def pixels(area: float) -> str:
    """Return an area in pixels.

    >>> pixels(6.12), pixels(1234.5), pixels(float("inf"))
    ('6.1 px', '1,234 px', 'not reached')
    """
    if not math.isfinite(area):
        return "not reached"
    return f"{area:.1f} px" if area < 99.95 else f"{area:,.0f} px"


def duration(seconds: float) -> str:
    """Return a time span.

    >>> duration(3.21), duration(75), duration(7300)
    ('3.2 s', '1 min 15 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(size: int) -> str:
    """Return a number of bytes.

    >>> memory(512 * 2**20), memory(3 * 2**30)
    ('512 MiB', '3.0 GiB')
    """
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def chance(probability: float) -> str:
    """Return a probability as odds.

    >>> chance(0.0004), chance(1e-9), chance(0.3), chance(float("nan"))
    ('1 in 2,500', 'below 1 in a million', '30%', 'n/a')
    """
    if math.isnan(probability):
        return "n/a"
    if probability < 1e-6:
        return "below 1 in a million"
    if probability >= 0.1:
        return percent(probability, 0)
    odds = 1 / probability
    return f"1 in {odds:,.0f}" if odds < 10_000 else f"1 in {round(odds, -3):,.0f}"


def quoted(name: str) -> str:
    """Return a class name in quotation marks."""
    return f"“{name}”"


def quoted_list(names: Sequence[str]) -> str:
    """Return names as a list in words.

    >>> quoted_list(["cat", "dog", "ship"]), quoted_list([])
    ('“cat”, “dog” and “ship”', 'none')
    """
    if not names:
        return "none"
    shown = [quoted(name) for name in names[:MAX_NAMES]]
    if len(names) > MAX_NAMES:
        shown.append(f"{len(names) - MAX_NAMES} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
