"""The kinds of cells, one file each. Another kind is a file here, a line in ``KINDS``, and its folder's name in the store.

What needs others comes after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lustral.bench.cells import Cell, CellKind, make_cell
from lustral.bench.kinds.audits import Audits
from lustral.bench.kinds.generators import GeneratorErasures, Generators, GeneratorScans, PairSiftings
from lustral.bench.kinds.purifications import Purifications
from lustral.bench.kinds.scans import Scans
from lustral.bench.kinds.siftings import Siftings
from lustral.bench.kinds.trainings import Trainings
from lustral.bench.kinds.victims import Victims
from lustral.store.store import Kind

__all__ = [
    "KINDS",
    "Audits",
    "GeneratorErasures",
    "GeneratorScans",
    "Generators",
    "PairSiftings",
    "Purifications",
    "Scans",
    "Siftings",
    "Trainings",
    "Victims",
    "cell_of",
    "kind_of",
]

KINDS: dict[Kind, CellKind] = {
    "victims": Victims(),
    "scans": Scans(),
    "purifications": Purifications(),
    "siftings": Siftings(),
    "trainings": Trainings(),
    "audits": Audits(),
    "generators": Generators(),
    "pair_siftings": PairSiftings(),
    "generator_scans": GeneratorScans(),
    "generator_erasures": GeneratorErasures(),
}


def kind_of(spec: Mapping[str, Any]) -> CellKind:
    """Return the kind of a specification; raises ``KeyError`` where this version has no such kind."""
    for kind in KINDS.values():
        if kind.noun == spec["kind"]:
            return kind
    raise KeyError(f"no kind of cell {str(spec['kind'])[:40]!r}; there are {', '.join(KINDS)}")


def cell_of(
    spec: Mapping[str, Any], *, attack: str | None = None, defence: str | None = None, data: str | None = None
) -> Cell:
    """Return the cell of a specification; labels that are not given are made from it."""
    return make_cell(kind_of(spec), spec, attack=attack, defence=defence, data=data)
