"""The cells of plans, in the order of work: joined, chosen by their columns, parted among machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lustral.bench.cells import Cell
from lustral.bench.plan import Plan, PlanError
from lustral.store.store import Kind


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells of a plan, each after those that it needs.

    Attributes:
        plan: the plan.
        cells: without repetition.
        excluded: number of cells left out, by reason; a victim counts once, for itself and all that needs it.
    """

    plan: Plan
    cells: tuple[Cell, ...]
    excluded: Mapping[str, int]

    @classmethod
    def joined(cls, grids: Sequence[Grid]) -> Grid:
        """Return the cells of several plans as one grid under all their names; what several have is in it once.

        Raises:
            PlanError: no grid, or plans that run cells differently ([run]); says which.
        """
        if not grids:
            raise PlanError("expected at least one plan")
        first, *others = (grid.plan for grid in grids)
        for other in others:
            if other.run != first.run:
                raise PlanError(
                    f"plans of one run need equal [run] tables; {first.name} has {first.run}, {other.name} has "
                    f"{other.run}: run them one after another"
                )
        excluded: dict[str, int] = {}
        for grid in grids:
            for reason, number in grid.excluded.items():
                excluded[reason] = excluded.get(reason, 0) + number
        cells = {cell.key: cell for grid in grids for cell in grid.cells}
        names = " + ".join(dict.fromkeys(grid.plan.name for grid in grids))
        return cls(
            plan=first if len(grids) == 1 else first.model_copy(update={"name": names}),
            cells=tuple(cells.values()),
            excluded=excluded,
        )

    def shard(self, index: int, count: int) -> Grid:
        """Return part ``index`` of ``count`` (from 0): victims in turn, each with all that starts from it, and what that needs.

        A benign model that audits of several parts need is in each of them; who claims it first makes it.
        """
        if not 0 <= index < count:
            raise PlanError(f"expected a shard I/N with 1 <= I <= N; got {index + 1}/{count}")
        roots: dict[str, str] = {}
        for cell in self.cells:
            roots[cell.key] = roots.get(cell.victim_key or "", cell.key)
        order = {root: number for number, root in enumerate(dict.fromkeys(roots.values()))}
        return self.needed_by({cell.key for cell in self.cells if order[roots[cell.key]] % count == index})

    def needed_by(self, keys: set[str]) -> Grid:
        """Return the cells of these keys with all that they need, directly or not."""
        wanted = set(keys)
        for cell in reversed(self.cells):  # what needs others comes after them
            if cell.key in wanted:
                wanted.update(need.key for need in cell.needs)
        return replace(self, cells=tuple(cell for cell in self.cells if cell.key in wanted))

    def of_kind(self, name: Kind) -> Grid:
        """Return the cells of one kind alone; a run of them does nothing for what they need."""
        return replace(self, cells=tuple(cell for cell in self.cells if cell.kind == name))

    def where(self, admitted: Mapping[str, Sequence[str]]) -> Grid:
        """Return the cells whose columns have admitted values, with those that they need. Where a column of a defence is
        named, no victim fits by itself.

        Args:
            admitted: values as text, by column: data, arch, attack, attack_method, poison_rate, target_label, seed, defence,
                defence_method, defence_kind, defence_seed, clean_images.

        Raises:
            PlanError: no such column, or no cell with such values; says what there is.
        """
        known = dict.fromkeys(name for cell in self.cells for name in cell.columns)
        for name, values in admitted.items():
            if name not in known:
                raise PlanError(f"no column {name!r} to choose by; there are {', '.join(known)}")
            there = dict.fromkeys(str(cell.columns[name]) for cell in self.cells if name in cell.columns)
            for value in values:
                if value not in there:
                    raise PlanError(f"no cell of the plan has {name}={value}; there are {', '.join(there)}")
        return self.needed_by(
            {
                cell.key
                for cell in self.cells
                if all(name in cell.columns and str(cell.columns[name]) in values for name, values in admitted.items())
            }
        )
