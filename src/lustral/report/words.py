"""Numbers, measures and names in words: what reports, the site and the command line call things. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from lustral.core.history import MISSING
from lustral.vision.measures import (
    ANOMALY_INDEX,
    CHANGE_ENERGY,
    ENTROPY,
    LATENT_NORM,
    MASK_AREA,
    NATURAL_RATE,
    REFERENCE_RANK,
    SEARCH_STEPS,
    SUCCESS_RATE,
)

MAX_NAMES = 4  # listed in a sentence before "and N more"
ABBREVIATIONS = ("acc", "asr", "ra", "der", "rir")
RATES = (  # of an evaluation: field, name, meaning
    ("acc", "Clean accuracy (ACC)", "test images classified correctly"),
    ("asr", "Attack success rate (ASR)", "triggered images that go to the attacker’s class"),
    ("ra", "Robust accuracy (RA)", "triggered images still recognised as what they show"),
    ("natural_rate", "Natural target rate", "the same images without trigger that go there anyway: the floor for ASR"),
)
SCORES = (  # of a comparison of two evaluations: key, name, meaning
    ("der", "Defence effectiveness (DER)", "0.5: nothing gained; 1: attack gone at no loss of accuracy"),
    ("rir", "Robust improvement (RIR)", "0.5: nothing gained; 1: triggered images fully recognised again"),
)


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
    CHANGE_ENERGY: MeasureWords(
        heading="Faintest change",
        short="energy",
        meaning="Energy of the faintest change of the whole image that sends other classes there, in pixels of full contrast.",
        unit="number",
    ),
    LATENT_NORM: MeasureWords(
        heading="Step in the last features",
        short="latent",
        meaning="Least step of the last layer’s inputs that sends most images there, over that of the median class.",
        unit="number",
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
    REFERENCE_RANK: MeasureWords(
        heading="Statistic among references",
        short="",
        meaning="Minus the logarithm (base 10) of the scan’s least p-value; its own p-value is its rank among benign models.",
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
    unlisted = MeasureWords(heading=name[:1].upper() + name[1:], short=name, meaning="", unit="number")
    return MEASURES.get(measure, unlisted)


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


def is_number(value: object) -> TypeGuard[float]:
    """Say whether a value is a finite number; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(share: float | None, digits: int = 1) -> str:
    """Return a fraction as percent; what is not quite all of it never reads as 100 %.

    >>> percent(0.9834), percent(0.9999), percent(1.0, 0), percent(None)
    ('98.3%', '>99.9%', '100%', '–')
    """
    if not is_number(share):
        return MISSING
    text = f"{100 * share:.{digits}f}%"
    if digits and share < 1 and text == f"{100:.{digits}f}%":
        return f">{100 - 10**-digits:.{digits}f}%"
    return text


def points(change: float | None, unit: str = "") -> str:
    """Return a difference of two fractions in percentage points, with its sign.

    >>> points(-0.0123), points(0.5, " points"), points(0.0), points(None)
    ('−1.2', '+50.0 points', '0.0', '–')
    """
    if not is_number(change):
        return MISSING
    rounded = round(100 * change, 1)
    return f"{'+' if rounded > 0 else '−' if rounded < 0 else ''}{abs(rounded):.1f}{unit}"


def number(value: float | None, digits: int = 2) -> str:
    """Return a number with fixed decimals.

    >>> number(5.417), number(float("nan"))
    ('5.42', '–')
    """
    return f"{value:.{digits}f}" if is_number(value) else MISSING


def score(value: float | None) -> str:
    """Return a score, as DER, with three decimals.

    >>> score(0.8731)
    '0.873'
    """
    return number(value, 3)


def duration(seconds: float | None) -> str:
    """Return a time span.

    >>> duration(0.4312), duration(48.2), duration(75), duration(7300), duration(None)
    ('0.43 s', '48.2 s', '1 min 15 s', '2 h 1 min', '–')
    """
    if not is_number(seconds):
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
    if not is_number(size):
        return MISSING
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def count(total: float | None) -> str:
    """Return a count with separators.

    >>> count(156438.7), count(None)
    ('156,439', '–')
    """
    return f"{total:,.0f}" if is_number(total) else MISSING


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
    if not is_number(half):
        return ""
    return f"±{100 * half:.1f}" if form in ("percent", "points") else f"±{PRINTS[form](half)}"


def pixels(area: float) -> str:
    """Return an area in pixels.

    >>> pixels(6.12), pixels(1234.5), pixels(float("inf"))
    ('6.1 px', '1,234 px', 'not reached')
    """
    if not math.isfinite(area):
        return "not reached"
    return f"{area:.1f} px" if area < 99.95 else f"{area:,.0f} px"


def chance(probability: float) -> str:
    """Return a probability as odds.

    >>> chance(0.0004), chance(1e-9), chance(0.3), chance(float("nan"))
    ('1 in 2,500', 'below 1 in a million', '30%', '–')
    """
    if math.isnan(probability):
        return MISSING
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
