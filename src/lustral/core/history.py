"""How a model came about, entry by entry: what was counted, where it started over, and what was measured. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Unit = Literal["epoch", "channels", "passes"]
Part = Literal["stage", "round", "neuron_ratio", "damping", "rate_divisor", "share"]
FORMER_NAMES = {"slowed": "rate_divisor", "u": "threshold"}  # in stored records of earlier versions
UNIT_WORDS: dict[Unit, str] = {"epoch": "epoch {}", "channels": "{} cut", "passes": "{} passes"}
PART_WORDS: dict[Part, str] = {
    "stage": "stage {:g}",
    "round": "round {:g}",
    "neuron_ratio": "{:.0%} of neurons reset",
    "damping": "damping {:g}",
    "rate_divisor": "rate / {:g}",
    "share": "{:.0%} of the way from the given weights",
}
MISSING = "–"


@dataclass(frozen=True)
class Figure:
    """What a measured number of an entry is called, and how it is printed.

    Attributes:
        words: its name for a reader.
        is_share: whether it is a fraction in [0, 1], printed in percent.
    """

    words: str
    is_share: bool = False

    def text(self, value: float | None) -> str:
        """Return a value as text.

        >>> Figure("loss").text(0.123456), Figure("accuracy", is_share=True).text(0.9834), Figure("loss").text(None)
        ('0.1235', '98.3%', '–')
        """
        if value is None or math.isnan(value):
            return MISSING
        if self.is_share:
            return f"{100 * value:.1f}%"
        return f"{value:,.0f}" if 10_000 <= abs(value) < math.inf else f"{value:.4g}"


FIGURES: dict[str, Figure] = {
    "loss": Figure("loss"),
    "clean_accuracy": Figure("clean accuracy (held-out)", is_share=True),
    "recovered_asr": Figure("recovered trigger works", is_share=True),
    "natural_rate": Figure("called the target without a trigger", is_share=True),
    "suspects_called": Figure("suspicious images called by their labels", is_share=True),
    "area": Figure("pixels needed"),
    "threshold": Figure("threshold u"),
    "reconstruction_error": Figure("mean squared error of the reconstruction"),
    "images_per_second": Figure("images per second"),
}
"""The measured figures of an entry, by the name of its field; no other place knows their words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryEntry:
    """One measurement of a model on its way.

    Attributes:
        count: how many epochs, cut channels or passes there were so far; 0 is the model as it was given.
        unit: what is counted.
        parts: where counting starts over: (name, value) of the round, the share of neurons reset, the divisor of the rate.
        loss: mean objective of the epoch.
        clean_accuracy: on held-out clean images, fraction.
        recovered_asr: how often the recovered triggers fire on them, fraction, of the worst one.
        natural_rate: how often images without a trigger are called its label, fraction, of the worst one.
        suspects_called: how often images of the training set that were found poisoned are called by their labels, fraction.
        area: pixels that a fresh search needed.
        threshold: the u above which channels were cut.
        reconstruction_error: mean squared error of a decoder's images, per element on the [0, 1] scale.
        images_per_second: training rate.
    """

    count: int
    unit: Unit = "epoch"
    parts: tuple[tuple[Part, float], ...] = ()
    loss: float | None = None
    clean_accuracy: float | None = None
    recovered_asr: float | None = None
    natural_rate: float | None = None
    suspects_called: float | None = None
    area: float | None = None
    threshold: float | None = None
    reconstruction_error: float | None = None
    images_per_second: float | None = None

    @property
    def is_given(self) -> bool:
        """Whether it is of the model as it was given."""
        return self.count == 0

    @property
    def counted(self) -> str:
        """The count in words, e.g. "epoch 3"."""
        return UNIT_WORDS[self.unit].format(self.count)

    def value(self, figure: str) -> float | None:
        """Return a figure by its name in ``FIGURES``; None where it was not measured."""
        found: float | None = getattr(self, figure)
        return found

    def to_dict(self) -> dict[str, float]:
        """Return the entry as plain data for JSON, without what was not measured.

        >>> HistoryEntry(count=2, parts=(("round", 1),), clean_accuracy=0.9).to_dict()
        {'round': 1, 'epoch': 2, 'clean_accuracy': 0.9}
        """
        measured = {name: value for name in FIGURES if (value := self.value(name)) is not None}
        return {**dict(self.parts), self.unit: self.count, **measured}

    @staticmethod
    def from_dict(record: object) -> HistoryEntry:
        """Read what ``to_dict`` wrote; the record may be anyone's.

        Raises:
            ValueError: it is something else; the message says what.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"expected an entry of a history to be a table of numbers; got {type(record).__name__}")
        fields = {FORMER_NAMES.get(str(name), str(name)): value for name, value in record.items()}
        units: list[Unit] = [unit for unit in get_args(Unit) if unit in fields]
        if len(units) != 1:
            raise ValueError(f"expected an entry to count one of {', '.join(get_args(Unit))}; it counts {len(units)}")
        count = fields.pop(units[0])
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"expected the {units[0]} of an entry to be a whole number from 0; got {_shown(count)}")
        if strangers := [name for name in fields if name not in FIGURES and name not in get_args(Part)]:
            raise ValueError(f"unknown field {_shown(strangers[0])} in an entry of a history")
        for name, value in fields.items():
            if isinstance(value, bool) or (
                not isinstance(value, int | float) and (value is not None or name in PART_WORDS)
            ):
                raise ValueError(f"expected {name} of an entry to be a number; got {_shown(value)}")
        parts: tuple[tuple[Part, float], ...] = tuple((part, fields[part]) for part in get_args(Part) if part in fields)
        figures: dict[str, Any] = {name: fields[name] for name in FIGURES if name in fields}
        return HistoryEntry(count=count, unit=units[0], parts=parts, **figures)


def _shown(value: object) -> str:
    return repr(value)[:40]


def read_history(records: object) -> tuple[list[HistoryEntry], list[str]]:
    """Read a history of anyone's record.

    Returns:
        (entries, problems): what can be read up to the first damaged entry, and a sentence for it. Leaving entries out of the
        middle would move the one that was kept.
    """
    if records is None:
        return [], []
    if not isinstance(records, Sequence) or isinstance(records, str):
        return [], [f"The history cannot be read: expected a list; got {type(records).__name__}."]
    entries: list[HistoryEntry] = []
    for record in records:
        try:
            entries.append(HistoryEntry.from_dict(record))
        except ValueError as error:
            return entries, [f"The history cannot be read from entry {len(entries) + 1} on: {error}."]
    return entries, []


def part_texts(history: Sequence[HistoryEntry]) -> list[str]:
    """Return what part each entry belongs to, in words: of the parts that differ within the history.

    >>> part_texts([HistoryEntry(count=1, parts=(("round", n), ("rate_divisor", 4))) for n in (1, 2)])
    ['round 1', 'round 2']
    """
    all_parts = [dict(entry.parts) for entry in history]
    differing = [part for part in PART_WORDS if len({parts.get(part) for parts in all_parts}) > 1]
    return [
        ", ".join(PART_WORDS[part].format(parts[part]) for part in differing if part in parts) for parts in all_parts
    ]


def measured_figures(history: Sequence[HistoryEntry]) -> list[str]:
    """Return the names of the figures that any entry has."""
    return [name for name in FIGURES if any(entry.value(name) is not None for entry in history)]


def history_table(history: Sequence[HistoryEntry]) -> tuple[list[str], list[list[str]]]:
    """Return (names of columns, rows of texts); nothing of nothing."""
    if not history:
        return [], []
    figures, parts = measured_figures(history), part_texts(history)
    has_parts = any(parts)
    columns = [*(["part"] if has_parts else []), "at", *(FIGURES[name].words for name in figures)]
    rows = [
        [
            *([part or MISSING] if has_parts else []),
            entry.counted,
            *(FIGURES[name].text(entry.value(name)) for name in figures),
        ]
        for entry, part in zip(history, parts, strict=True)
    ]
    return columns, rows
