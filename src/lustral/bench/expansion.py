"""From plans to their cells: lists expand to their product, named exclusions take cells away.

Nothing is trained before every setting, data set, architecture, poison rate and clean budget has been looked at; all problems
are reported at once. What a cell of each kind is, ``lustral.bench.kinds`` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lustral.bench.cells import Cell, CellKind
from lustral.bench.columns import OWN_COLUMNS
from lustral.bench.grid import Grid
from lustral.bench.kinds import KINDS, cell_of
from lustral.bench.plan import Plan
from lustral.bench.sources import Sources
from lustral.bench.survey import Defence, Place, Survey
from lustral.store.store import Kind
from lustral.tables.rows import BENIGN, UNDEFENDED
from lustral.vision.victims import NO_ATTACK, poisons_data

PLANNED: tuple[Kind, ...] = (
    "victims",
    "scans",
    "purifications",
    "siftings",
    "trainings",
    "generators",
    "pair_siftings",
    "generator_scans",
    "generator_erasures",
)  # kinds that every plan makes; audits only where asked
EXCLUDABLE = {"attack": "attack_method", "defence": "defence_method", "clean": "clean_images"}  # columns by other names


def expand(plan: Plan, sources: Sources) -> Grid:
    """Turn a plan into cells, looking at everything that can be looked at without training.

    Args:
        plan: the plan.
        sources: opens each data set once; its ``trust`` is for what the plan may ask for.

    Raises:
        PlanError: unknown methods or settings, data sets that are not there, poison rates or budgets that are impossible;
            one line for each problem.
    """
    survey = Survey(plan=plan, sources=sources)
    survey.look()
    expansion = Expansion(survey=survey)
    for name in PLANNED:
        expansion.add_all(KINDS[name])
    expansion.require_matches()
    return expansion.grid()


def with_audits(grid: Grid, kind: CellKind | None = None) -> Grid:
    """Return a grid with the audits of its purifications.

    Args:
        grid: of one plan or several.
        kind: of audits, with other settings than the published ones.

    Raises:
        PlanError: there is no benign model to compare a victim with; says which.
    """
    survey = Survey(plan=grid.plan, sources=Sources())
    expansion = Expansion(survey=survey, cells={cell.key: cell for cell in grid.cells})
    expansion.add_all(kind or KINDS["audits"])
    survey.refuse()
    return Grid(plan=grid.plan, cells=tuple(expansion.cells.values()), excluded=grid.excluded)


@dataclass(frozen=True, kw_only=True)
class Meeting:
    """A defence of the plan that meets a victim, with a number of clean images and a seed."""

    victim: Cell
    defence: Defence
    clean_images: int
    seed: int


@dataclass(kw_only=True)
class Expansion:
    """A plan on its way to cells: what kinds of cells are expanded from.

    Attributes:
        survey: of the plan.
        cells: what there is so far, by key.
        places_of: where the plan's victims are trained, by their keys; the kind "victims" fills it in.
    """

    survey: Survey
    cells: dict[str, Cell] = field(default_factory=dict)
    places_of: dict[str, list[Place]] = field(default_factory=dict)
    _planned: set[str] = field(default_factory=set)  # keys; other cells are there because one of these needs them
    _excluded: dict[str, set[str]] = field(default_factory=dict)  # keys by reason
    _labels: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # what each stands for
    _matched: set[int] = field(default_factory=set)  # exclusions that some cell agrees with

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self.survey.plan

    def of_kind(self, name: Kind) -> list[Cell]:
        """Return the cells of a kind, those included that the plan does not name and others need."""
        return [cell for cell in self.cells.values() if cell.kind == name]

    def meetings(self, methods: Mapping[str, Any]) -> Iterator[Meeting]:
        """Yield every meeting of a victim that the plan names with one of its defences that is among ``methods``."""
        for victim in self.of_kind("victims"):
            for place in self.places_of.get(victim.key, ()) if victim.key in self._planned else ():
                for defence, counts in zip(self.survey.defences, place.budgets, strict=True):
                    if defence.entry.method in methods:
                        for seed, count in product(self.plan.defence_seeds, counts):
                            yield Meeting(victim=victim, defence=defence, clean_images=count, seed=seed)

    def has_training_set(self, cell: Cell) -> bool:
        """Say whether a cell that looks at its victim's training set has one; complains where no exclusion takes it away."""
        method = cell.spec["victim"]["attack"]["method"]
        if method == NO_ATTACK or poisons_data(method):
            return True
        if not self.is_excluded(cell):
            self.survey.complain(
                f"{cell.columns['defence_method']} looks at the training set, and {method} poisons none, because it steers the "
                "training: leave the two out together with [[exclude]]"
            )
        return False

    def add_all(self, kind: CellKind) -> None:
        """Add the cells of a kind, except what is excluded, and the cells that they need."""
        for cell in kind.expand(self):
            if self.is_excluded(cell):
                continue
            self.check_labels(cell)
            for need in cell.needs:
                if need.key not in self.cells:
                    needed = cell_of(need.spec, attack=None if need.kind == "victims" else cell.attack, data=cell.data)
                    self.check_labels(needed)
                    self.cells[need.key] = needed
            self.cells[cell.key] = cell
            self._planned.add(cell.key)

    def grid(self) -> Grid:
        """Return the cells, each after those that it needs, and those of a victim together."""
        groups: dict[str, int] = {}
        for number, cell in enumerate(self.cells.values()):
            needed = max((groups[need.key] for need in cell.needs), default=number)
            groups[cell.key] = number if cell.kind == "victims" else needed
        cells = sorted(self.cells.values(), key=lambda cell: groups[cell.key])
        counts = {reason: len(keys) for reason, keys in self._excluded.items()}
        return Grid(plan=self.plan, cells=tuple(cells), excluded=counts)

    def require_matches(self) -> None:
        """Refuse a plan with problems, with exclusions that take nothing away, or without a cell."""
        if not self.survey.problems:
            for number, excluded in enumerate(self.plan.exclude):
                if number not in self._matched:
                    self.survey.complain(
                        f"exclude {excluded.reason!r} matches no cell; take it away, or correct its fields"
                    )
            if not self.cells:
                self.survey.complain("the plan has no cell; check `data` of its attacks, and what it excludes")
        self.survey.refuse()

    def check_labels(self, cell: Cell) -> None:
        """Complain about labels of a cell that stand for two things."""
        if cell.kind == "victims":
            self.check_label("attack", cell.attack, _attack_of(cell.spec))
        elif cell.kind == "generators":
            self.check_label("attack", cell.attack, _attack_on_generator(cell.spec))
        elif cell.defence is not None and "defence" in cell.spec:
            self.check_label("defence", cell.defence, cell.spec["defence"])

    def check_label(self, what: str, label: str, own: Mapping[str, Any]) -> None:
        """Complain about a label that stands for two things: tables would average them together."""
        first = self._labels.setdefault((what, label), dict(own))
        if first != own and not self.survey.problems:  # one label for a grid has been complained of
            self.survey.complain(f"two {what}s are called {label!r}; give one of them another label")
        if label == (UNDEFENDED if what == "defence" else BENIGN) and own["method"] != NO_ATTACK:
            self.survey.complain(f"{own['method']} cannot be called {label!r}, which means that there is no {what}")

    def is_excluded(self, cell: Cell) -> bool:
        """Say whether an exclusion agrees with a cell, and count it for the first that does."""
        agreeing = []
        for number, entry in enumerate(self.plan.exclude):
            wanted = entry.model_dump(exclude={"reason"}, exclude_none=True)
            columns = {EXCLUDABLE.get(name, name): value for name, value in wanted.items()}
            if all(name in cell.columns and cell.columns[name] == value for name, value in columns.items()):
                agreeing.append(number)
        self._matched.update(agreeing)
        if agreeing:
            self._excluded.setdefault(self.plan.exclude[agreeing[0]].reason, set()).add(cell.key)
        return bool(agreeing)


def _attack_on_generator(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes an attack on a generator another one in tables: not its rate, which is a column of its own."""
    own = {name: value for name, value in spec["attack"]["settings"].items() if name != "rate"}
    return {"method": spec["attack"]["method"], "settings": own, "poisoned": spec["how"]["poisoned"]}


def _attack_of(victim: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes an attack another one in tables: not its rate and label, which are columns of their own."""
    attack, settings = victim["attack"], victim["attack"]["settings"]
    own = {name: value for name, value in settings.items() if name not in OWN_COLUMNS}
    return {"method": attack["method"], "settings": own, "is_fine_tuned": victim["start"] is not None}
