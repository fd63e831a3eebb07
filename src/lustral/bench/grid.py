"""Cells, the pieces of work that a plan makes: a victim to train, or a defence to run on one.

A cell is named by the hash of its specification, in which every default is filled in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lustral.bench.plan import DataTable, Plan, PlanError
from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS
from lustral.core.settings import build, describe
from lustral.core.versions import versions_of
from lustral.store.store import content_key
from lustral.training import Trainer
from lustral.vision.evaluation import Evaluation
from lustral.vision.sources import DataSource
from lustral.vision.victims import NO_ATTACK

DEFENCES: dict[str, type] = {**PURIFIERS, **DETECTORS}
SCAN_METHOD = "mask_area"  # the detector that purifiers start from
OWN_COLUMNS = ("target_label", "poison_rate")  # settings of attacks that are columns of every table


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One piece of work.

    Attributes:
        kind: "victims" or "results", as the store calls them.
        spec: everything that the outcome depends on; plain data.
        attack: what tables call the attack.
        defence: what tables call the defence; None for a victim.
        key: its name in the store.
        victim_key: for a result, the victim it needs; for a fine-tuned victim, the benign model it starts from.
    """

    kind: Literal["victims", "results"]
    spec: Mapping[str, Any]
    attack: str
    defence: str | None = None
    key: str = field(init=False)
    victim_key: str | None = field(init=False)

    def __post_init__(self) -> None:
        """Work out the names."""
        inner = self.spec["victim"] if self.kind == "results" else self.spec["start"]
        object.__setattr__(self, "key", content_key(self.spec))
        object.__setattr__(self, "victim_key", None if inner is None else content_key(inner))

    @property
    def title(self) -> str:
        """A line that says what it is."""
        victim = self.spec["victim"] if self.kind == "results" else self.spec
        text = f"{self.attack} on {victim['data']['name']}, seed {victim['seed']}"
        return text if self.defence is None else f"{self.defence} against {text}"

    @classmethod
    def of(cls, spec: Mapping[str, Any], *, attack: str | None = None, defence: str | None = None) -> Cell:
        """Return the cell of a specification; names that are not given are made from it."""
        if spec["kind"] == "victim":
            return cls(kind="victims", spec=spec, attack=attack or attack_label(spec))
        return cls(
            kind="results",
            spec=spec,
            attack=attack or attack_label(spec["victim"]),
            defence=defence or defence_label(spec["defence"]),
        )


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells of a plan, each victim before its results.

    Attributes:
        plan: the plan.
        cells: victims and results without repetition.
        excluded: number of cells left out, by reason; a victim counts once, for itself and all results on it.
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
        """Return part ``index`` of ``count`` (from 0): victims in turn, each with all that depends on it."""
        if not 0 <= index < count:
            raise PlanError(f"expected a shard I/N with 1 <= I <= N; got {index + 1}/{count}")
        roots: dict[str, str] = {}
        for cell in self.cells:
            roots[cell.key] = roots.get(cell.victim_key or "", cell.key)
        order = {root: number for number, root in enumerate(dict.fromkeys(roots.values()))}
        mine = tuple(cell for cell in self.cells if order[roots[cell.key]] % count == index)
        return replace(self, cells=mine)

    def where(self, admitted: Mapping[str, Sequence[str]]) -> Grid:
        """Return the results whose columns have admitted values, with the victims that they need; or, where no column of a
        defence is named, the victims that fit as well.

        Args:
            admitted: values as text, by column: data, arch, attack, attack_method, poison_rate, target_label, seed, defence,
                defence_method, defence_kind, defence_seed, clean_images.

        Raises:
            PlanError: no such column, or no cell with such values; says what there is.
        """
        columns = [(cell, table_columns(cell)) for cell in self.cells]
        known = dict.fromkeys(name for _, row in columns for name in row)
        for name, values in admitted.items():
            if name not in known:
                raise PlanError(f"no column {name!r} to choose by; there are {', '.join(known)}")
            there = dict.fromkeys(str(row[name]) for _, row in columns if name in row)
            for value in values:
                if value not in there:
                    raise PlanError(f"no cell of the plan has {name}={value}; there are {', '.join(there)}")
        fitting = {
            cell.key
            for cell, row in columns
            if all(name in row and str(row[name]) in values for name, values in admitted.items())
        }
        for cell in reversed(self.cells):  # results come after their victims, those after what they start from
            if cell.key in fitting and cell.victim_key is not None:
                fitting.add(cell.victim_key)
        return replace(self, cells=tuple(cell for cell in self.cells if cell.key in fitting))


