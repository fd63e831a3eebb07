"""Numbers and findings in words, for an engineer who has to show them to someone else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lustral.vision.measures import ANOMALY_INDEX, ENTROPY, MASK_AREA, NATURAL_RATE, SEARCH_STEPS, SUCCESS_RATE

MAX_NAMES = 4  # listed in a sentence before "and N more"
MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class MeasureWords:
    """How a measure of a detector is shown.

    Attributes:
        heading: of its column.
        short: of its column in a terminal; empty to leave the column out there.
        meaning: in a sentence.
        unit: what its values are.
    """

    heading: str
    short: str
    meaning: str
    unit: Literal["pixels", "share", "count", "number"]


MEASURES: Mapping[str, MeasureWords] = {
    MASK_AREA: MeasureWords(
        heading="Pixels needed",
        short="area",
        meaning="Pixels that must be covered to send images of other classes to this class.",
        unit="pixels",
    ),
    SUCCESS_RATE: MeasureWords(
        heading="ASR", short="ASR", meaning="Share of held-out images that the pattern sends there.", unit="share"
    ),
    NATURAL_RATE: MeasureWords(
        heading="Natural rate",
        short="without trigger",
        meaning="Share of the same images that the model assigns to this class without any pattern.",
        unit="share",
    ),
    ANOMALY_INDEX: MeasureWords(
        heading="Distance below the rest",
        short="anomaly",
        meaning="How far the class lies below the others on the logarithmic scale, in robust standard deviations.",
        unit="number",
    ),
    ENTROPY: MeasureWords(
        heading="Variety",
        short="",
        meaning="Mean distance between recovered samples, in pixels of full contrast; 0 means a single pattern.",
        unit="number",
    ),
    SEARCH_STEPS: MeasureWords(
        heading="Search steps",
        short="steps",
        meaning="Steps of the search before it set the class aside.",
        unit="count",
    ),
}


def words_of(measure: str) -> MeasureWords:
    """Return how a measure is shown; one that is not listed by its name.

    >>> words_of("mask_area").short, words_of("activation_gap").heading
    ('area', 'Activation gap')
    """
    name = measure.replace("_", " ")
    plain = MeasureWords(heading=name[:1].upper() + name[1:], short=name, meaning="", unit="number")
    return MEASURES.get(measure, plain)


def measured(measure: str, value: float | None) -> str:
    """Return a value of a measure as text.

    >>> measured("mask_area", 6.12), measured("success_rate", 0.983), measured("search_steps", 200.0)
    ('6.1 px', '98.3%', '200')
    >>> measured("activation_gap", 12345.6), measured("activation_gap", float("inf")), measured("entropy", None)
    ('12,346', 'without end', '–')
    """
    if value is None or math.isnan(value):
        return MISSING
    unit = words_of(measure).unit
    if unit == "pixels":
        return pixels(value)
    if not math.isfinite(value):
        return "without end"
    if unit == "share":
        return percent(value)
    if unit == "count":
        return f"{value:,.0f}"
    return (
        f"{value:,.0f}"
        if abs(value) >= 10_000
        else number(value)
        if abs(value) >= 0.01 or not value
        else f"{value:.2g}"
    )


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
    return MISSING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


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
