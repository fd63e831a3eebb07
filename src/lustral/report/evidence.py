"""The figures that a verdict rests on, as a table: whatever the detector measured, one row per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lustral.report.words import chance, measured, words_of
from lustral.vision.measures import MASK_AREA, SEARCH_STEPS
from lustral.vision.records import Verdict

WHOLE_MODEL = "whole model"
CHANCE = "Chance if benign"
CHANCE_MEANING = (
    "Probability that a model without backdoor shows so extreme a value, corrected for everything that was tested."
)


@dataclass(frozen=True, kw_only=True)
class EvidenceColumn:
    """One column: its heading, the one for a terminal (empty: not shown there), and what it means."""

    heading: str
    short: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class EvidenceRow:
    """One class, or the whole model where ``label`` is None: its texts, one for each column."""

    label: int | None
    name: str
    texts: tuple[str, ...]
    is_suspect: bool


@dataclass(frozen=True, kw_only=True)
class EvidenceTable:
    """Columns, and rows with the most suspicious first."""

    columns: tuple[EvidenceColumn, ...]
    rows: tuple[EvidenceRow, ...]


def evidence_table(verdict: Verdict, names: Sequence[str]) -> EvidenceTable | None:
    """Return everything that a detector measured; None where that is nothing.

    Suspects come first, then what is least likely in a benign model, then what needs the smallest mask.
    """
    if not verdict.evidence:
        return None
    measures = list(dict.fromkeys(entry.measure for entry in verdict.evidence))
    values: dict[int | None, dict[str, float]] = {}
    chances: dict[tuple[int | None, str], float] = {}
    for entry in verdict.evidence:
        values.setdefault(entry.label, {})[entry.measure] = entry.value
        if entry.p_value is not None:
            chances[entry.label, entry.measure] = entry.p_value
    tested = [name for name in measures if any(measure == name for _, measure in chances)]
    full = max((found.get(SEARCH_STEPS, 0.0) for found in values.values()), default=0.0)

    def text(label: int | None, measure: str) -> str:
        found = values[label]
        stopped = measure == MASK_AREA and found.get(SEARCH_STEPS, full) < full  # more steps would have shrunk the mask
        return ("< " if stopped else "") + measured(measure, found.get(measure))

    def suspicion(label: int | None) -> tuple[bool, float, float]:
        least = min((chances.get((label, name), 1.0) for name in tested), default=1.0)
        return label not in verdict.suspect_labels, least, values[label].get(MASK_AREA, 0.0)

    columns = [EvidenceColumn(heading=w.heading, short=w.short, meaning=w.meaning) for w in map(words_of, measures)]
    for name in tested:
        of = "" if len(tested) == 1 else f" ({words_of(name).heading})"
        columns.append(EvidenceColumn(heading=CHANCE + of, short="chance" + of, meaning=CHANCE_MEANING))
    rows = [
        EvidenceRow(
            label=label,
            name=WHOLE_MODEL if label is None else names[label],
            texts=(
                *(text(label, name) for name in measures),
                *(chance(chances.get((label, name), float("nan"))) for name in tested),
            ),
            is_suspect=label in verdict.suspect_labels,
        )
        for label in sorted(values, key=suspicion)
    ]
    return EvidenceTable(columns=tuple(columns), rows=tuple(rows))
