"""Cells, the pieces of work that a plan makes, and what every kind of cell says about itself.

A cell is named by the hash of its specification, in which every default is filled in. What it starts from is part of that
specification, whole, so the names of the cells that it needs follow from it. The kinds are in ``lustral.bench.kinds``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from lustral.core.records import OnProgress
from lustral.store.store import Kind, content_key

if TYPE_CHECKING:
    from lustral.bench.expansion import Expansion
    from lustral.bench.workbench import Workbench


class CellError(ValueError):
    """A cell cannot be done; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """A cell that another one starts from.

    Attributes:
        kind: as the store calls it.
        spec: its specification.
        file: a file that its record must have; None: the record is enough.
        key: its name in the store.
    """

    kind: Kind
    spec: Mapping[str, Any]
    file: str | None = None
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Work out the name."""
        object.__setattr__(self, "key", content_key(self.spec))

    @property
    def noun(self) -> str:
        """What one of its kind is called: "victim"."""
        return str(self.spec["kind"])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work.

    Attributes:
        kind: as the store calls it: "victims", "purifications", ...
        spec: everything that the outcome depends on; plain data.
        columns: what tables group by; "data", "attack" and "defence" are labels, and no part of the name.
        title: a line that says what it is.
        needs: the cells it starts from, the victim first.
        key: its name in the store.
    """

    kind: Kind
    spec: Mapping[str, Any]
    columns: Mapping[str, Any]
    title: str
    needs: tuple[Need, ...] = ()
    key: str = field(init=False)

    def __post_init__(self) -> None:
        """Work out the name."""
        object.__setattr__(self, "key", content_key(self.spec))

    @property
    def attack(self) -> str:
        """What tables call the attack."""
        return str(self.columns["attack"])

    @property
    def data(self) -> str:
        """What tables call the data set."""
        return str(self.columns["data"])

    @property
    def defence(self) -> str | None:
        """What tables call the defence; None for a victim."""
        label = self.columns.get("defence")
        return None if label is None else str(label)

    @property
    def victim_key(self) -> str | None:
        """The victim it needs; for a fine-tuned victim, the benign model it starts from."""
        return self.needs[0].key if self.needs else None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A finished cell, ready for the store.

    Attributes:
        record: plain data; what every record has (specification, columns, build) is added by the workbench.
        files: content by name.
    """

    record: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)


class CellKind(Protocol):
    """What a cell of one kind is: how a plan makes it, what it needs, how it is done and what tables show of it.

    Runners, checks, clean-ups, estimates and tables know nothing else about it.
    """

    @property
    def name(self) -> Kind:
        """The folder of its records in a store: "victims"."""

    @property
    def noun(self) -> str:
        """What its specifications call themselves: "victim"."""

    @property
    def title(self) -> str:
        """A line for one cell, with columns in braces: "{attack} on {data}, seed {seed}"."""

    @property
    def rates(self) -> tuple[str, ...]:
        """Which of its metrics are evaluations, in order; a model kept with the record measures like the last one."""

    def expand(self, expansion: Expansion) -> Iterator[Cell]:
        """Yield the cells of a plan, from the cells of the kinds before it; what it complains of refuses the plan."""

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the cells that one starts from, the victim first."""

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return what tables group by; labels that are not given are made from the specification."""

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Compute a cell whose needs are in the store.

        Raises:
            CellError: something that it needs is not in the store.
            Exception: whatever the method raises.
        """


def make_cell(
    kind: CellKind,
    spec: Mapping[str, Any],
    *,
    attack: str | None = None,
    defence: str | None = None,
    data: str | None = None,
) -> Cell:
    """Return the cell of a specification; labels that are not given are made from it."""
    columns = kind.columns(spec, attack=attack, defence=defence)
    if data is not None:
        columns["data"] = data
    return Cell(
        kind=kind.name, spec=spec, columns=columns, title=kind.title.format_map(columns), needs=kind.needs(spec)
    )
