"""Proportions with their intervals. Hits are counted as integers and divided once; a rate over nothing is NaN, never 0 or 1.

Reference:
    Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z_95 = 1.96  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Rate:
    """A proportion that remembers its counts.

    Attributes:
        hits: number of successes.
        total: number of trials; 0 makes the value and the interval NaN.

    >>> Rate(9, 10).value, [round(bound, 3) for bound in Rate(9, 10).interval]
    (0.9, [0.596, 0.982])
    """

    hits: int
    total: int

    def __post_init__(self) -> None:
        """Check the counts."""
        if not 0 <= self.hits <= self.total:
            raise ValueError(f"expected 0 <= hits <= total; got {self.hits} hits of {self.total}")

    @property
    def value(self) -> float:
        """The proportion in [0, 1], or NaN of nothing."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson 95 % interval (low, high), or NaNs of nothing."""
        return wilson_interval(self.hits, self.total)

    def to_dict(self) -> dict[str, float | int | None]:
        """Return value, low, high, hits and n for JSON; a rate of nothing has None for the first three."""
        if not self.total:
            return {"value": None, "low": None, "high": None, "hits": 0, "n": 0}
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "hits": self.hits, "n": self.total}


def wilson_interval(hits: float, total: float, z: float = Z_95) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of a proportion, or two NaNs when ``total`` is 0.

    Counts may be fractions: those of dependent trials, divided by their design effect.

    The centre is (p + z²/2n) / (1 + z²/n), the half width z / (1 + z²/n) · √(p(1 − p)/n + z²/4n²).
    """
    if not total:
        return math.nan, math.nan
    share, unit = hits / total, z * z / total
    centre = (share + unit / 2) / (1 + unit)
    half = math.sqrt(unit * share * (1 - share) + unit * unit / 4) / (1 + unit)
    low = 0.0 if hits == 0 else max(0.0, centre - half)  # the formula gives exactly 0 and 1 there, rounding does not
    high = 1.0 if hits == total else min(1.0, centre + half)
    return low, high
