"""Scores of images as bars, in positions in percent, with the line between listed and other images. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lustral.report.words import count

NUM_BINS = 48
TAIL = 12.0  # times the spread of the middle half above the median, from where scores share the last bar
MOST_TICKS = 6


@dataclass(frozen=True, kw_only=True)
class ScoreBar:
    """A bar: its place and width, the heights of all images and of the listed ones, in percent; and what it stands for."""

    left: float
    width: float
    height: float
    listed: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """How many images have which score.

    Attributes:
        bars: from left to right; heights on a logarithmic axis, so that a few listed images show beside thousands.
        line: position of the threshold, or None where it is not within the chart.
        x_ticks: (position in percent, text).
        y_ticks: (position from the top in percent, text).
        beyond: how many images the last bar holds that lie beyond the axis.
        description: the chart in a sentence.
    """

    bars: tuple[ScoreBar, ...]
    line: float | None
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    beyond: int
    description: str


def histogram(scores: Sequence[float], flagged: Sequence[bool], threshold: float) -> Histogram:
    """Count images by their score.

    Args:
        scores: finite numbers, one per image, at least one.
        flagged: whether each is listed.
        threshold: the score from which images are listed; need not be finite.
    """
    ordered = sorted(scores)
    low, high = ordered[0], ordered[-1]
    middle, spread = _at(ordered, 0.5), _at(ordered, 0.75) - _at(ordered, 0.25)
    if spread > 0:
        low, high = max(low, middle - TAIL * spread), min(high, middle + TAIL * spread)
    if math.isfinite(threshold) and ordered[0] <= threshold <= ordered[-1]:
        low, high = min(low, threshold), max(high, threshold + 0.3 * (threshold - middle))
    high = min(high, ordered[-1])
    width = (high - low) / NUM_BINS or 1.0
    all_counts, listed_counts = [0] * NUM_BINS, [0] * NUM_BINS
    for score, is_listed in zip(scores, flagged, strict=True):
        place = min(max(int((score - low) / width), 0), NUM_BINS - 1)
        all_counts[place] += 1
        listed_counts[place] += is_listed
    top = max(math.ceil(math.log10(max(all_counts) + 1)), 1)

    def height(number: int) -> float:
        return round(100 * math.log10(number + 1) / top, 2)

    bars = tuple(
        ScoreBar(
            left=round(100 * place / NUM_BINS, 3),
            width=round(100 / NUM_BINS, 3),
            height=height(number),
            listed=height(number) if chosen == number else round(height(number) * chosen / number, 2),
            text=f"{low + place * width:.4g} to {low + (place + 1) * width:.4g}: {count(number)} images, {count(chosen)} listed",
        )
        for place, (number, chosen) in enumerate(zip(all_counts, listed_counts, strict=True))
        if number
    )
    line = 100 * (threshold - low) / (width * NUM_BINS) if math.isfinite(threshold) else None
    return Histogram(
        bars=bars,
        line=round(line, 2) if line is not None and 0 <= line <= 100 else None,
        x_ticks=tuple(
            (round(100 * i / (MOST_TICKS - 1), 2), f"{low + i * width * NUM_BINS / (MOST_TICKS - 1):.3g}")
            for i in range(MOST_TICKS)
        ),
        y_ticks=tuple((round(100 - height(10**i), 2), count(10**i)) for i in range(top + 1) if height(10**i) <= 100),
        beyond=sum(score > high for score in scores),
        description=f"{count(len(scores))} images by their score, {count(sum(flagged))} of them listed.",
    )


def _at(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]
