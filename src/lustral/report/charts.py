"""Charts as positions in percent, so that the page can draw them as SVG of any width that follows its colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lustral.core.history import FIGURES, HistoryEntry, part_texts
from lustral.report.wording import percent, pixels, quoted, quoted_list
from lustral.vision.measures import MASK_AREA, SEARCH_STEPS, SUCCESS_RATE
from lustral.vision.records import Verdict

NUM_BARS_SHOWN = 15  # of more than MAX_BARS classes, the rest is folded away
MAX_BARS = 25
SMALLEST_AREA = 0.1  # pixels; smaller areas are drawn as this one
MAX_X_LABELS = 6


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


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: its name, style, and two SVG paths in a 100 × 100 box, for the strokes and for the points."""

    name: str
    style: str
    strokes: str
    points: str


@dataclass(frozen=True, kw_only=True)
class LineChart:
    """Lines over the entries of a history.

    Attributes:
        title: what the axis measures.
        lines: the lines.
        y_ticks: (position from the top in percent, text).
        x_ticks: (position in percent, text).
        rounds: (position in percent, text) where a new round starts.
        selected: position of the entry that was kept, or None.
        description: the chart in a sentence.
    """

    title: str
    lines: tuple[Line, ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    rounds: tuple[tuple[float, str], ...]
    selected: float | None
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
    stopped = {label: taken for label, taken in steps.items() if taken < full}
    bars = tuple(
        Bar(
            name=names[label],
            text=f"under {pixels(areas[label])} · set aside at step {stopped[label]:.0f}"
            if label in stopped  # more steps would still have shrunk the mask
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


def rate_chart(history: Sequence[HistoryEntry], selected: int | None) -> LineChart | None:
    """Return accuracy on clean images and success of the recovered trigger over a history; None if neither is there."""
    return _line_chart(
        "share of held-out images",
        history,
        selected,
        {"clean_accuracy": "good", "recovered_asr": "bad"},
        lambda value: 100 * (1 - value),
        tuple((100.0 - share, f"{share}%") for share in (0, 25, 50, 75, 100)),
    )


def area_history_chart(history: Sequence[HistoryEntry], selected: int | None) -> LineChart | None:
    """Return the recovered trigger's area over a history, on a logarithmic axis; None if it was not recorded."""
    values = [value for entry in history if (value := _number(entry.area)) is not None]
    scale = LogScale.over(values)
    return _line_chart(
        FIGURES["area"].words,
        history,
        selected,
        {"area": "accent"},
        lambda value: 100 - scale.position(value),
        tuple((100 - position, text) for position, text in scale.ticks()),
    )


def _line_chart(
    title: str,
    history: Sequence[HistoryEntry],
    selected: int | None,
    styles: Mapping[str, str],
    to_y: Callable[[float], float],
    y_ticks: tuple[tuple[float, str], ...],
) -> LineChart | None:
    def to_x(index: float) -> float:
        return round(2 + 96 * index / (len(history) - 1), 2) if len(history) > 1 else 50.0

    lines, summaries = [], []
    for figure, style in styles.items():
        name, values = FIGURES[figure].words, [_number(entry.value(figure)) for entry in history]
        places = [None if v is None else (to_x(i), round(to_y(v), 2)) for i, v in enumerate(values)]
        known = [value for value in values if value is not None]
        if not known:
            continue
        strokes = " ".join(
            f"{'M' if i == 0 or places[i - 1] is None else 'L'}{place[0]} {place[1]}"
            for i, place in enumerate(places)
            if place is not None
        )
        points = " ".join(f"M{place[0]} {place[1]}h0" for place in places if place is not None)
        lines.append(Line(name=name, style=style, strokes=strokes, points=points))
        summaries.append(f"{name} from {known[0]:.4g} to {known[-1]:.4g}")
    if not lines:
        return None
    rounds = part_texts(history)
    stride = math.ceil(len(history) / MAX_X_LABELS)
    return LineChart(
        title=title,
        lines=tuple(lines),
        y_ticks=y_ticks,
        x_ticks=tuple((to_x(i), entry.counted) for i, entry in enumerate(history) if i % stride == 0),
        rounds=tuple(
            (to_x(i - 0.5) if i else 0.0, which)
            for i, which in enumerate(rounds)
            if which and (i == 0 or which != rounds[i - 1])
        ),
        selected=None if selected is None else to_x(selected),
        description=f"Line chart over {len(history)} measurements: {'; '.join(summaries)}.",
    )


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
