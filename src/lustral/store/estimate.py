"""How long the rest of a plan may take, judged by what like cells took. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from lustral.core.settings import shortened
from lustral.store.former import is_former
from lustral.store.store import CELLS, Kind, Store, StoreError
from lustral.store.waste import UNREADABLE


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long the rest of a plan may take.

    Attributes:
        done: cells in the store.
        failed: cells that failed before.
        left: cells to do.
        seconds: estimate for those with a precedent.
        unknown: cells without any precedent in the store, not in ``seconds``.
    """

    done: int
    failed: int
    left: int
    seconds: float
    unknown: int


class Planned(Protocol):
    """A cell of a plan."""

    @property
    def kind(self) -> Kind:
        """The folder of its record."""

    @property
    def key(self) -> str:
        """Its name in a store."""

    @property
    def columns(self) -> Mapping[str, Any]:
        """What tables group by."""


def estimate(cells: Iterable[Planned], store: Store | None) -> tuple[Estimate, dict[str, str]]:
    """Return an estimate from past costs, and the state of each cell by key: "done", "failed" or "to do".

    A cell is expected to take as long as the median of those most like it: same method, data and architecture; else the same
    data and architecture; else the same method.
    """
    past: dict[tuple[Any, ...], list[float]] = {}
    states: dict[str, str] = {}
    if store is not None:
        for kind in CELLS:
            for record in store.records(kind, check=False):
                if is_former(record):
                    continue
                try:
                    states[record["key"]] = "done"
                    for likeness in _likenesses(kind, record["facts"]):
                        past.setdefault(likeness, []).append(float(record["made"]["seconds"]))
                except UNREADABLE as error:
                    raise StoreError(f"{kind}: a record is not readable ({shortened(error)})") from error
        for key in store.keys("failures"):
            states.setdefault(key, "failed")
    seconds, unknown, of_plan = 0.0, 0, {}
    for cell in cells:
        of_plan[cell.key] = states.get(cell.key, "to do")
        if of_plan[cell.key] == "to do":
            precedent = next(
                (past[likeness] for likeness in _likenesses(cell.kind, cell.columns) if likeness in past), None
            )
            if precedent is None:
                unknown += 1
            else:
                seconds += sorted(precedent)[len(precedent) // 2]
    counts = {state: list(of_plan.values()).count(state) for state in ("done", "failed", "to do")}
    whole = Estimate(
        done=counts["done"], failed=counts["failed"], left=counts["to do"], seconds=seconds, unknown=unknown
    )
    return whole, of_plan


def _likenesses(kind: Kind, columns: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Return what a cell has in common with others, the closest first."""
    place = (columns["data"], columns["arch"])
    method = columns.get("defence_method", columns["attack_method"])
    return [(kind, method, *place), (kind, "", *place), (kind, method)]
