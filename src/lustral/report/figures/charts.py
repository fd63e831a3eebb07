"""Curves of a history as positions in percent: pages draw them as SVG of any width that follows their colours.

Their markup and style are in ``curves.html.j2`` and ``curves.css`` of the templates. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from lustral.core.history import FIGURES, HistoryEntry, part_texts
from lustral.report.words import is_number

MOST_X_LABELS = 6
MOST_Y_LABELS = 5
LEAST_POINTS = 2  # of a line; a single number is in the table
LARGEST = 1e300  # of a number that is drawn: differences and powers of ten must stay finite
LOG_RATIO = 50.0  # positive values that span more than this are drawn on a logarithmic axis


@dataclass(frozen=True, slots=True)
class Line:
    """One line: its figure in ``FIGURES``, its name, and two SVG paths in a 100 x 100 box, for the strokes and for the dots."""

    figure: str
    name: str
    strokes: str
    dots: str


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over the entries of a history.

    Attributes:
        title: what the axis measures.
        lines: the lines; the style sheet tells them apart by their figures.
        grid: SVG path of the horizontal lines.
        y_ticks: (position from the top in percent, text).
        x_ticks: (position in percent, text).
        parts: (position, width up to the next, text) in percent of the parts of a history that starts over, in another round
            or at another rate.
        selected: position of the entry that was kept, or None.
        description: the chart in a sentence, for those who cannot see it.
    """

    title: str
    lines: tuple[Line, ...]
    grid: str
    y_ticks: tuple[tuple[float, str], ...]
    x_ticks: tuple[tuple[float, str], ...]
    parts: tuple[tuple[float, float, str], ...]
    selected: float | None
    description: str


def curves(
    history: Sequence[HistoryEntry], selected: int | None, figures: Collection[str] = FIGURES.keys()
) -> list[LineChart]:
    """Return the charts of a history: one for all shares, one for each other figure.

    Args:
        history: one entry per epoch or cut; what is no finite number leaves a gap.
        selected: index of the entry whose weights were kept.
        figures: names in ``FIGURES`` of those to draw; a figure measured once is no curve.
    """
    series = {name: values for name in FIGURES if name in figures and (values := _values(history, name)) is not None}
    shares = [name for name in series if FIGURES[name].is_share]
    groups = [("share of held-out images", shares)] if shares else []
    groups += [(FIGURES[name].words, [name]) for name in series if name not in shares]
    return [
        _chart(title, {name: series[name] for name in names}, history, selected, is_shares=names is shares)
        for title, names in groups
    ]


def _values(history: Sequence[HistoryEntry], name: str) -> list[float | None] | None:
    """Return a field's numbers with gaps, or None if they are too few for a line."""
    values = [_drawable(entry.value(name)) for entry in history]
    return values if sum(value is not None for value in values) >= LEAST_POINTS else None


def _drawable(value: float | None) -> float | None:
    """Return a number that an axis can be made for: none where there is none or an absurd one, 0 for one next to 0."""
    if not is_number(value) or abs(value) > LARGEST:
        return None
    return float(value) if abs(value) > 1 / LARGEST else 0.0


def _chart(
    title: str,
    series: Mapping[str, Sequence[float | None]],
    history: Sequence[HistoryEntry],
    selected: int | None,
    *,
    is_shares: bool,
) -> LineChart:
    return line_chart(
        title,
        {name: (FIGURES[name].words, values) for name, values in series.items()},
        [str(entry.count) if i else entry.counted for i, entry in enumerate(history)],
        parts=part_texts(history),
        selected=selected,
        is_shares=is_shares,
    )


