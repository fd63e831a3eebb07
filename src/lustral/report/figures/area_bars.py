"""Mask areas as bars on a logarithmic axis, in positions in percent: how small a pattern reaches each class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lustral.report.words import percent, pixels, quoted, quoted_list
from lustral.vision.measures import MASK_AREA, SEARCH_STEPS, SUCCESS_RATE
from lustral.vision.records import Verdict

NUM_BARS_SHOWN = 15  # of more than MAX_BARS classes, the rest is folded away
MAX_BARS = 25
SMALLEST_AREA = 0.1  # pixels; smaller areas are drawn as this one


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: its name, a text behind it, its length in percent, and how to paint it."""

    name: str
    text: str
    length: float
    is_suspect: bool
    is_open: bool = False


@dataclass(frozen=True, kw_only=True)
class BarChart:
    """Horizontal bars on a logarithmic axis.

    Attributes:
        bars: those shown.
        folded: those folded away.
        ticks: (position in percent, text) along the axis.
        median: position of the typical class in percent, or None.
        description: the chart in a sentence, for those who cannot see it.
    """

    bars: tuple[Bar, ...]
    folded: tuple[Bar, ...]
    ticks: tuple[tuple[float, str], ...]
    median: float | None
    description: str


def is_found(area: float) -> bool:
    """Return whether a search succeeded: its area is a number."""
    return math.isfinite(area)


def median_area(verdict: Verdict) -> float:
    """Return the median mask area of the labels that are not suspected; NaN of none.

    Failed searches count as infinite; those that screening cut short do not count.
    """
    steps = verdict.by_label(SEARCH_STEPS)
    full = max(steps.values(), default=0.0)
    areas = sorted(
        area if is_found(area) else math.inf
        for label, area in verdict.by_label(MASK_AREA).items()
        if label not in verdict.suspect_labels and steps.get(label, full) == full
    )
    if not areas:
        return math.nan
    middle = len(areas) // 2
    return areas[middle] if len(areas) % 2 else (areas[middle - 1] + areas[middle]) / 2


@dataclass(frozen=True)
class LogScale:
    """Maps areas to percent of an axis that runs over whole powers of ten."""

    low: int
    high: int

    @classmethod
    def over(cls, values: Sequence[float]) -> LogScale:
        """Return the axis that holds all finite values."""
        finite = [max(value, SMALLEST_AREA) for value in values if is_found(value)] or [1.0]
        low = math.floor(math.log10(min(finite)) - 0.05)  # leaves the smallest bar a visible length
        return cls(low, max(low + 1, math.ceil(math.log10(max(finite)))))

    def position(self, value: float) -> float:
        """Return where a value lies, in percent; failed searches (infinite, NaN) lie at the end."""
        if not is_found(value):
            return 100.0
        exponent = math.log10(max(value, SMALLEST_AREA))
        return round(min(100.0, max(0.0, 100 * (exponent - self.low) / (self.high - self.low))), 2)

    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Return the powers of ten and their texts."""
        return tuple((self.position(10.0**e), f"{10.0**e:,g}") for e in range(self.low, self.high + 1))


def area_chart(verdict: Verdict, names: Sequence[str]) -> BarChart | None:
    """Return the pixels that each class needs, smallest first; None of a detector that measures no mask areas."""
    areas, suspects = verdict.by_label(MASK_AREA), verdict.suspect_labels
    if not areas:
        return None
    success, steps = verdict.by_label(SUCCESS_RATE), verdict.by_label(SEARCH_STEPS)
    ordered = sorted(areas, key=lambda label: areas[label] if is_found(areas[label]) else math.inf)
    scale = LogScale.over(list(areas.values()))
    full = max(steps.values(), default=0.0)
    stopped = {label for label, taken in steps.items() if taken < full}
    bars = tuple(
        Bar(
            name=names[label],
            text=f"under {pixels(areas[label])}"
            if label in stopped and is_found(areas[label])  # more steps would still have shrunk the mask
            else _bar_text(areas[label], success.get(label)),
            length=scale.position(areas[label]),
            is_suspect=label in suspects,
            is_open=not is_found(areas[label]) or label in stopped,
        )
        for label in ordered
    )
    shown = len(bars) if len(bars) <= MAX_BARS else NUM_BARS_SHOWN
    typical = median_area(verdict)
    least = ordered[0]
    return BarChart(
        bars=bars[:shown],
        folded=bars[shown:],
        ticks=scale.ticks(),
        median=scale.position(typical) if is_found(typical) else None,
        description=f"Bar chart of the pixels needed to reach each of {len(areas)} classes. Smallest: "
        f"{quoted(names[least])} with {pixels(areas[least])}. "
        f"Flagged: {quoted_list([names[label] for label in suspects])}.",
    )


def audit_chart(before: Verdict | None, after: Verdict, names: Sequence[str], labels: Sequence[int]) -> BarChart | None:
    """Return the pixels that given classes needed before erasing and in the audit after; None without mask areas."""
    scans = [(when, scan) for when, scan in (("before", before), ("after", after)) if scan is not None]
    found = {when: (scan.by_label(MASK_AREA), scan.by_label(SUCCESS_RATE)) for when, scan in scans}
    rows = [(label, when) for label in labels for when in found if label in found[when][0]]
    if not after.by_label(MASK_AREA) or not rows:
        return None
    scale = LogScale.over([found[when][0][label] for label, when in rows])
    return BarChart(
        bars=tuple(
            Bar(
                name=f"{names[label]} · {when}",
                text=_bar_text(found[when][0][label], found[when][1].get(label)),
                length=scale.position(found[when][0][label]),
                is_suspect=when == "before" or label in after.suspect_labels,
                is_open=not is_found(found[when][0][label]),
            )
            for label, when in rows
        ),
        folded=(),
        ticks=scale.ticks(),
        median=None,
        description="Bar chart of the pixels needed before and after erasing.",
    )


def _bar_text(area: float, success: float | None) -> str:
    return f"{pixels(area)} · ASR {percent(success, 0)}" if is_found(area) else pixels(area)
