"""The table of a store's generators of molecules, and of the defences that met them: means over seeds. Imports no torch."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lustral.core.settings import shortened
from lustral.store.store import Kind, Store, StoreError
from lustral.store.waste import age_of

KINDS: tuple[Kind, ...] = ("generators", "pair_siftings", "generator_scans", "generator_erasures")
FIGURES = {  # column: path in an evaluation
    "asr": ("attack_success",),
    "base_rate": ("base_rate",),
    "validity": ("quality", "validity"),
    "similarity": ("quality", "similarity"),
    "shuffled_similarity": ("shuffled_similarity",),
    "novelty": ("quality", "novelty"),
    "diversity": ("quality", "diversity"),
    "frechet": ("quality", "frechet"),
}
HEADINGS = {  # of the columns, in a terminal
    "asr": "ASR",
    "base_rate": "base",
    "validity": "valid",
    "similarity": "similar",
    "shuffled_similarity": "shuffled",
    "novelty": "novel",
    "diversity": "diverse",
    "frechet": "FCD",
}
IDENTITY = ("kind", "data", "attack", "poison_rate", "defence")


@dataclass(frozen=True, kw_only=True)
class GeneratorRow:
    """A generator, or a defence that met it, over its seeds.

    Attributes:
        about: by the names in ``IDENTITY``; the defence is "none" for a generator as it was trained.
        cells: how many there are.
        means: by the names in ``FIGURES``; of an erasure after it; None where nothing was measured.
        spreads: standard deviations over the cells; None of fewer than two.
        told: what siftings and scans said, in words.
        seconds: mean time.
    """

    about: Mapping[str, Any]
    cells: int
    means: Mapping[str, float | None] = field(default_factory=dict)
    spreads: Mapping[str, float | None] = field(default_factory=dict)
    told: str = ""
    seconds: float = math.nan

    @property
    def is_measured(self) -> bool:
        """Whether it is a generator, as trained or repaired, and no sifting or scan."""
        return self.about["kind"] in ("generator", "generator_erasure")


def generator_rows(store: Store) -> tuple[list[GeneratorRow], int]:
    """Return the rows of today's versions, and how many cells of older ones are left out.

    Raises:
        StoreError: a record cannot be read.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    old = 0
    for kind in KINDS:
        for record in store.records(kind):
            try:
                if age_of(record["spec"]) is not None:
                    old += 1
                    continue
                facts = record["facts"]
                about = (
                    record["kind"],
                    facts["data"],
                    facts["attack"],
                    facts["poison_rate"],
                    facts.get("defence", "none"),
                )
                groups.setdefault(about, []).append(record)
            except (KeyError, TypeError, AttributeError) as error:
                raise StoreError(f"{kind}: a record is not readable ({shortened(error)})") from error
    order = {kind.removesuffix("s"): place for place, kind in enumerate(KINDS)}
    ranked = sorted(groups, key=lambda about: (order[about[0]], str(about[1]), about[2], about[3] or 0.0, about[4]))
    return [_row(about, groups[about]) for about in ranked], old


def _row(about: Sequence[Any], records: Sequence[Mapping[str, Any]]) -> GeneratorRow:
    measured = [
        record["metrics"].get("generator_after") or record["metrics"].get("generator") or {} for record in records
    ]
    figures = {name: [_figure(each, path) for each in measured] for name, path in FIGURES.items()}
    return GeneratorRow(
        about=dict(zip(IDENTITY, about, strict=True)),
        cells=len(records),
        means={name: mean(values) for name, values in figures.items()},
        spreads={name: spread(values) for name, values in figures.items()},
        told=_told(about[0], [record["metrics"] for record in records]),
        seconds=statistics.fmean(float(record["cost"]["seconds"]) for record in records),
    )


def _figure(evaluation: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = evaluation
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("value")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of what was measured; None of nothing.

    >>> mean([1.0, None, 2.0]), mean([None])
    (1.5, None)
    """
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def spread(values: Iterable[float | None]) -> float | None:
    """Return the standard deviation of what was measured; None of fewer than two."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _told(kind: str, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Return what siftings and scans said of their generators."""
    if kind not in ("pair_sifting", "generator_scan"):
        return ""
    found = [each[kind] for each in metrics]
    words = []
    if kind == "generator_scan":
        words += [f"{outcome} {times}" for outcome, times in Counter(each["outcome"] for each in found).most_common()]
    else:
        listed, planted, both = (sum(each[name] for each in found) for name in ("listed", "planted", "planted_listed"))
        words += [
            f"alarms {sum(each['found'] > 0 for each in found)}",
            f"{both} of {planted} planted and {listed - both} others listed",
        ]
    words.append(f"target named {sum(each['named'] is not None for each in found)}")
    words.append(f"fires {sum(bool(each['fires']) for each in found)}")
    return ", ".join(words) + f" of {len(found)}"