def line_chart(
    title: str,
    series: Mapping[str, tuple[str, Sequence[float | None]]],
    x_texts: Sequence[str],
    *,
    parts: Sequence[str] = (),
    selected: int | None = None,
    is_shares: bool = False,
) -> LineChart:
    """Draw lines over evenly spaced places.

    Args:
        title: what the axis measures.
        series: for each name in the style sheet the name for a reader, and a number for each place; what is no drawable number
            leaves a gap. At least one number is drawable.
        x_texts: of the places; of many, every second or third is shown.
        parts: what part of the whole each place belongs to, or nothing.
        selected: index of the place that was kept.
        is_shares: whether the numbers are fractions, with an axis in percent.
    """
    drawn = {name: [_drawable(value) for value in values] for name, (_, values) in series.items()}
    known = [value for values in drawn.values() for value in values if value is not None]
    to_y, y_ticks = _percent_axis() if is_shares and min(known) >= 0 and max(known) <= 1 else _axis(known)
    count = len(x_texts)

    def to_x(index: float) -> float:
        return round(1 + 98 * index / (count - 1), 2) if count > 1 else 50.0

    lines, texts = [], []
    for name, values in drawn.items():
        places = [None if value is None else f"{to_x(i):g} {to_y(value):g}" for i, value in enumerate(values)]
        strokes = "".join(
            f"{'M' if i == 0 or places[i - 1] is None else 'L'}{place}" for i, place in enumerate(places) if place
        )
        dots = "".join(f"M{place}h0" for place in places if place)
        lines.append(Line(name, series[name][0], strokes, dots))
        present = [value for value in values if value is not None]
        if present:
            texts.append(f"{series[name][0]} from {present[0]:.4g} to {present[-1]:.4g}")
    stride = math.ceil(count / MOST_X_LABELS)
    return LineChart(
        title=title,
        lines=tuple(lines),
        grid="".join(f"M0 {y:g}H100" for y, _ in y_ticks),
        y_ticks=y_ticks,
        x_ticks=tuple((to_x(i), text) for i, text in enumerate(x_texts) if i % stride == 0),
        parts=_parts(parts, to_x),
        selected=to_x(selected) if selected is not None and 0 <= selected < count else None,
        description=f"Line chart over {count} measurements: {'; '.join(texts)}.",
    )


def _parts(texts: Sequence[str], to_x: Callable[[float], float]) -> tuple[tuple[float, float, str], ...]:
    """Return (position, width, text) of each part; none of a history without parts."""
    starts = [i for i, text in enumerate(texts) if i == 0 or text != texts[i - 1]]
    if not any(texts):
        return ()
    ends = [*(to_x(i - 0.5) for i in starts[1:]), 100.0]
    places = [to_x(i - 0.5) if i else 0.0 for i in starts]
    return tuple((x, round(end - x, 2), texts[i]) for i, x, end in zip(starts, places, ends, strict=True))


ToY = Callable[[float], float]
Ticks = tuple[tuple[float, str], ...]


def _percent_axis() -> tuple[ToY, Ticks]:
    return lambda value: round(100 - 100 * value, 2), tuple((100.0 - s, f"{s}%") for s in (0, 25, 50, 75, 100))


def _axis(values: Sequence[float]) -> tuple[ToY, Ticks]:
    """Return the axis that holds all values: logarithmic where they are positive and span orders of magnitude."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOG_RATIO:
        return _log_axis(low, high)
    step = _nice((high - low) / MOST_Y_LABELS or abs(high) / MOST_Y_LABELS or 1.0)
    bottom, top = math.floor(low / step), math.ceil(high / step)
    top += top == bottom

    def to_y(value: float) -> float:
        return round(100 * (top - value / step) / (top - bottom), 2)

    return to_y, tuple((to_y(mark * step), f"{round(mark * step, 10):,g}") for mark in range(bottom, top + 1))


def _log_axis(low: float, high: float) -> tuple[ToY, Ticks]:
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high))

    def to_y(value: float) -> float:
        return round(100 * (end - math.log10(value)) / (end - start), 2)

    marks = [10.0**power for power in range(start, end + 1, math.ceil((end - start) / MOST_Y_LABELS))]
    return to_y, tuple((to_y(mark), f"{mark:,g}") for mark in marks)


def _nice(rough: float) -> float:
    """Return the round number 1, 2 or 5 times a power of ten that is not below a positive one.

    >>> _nice(0.13), _nice(30), _nice(7)
    (0.2, 50.0, 10.0)
    """
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