def table_columns(cell: Cell) -> dict[str, Any]:
    """Return the columns that tables group by."""
    spec = cell.spec
    victim = spec["victim"] if spec["kind"] == "result" else spec
    attack = victim["attack"]
    columns = {
        "data": victim["data"]["name"],
        "arch": victim["arch"],
        "attack": cell.attack,
        "attack_method": attack["method"],
        "poison_rate": attack["settings"].get("poison_rate"),
        "target_label": attack["settings"].get("target_label"),
        "seed": victim["seed"],
    }
    if spec["kind"] == "result":
        method = spec["defence"]["method"]
        columns |= {
            "defence": cell.defence,
            "defence_method": method,
            "defence_kind": "purifier" if method in PURIFIERS else "detector",
            "defence_seed": spec["seed"],
            "clean_images": spec["clean_images"],
        }
    return columns


def victim_spec(
    data: DataTable,
    arch: str,
    method: str,
    settings: Mapping[str, Any],
    trainer: Trainer,
    seed: int,
    versions: Mapping[str, int],
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the specification of a victim; ``versions`` are those of its network, and of what makes its data."""
    made_by = dict(versions) | versions_of(trainer, Evaluation)
    if method != NO_ATTACK:
        made_by |= versions_of(build(ATTACKS[method], settings))
    return {
        "kind": "victim",
        "data": {"name": data.name, "image_size": data.image_size},
        "arch": arch,
        "attack": {"method": method, "settings": dict(settings)},
        "trainer": describe(trainer),
        "seed": seed,
        "start": start,
        "versions": made_by,
    }


def result_spec(
    victim: Mapping[str, Any],
    defence: Mapping[str, Any],
    clean_images: int,
    seed: int,
    versions: Mapping[str, int],
) -> dict[str, Any]:
    """Return the specification of a defence's result on a victim.

    Args:
        victim: its specification.
        defence: method and settings; of a purifier that starts from a scan also "scan": the detector's, and whether it audits.
        clean_images: what the defender has.
        seed: of the defence.
        versions: of the defence, its settings and its scan.
    """
    return {
        "kind": "result",
        "victim": victim,
        "defence": defence,
        "clean_images": clean_images,
        "seed": seed,
        "versions": {**versions, **versions_of(DataSource, Evaluation)},
    }


def default_arch(data: str) -> str:
    """Return the architecture of a data set where none is named."""
    return "small_cnn" if data == "digits" else "preact_resnet18:width=16"


def attack_label(victim: Mapping[str, Any]) -> str:
    """Return an attack's name with what differs from its defaults, e.g. "blended alpha=0.1"."""
    method = victim["attack"]["method"]
    if method == NO_ATTACK:
        return "benign"
    label = _label(method, victim["attack"]["settings"], ATTACKS[method], OWN_COLUMNS)
    return label if victim["start"] is None else f"{label} (fine-tuned)"


def defence_label(defence: Mapping[str, Any]) -> str:
    """Return a defence's name with what differs from its defaults."""
    label = _label(defence["method"], defence["settings"], DEFENCES[defence["method"]], ())
    if "scan" not in defence:
        return label
    scan = defence["scan"]
    by = _label(scan["method"], scan["settings"], DETECTORS[scan["method"]], ())
    scanned = "" if by == SCAN_METHOD else f" scan: {by}"
    return f"{label}{scanned}{'' if scan['audit'] else ' audit=False'}"


def _label(method: str, settings: Mapping[str, Any], kind: Any, apart: Iterable[str]) -> str:
    differences = [
        f"{name}={value}" for name, value in _differences(settings, describe(kind()), "") if name not in apart
    ]
    return " ".join([method, *differences])


def _differences(settings: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        default = defaults.get(name)
        if isinstance(value, Mapping) and isinstance(default, Mapping):
            yield from _differences(value, default, f"{prefix}{name}.")
        elif value != default:
            yield prefix + name, value
