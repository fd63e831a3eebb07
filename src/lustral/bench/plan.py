"""Plan files: which attacks meet which defences, on what data, how often; and the cells that this makes.

A plan is TOML. Lists expand to their product, named exclusions take cells away. Nothing is trained before every key, setting,
data set and poison rate has been looked at; all problems are reported at once.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from lustral.bench.sources import Sources
from lustral.bench.store import content_key
from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS
from lustral.models import build_classifier
from lustral.randomness import child
from lustral.settings import SettingsError, build, describe, merge, suggest
from lustral.sources import DataSource, SourceError
from lustral.training import Trainer
from lustral.victims import NO_ATTACK, default_trainer

DEFENCES: dict[str, type] = {**PURIFIERS, **DETECTORS}


class PlanError(ValueError):
    """A plan cannot be run; the message has one line for each problem."""


def _budget(value: object) -> int | float:
    """Check a clean budget."""
    if (type(value) is int and value >= 1) or (type(value) is float and 0 < value < 1):
        return value
    raise ValueError("expected a number of images (a whole number) or a fraction of the training set, between 0 and 1")


T = TypeVar("T")
Rate = Annotated[float, Field(gt=0, le=1)]
Clean = Annotated[int | float, PlainValidator(_budget)]
Some = Annotated[list[T], Field(min_length=1)]  # an empty list would quietly make no cell, or stand for a default


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataTable(_Table):
    """A data set of a plan.

    Attributes:
        name: as ``--data`` takes it: digits, cifar10, a file, a folder.
        arch: architectures; small_cnn for digits and preact_resnet18:width=16 for the rest if left out.
        image_size: side in pixels to resize to.
        trainer: changes to the data set's training recipe.
        clean: clean budgets of this data set, instead of the plan's.
    """

    name: str
    arch: Some[str] = []
    image_size: int | None = None
    trainer: dict[str, Any] = {}
    clean: Some[Clean] = []


class AttackTable(_Table):
    """An attack of a plan; "none" is a benign model.

    Attributes:
        method: name in the catalog.
        label: what tables call it; the method's name with what differs from its defaults if left out.
        settings: fields of the method that differ from its defaults.
        grid: fields with a list of values each; every combination is an attack.
        poison_rates: instead of the plan's.
        target_labels: one for each seed, in turn; 0 if left out.
        data: names of the data sets to use it on; all if left out.
        trainer: changes to the training recipe.
        fine_tune: start from the benign model of the same seed instead of new weights.
    """

    method: str
    label: str | None = None
    settings: dict[str, Any] = {}
    grid: dict[str, Some[Any]] = {}
    poison_rates: Some[Rate] = []
    target_labels: Some[int] = []
    data: Some[str] = []
    trainer: dict[str, Any] = {}
    fine_tune: bool = False


class DefenceTable(_Table):
    """A defence of a plan: a purifier or a detector.

    Attributes:
        method: name in the catalog.
        label: what tables call it; the method's name with what differs from its defaults if left out.
        settings: fields of the method that differ from its defaults.
        grid: fields with a list of values each; every combination is a defence.
        clean: clean budgets, instead of the plan's.
    """

    method: str
    label: str | None = None
    settings: dict[str, Any] = {}
    grid: dict[str, Some[Any]] = {}
    clean: Some[Clean] = []


class ExcludeTable(_Table):
    """Cells to leave out: those that agree in every field that is given.

    Attributes:
        reason: why; shown by ``lustral bench plan``.
    """

    reason: str
    data: str | None = None
    arch: str | None = None
    attack: str | None = None
    poison_rate: float | None = None
    defence: str | None = None
    clean: int | None = None
    seed: int | None = None


class RunTable(_Table):
    """How cells are run; no part of their names.

    Attributes:
        threads: CPU threads of a cell. Rounding depends on it, so equal tables need equal threads.
        gpus: share of a GPU that a cell asks Ray for.
        keep_models: keep purified models, so that ``lustral bench verify`` can measure them again.
    """

    threads: Annotated[int, Field(ge=1)] = 2
    gpus: Annotated[float, Field(ge=0)] = 0.0
    keep_models: bool = True


class Plan(_Table):
    """A plan file.

    Attributes:
        name: of the plan.
        description: one or two sentences for the site.
        seeds: each seed trains its own victims and draws its own clean images.
        defence_seeds: draws of clean images and defence per victim.
        poison_rates: fractions of the training set.
        clean: clean budgets: images (a whole number) or a fraction of the training set.
        trainer: changes to each data set's training recipe.
        data: data sets.
        attacks: attacks.
        defences: defences.
        exclude: cells to leave out.
        run: how cells are run.
    """

    name: str
    description: str = ""
    seeds: Some[int] = [0]
    defence_seeds: Some[int] = [0]
    poison_rates: Some[Rate] = [0.1]
    clean: Some[Clean] = [0.05]
    trainer: dict[str, Any] = {}
    data: Some[DataTable]
    attacks: Some[AttackTable]
    defences: list[DefenceTable] = []
    exclude: list[ExcludeTable] = []
    run: RunTable = RunTable()


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


def read_plan(path: Path) -> Plan:
    """Read a plan file.

    Raises:
        PlanError: it is no TOML, or keys and values do not fit.
        OSError: it cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not a readable TOML file: {error}") from error
    return parse_plan(content, where=str(path))


def parse_plan(content: Mapping[str, Any], *, where: str = "plan") -> Plan:
    """Check a plan's keys and values.

    Raises:
        PlanError: one line for each problem.
    """
    lines = list(_not_finite(content, ""))
    try:
        plan = Plan.model_validate(content)
    except ValidationError as error:
        lines += [_explain(problem) for problem in error.errors()]
    if lines:
        raise PlanError("\n".join(f"{where}: {line}" for line in lines))
    return plan


def _not_finite(value: Any, place: str) -> Iterator[str]:
    """Yield a line for each number that JSON does not have: no name of a cell could hold it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _not_finite(item, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for number, item in enumerate(value, 1):
            yield from _not_finite(item, f"{place}[{number}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{place}: expected a finite number; got {value}"


def _explain(problem: Mapping[str, Any]) -> str:
    """Return one line for a complaint of pydantic's."""
    place = problem["loc"]
    name = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if problem["type"] == "extra_forbidden":
        table: Any = Plan
        for part in place[:-1]:
            if isinstance(part, str):
                table = _table_of(table, part)
        return f"unknown key {name!r}{suggest(str(place[-1]), table.model_fields)}"
    if problem["type"] == "missing":
        return f"{name} is missing"
    if problem["type"] == "too_short":
        return f"{name} is empty; give at least one value or take it away"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}; got {problem['input']!r}"


def _table_of(table: Any, name: str) -> Any:
    tables = {
        "data": DataTable,
        "attacks": AttackTable,
        "defences": DefenceTable,
        "exclude": ExcludeTable,
        "run": RunTable,
    }
    return tables.get(name, table)


def expand(plan: Plan, sources: Sources) -> Grid:
    """Turn a plan into cells, looking at everything that can be looked at without training.

    Args:
        plan: the plan.
        sources: opens each data set once.

    Raises:
        PlanError: unknown methods or settings, data sets that are not there, poison rates or budgets that are impossible;
            one line for each problem.
    """
    return _Expansion(plan, sources).run()


@dataclass
class _Expansion:
    plan: Plan
    sources: Sources
    problems: dict[str, None] = field(default_factory=dict)  # in order, each once
    victims: dict[str, Cell] = field(default_factory=dict)
    results: dict[str, list[Cell]] = field(default_factory=dict)  # by victim
    excluded: dict[str, set[str]] = field(default_factory=dict)  # keys by reason
    matched: set[int] = field(default_factory=set)  # exclusions that some cell agrees with

    def run(self) -> Grid:
        defences = [
            (entry, settings)
            for number, entry in enumerate(self.plan.defences, 1)
            for settings in self.variants(f"defences[{number}] {entry.method}", entry, DEFENCES)
        ]
        attacks = [
            (f"attacks[{number}] {entry.method}", entry, settings)
            for number, entry in enumerate(self.plan.attacks, 1)
            for settings in self.variants(f"attacks[{number}] {entry.method}", entry, {**ATTACKS, NO_ATTACK: None})
        ]
        self.check_names()
        for data in self.plan.data:
            source = self.open(data)
            if source is None:
                continue
            archs, pool = self.archs(data, source), len(source.defender_pool())
            budgets = [(entry, settings, self.budgets(entry, data, source, pool)) for entry, settings in defences]
            for where, entry, settings in attacks:
                if entry.data and data.name not in entry.data:
                    continue
                for arch in archs:
                    for cell in self.victim_cells(where, entry, settings, data, arch, source):
                        self.add(cell, budgets)
        if not self.problems:
            for number, excluded in enumerate(self.plan.exclude):
                if number not in self.matched:
                    self.complain(f"exclude {excluded.reason!r} matches no cell; take it away, or correct its fields")
            if not self.victims:
                self.complain("the plan has no cell; check `data` of its attacks, and what it excludes")
        if self.problems:
            raise PlanError("\n".join(self.problems))
        cells = [cell for key, victim in self.victims.items() for cell in (victim, *self.results.get(key, ()))]
        counts = {reason: len(keys) for reason, keys in self.excluded.items()}
        return Grid(plan=self.plan, cells=tuple(cells), excluded=counts)

    def complain(self, text: str) -> None:
        self.problems[text] = None

    def variants(
        self, where: str, entry: AttackTable | DefenceTable, catalog: Mapping[str, Any]
    ) -> Iterator[dict[str, Any]]:
        """Yield the settings that an entry and its grid make, if its method exists."""
        if entry.method not in catalog:
            kind = "attack" if isinstance(entry, AttackTable) else "defence"
            self.complain(f"{where}: unknown {kind}{suggest(entry.method, catalog)}")
            return
        if entry.label is not None and any(len(values) > 1 for values in entry.grid.values()):
            self.complain(f"{where}: one label for several variants of a grid; take the label away")
        for chosen in product(*entry.grid.values()):
            settings = merge(entry.settings, dict(zip(entry.grid, chosen, strict=True)))
            trial = settings
            if isinstance(entry, AttackTable):
                twice = [name for name in OWN_COLUMNS if name in settings and getattr(entry, f"{name}s")]
                for name in twice:
                    self.complain(f"{where}: {name} is among its settings and in {name}s; take one of them away")
                rate = self.rates(entry, settings)[0]
                trial = settings if rate is None else {**settings, "poison_rate": rate}
            if entry.method != NO_ATTACK:
                try:
                    built = build(catalog[entry.method], trial)
                except SettingsError as error:
                    for line in str(error).splitlines():
                        self.complain(f"{where}: {line}")
                    continue
                settings = describe(built) if isinstance(entry, DefenceTable) else settings
            yield settings

    def rates(self, entry: AttackTable, settings: Mapping[str, Any]) -> list[float | None]:
        """Return the poison rates of an attack; None for one that its settings have, or where nothing is poisoned."""
        if entry.method == NO_ATTACK or ("poison_rate" in settings and not entry.poison_rates):
            return [None]
        return [*(entry.poison_rates or self.plan.poison_rates)]

    def check_names(self) -> None:
        """Complain about names that attacks and exclusions use and the plan does not have."""
        known = [data.name for data in self.plan.data]
        columns = {
            "data": known,
            "arch": [arch for data in self.plan.data for arch in data.arch or [default_arch(data.name)]],
            "attack": [entry.method for entry in self.plan.attacks],
            "defence": [entry.method for entry in self.plan.defences],
        }
        for excluded in self.plan.exclude:
            wanted = excluded.model_dump(exclude={"reason"}, exclude_none=True)
            if not wanted:
                self.complain(
                    f"exclude {excluded.reason!r} names no field, so it would leave out every cell; give some"
                )
            for column, words in columns.items():
                if column in wanted and wanted[column] not in words:
                    hint = suggest(wanted[column], dict.fromkeys(words)) if words else ""
                    self.complain(f"exclude {excluded.reason!r}: {column} {wanted[column]!r} is not in the plan{hint}")
        for number, entry in enumerate(self.plan.attacks, 1):
            for name in entry.data:
                if name not in known:
                    self.complain(
                        f"attacks[{number}] {entry.method}: data {name!r} is not in the plan{suggest(name, known)}"
                    )

    def open(self, data: DataTable) -> DataSource | None:
        try:
            source = self.sources.open(data.name, data.image_size)
            self.sources.training_set(data.name, data.image_size)
        except (SourceError, OSError) as error:
            self.complain(f"data {data.name}: {' '.join(str(error).splitlines())}")
            return None
        if source.test is None:
            self.complain(f"data {data.name}: has no test set, which a benchmark needs")
            return None
        return source

    def archs(self, data: DataTable, source: DataSource) -> list[str]:
        """Return the architectures of a data set, having complained about those that cannot be."""
        names = data.arch or [default_arch(data.name)]
        for arch in names:
            try:
                build_classifier(
                    arch, num_classes=source.train.num_classes, image_shape=source.train.image_shape, generator=child(0)
                )
            except (ValueError, ImportError, OSError) as error:
                self.complain(f"data {data.name}: arch {arch!r}: {' '.join(str(error).splitlines())}")
        return names

    def budgets(self, entry: DefenceTable, data: DataTable, source: DataSource, pool: int) -> list[int]:
        """Return the clean budgets of a defence on a data set, in images."""
        found = []
        for clean in entry.clean or data.clean or self.plan.clean:
            count = clean if isinstance(clean, int) else round(clean * len(source.train))
            if not 2 <= count <= pool:
                self.complain(
                    f"defence {entry.method} on {data.name}: a clean budget of {clean} asks for {count} images; the "
                    f"defenders' reserve has {pool}: give a budget of 2 to {pool} images"
                )
            else:
                found.append(count)
        return list(dict.fromkeys(found))

    def victim_cells(
        self,
        where: str,
        entry: AttackTable,
        settings: Mapping[str, Any],
        data: DataTable,
        arch: str,
        source: DataSource,
    ) -> Iterator[Cell]:
        train = self.sources.training_set(data.name, data.image_size)
        recipe = self.recipe(f"data {data.name}", data.trainer, source, len(train))
        own = None if recipe is None else self.changed(where, entry.trainer, recipe)
        if recipe is None or own is None:
            return
        benign = entry.method == NO_ATTACK
        if benign and (entry.settings or entry.grid or entry.poison_rates or entry.target_labels or entry.fine_tune):
            self.complain(f"{where}: a benign model takes no settings, rates or labels")
            return
        for rate, (number, seed) in product(self.rates(entry, settings), enumerate(self.plan.seeds)):
            values = dict(settings)
            if rate is not None:
                values["poison_rate"] = rate
            if entry.target_labels:
                values["target_label"] = entry.target_labels[number % len(entry.target_labels)]
            if not benign:
                try:
                    attack: Any = build(ATTACKS[entry.method], values)
                    attack.require_possible(train)
                except ValueError as error:
                    for line in str(error).splitlines():
                        self.complain(f"{where} on {data.name}: {line}")
                    continue
                values = describe(attack)
            start = victim_spec(data, arch, NO_ATTACK, {}, recipe, seed) if entry.fine_tune else None
            spec = victim_spec(data, arch, entry.method, values, own, seed, start)
            yield Cell.of(spec, attack=entry.label)

    def recipe(self, where: str, changes: Mapping[str, Any], source: DataSource, num_images: int) -> Trainer | None:
        """Return the training recipe of a data set with the plan's changes and its own."""
        base = default_trainer(flip=source.flip, num_images=num_images)
        common = self.changed("plan", self.plan.trainer, base)
        return None if common is None else self.changed(where, changes, common)

    def changed(self, where: str, changes: Mapping[str, Any], base: Trainer) -> Trainer | None:
        try:
            return build(Trainer, changes, base=base)
        except SettingsError as error:
            for line in str(error).splitlines():
                self.complain(f"{where}: trainer: {line}")
            return None

    def add(self, victim: Cell, budgets: Sequence[tuple[DefenceTable, Mapping[str, Any], Sequence[int]]]) -> None:
        """Add a victim and the results on it, except what is excluded, and the benign model that it starts from."""
        if self.is_excluded(victim):
            return
        if victim.spec["start"] is not None:
            start = Cell.of(victim.spec["start"])
            self.victims.setdefault(start.key, start)
        results = {}
        for (entry, settings, counts), defence_seed in product(budgets, self.plan.defence_seeds):
            for count in counts:
                spec = {
                    "kind": "result",
                    "victim": victim.spec,
                    "defence": {"method": entry.method, "settings": settings},
                    "clean_images": count,
                    "seed": defence_seed,
                }
                cell = Cell.of(spec, attack=victim.attack, defence=entry.label)
                if not self.is_excluded(cell):
                    results[cell.key] = cell
        self.victims[victim.key] = victim
        known = {cell.key: cell for cell in self.results.get(victim.key, [])}
        self.results[victim.key] = list({**known, **results}.values())

    def is_excluded(self, cell: Cell) -> bool:
        """Say whether an exclusion agrees with a cell, and count it for the first that does."""
        victim = cell.spec["victim"] if cell.kind == "results" else cell.spec
        facts = {
            "data": victim["data"]["name"],
            "arch": victim["arch"],
            "attack": victim["attack"]["method"],
            "poison_rate": victim["attack"]["settings"].get("poison_rate"),
            "seed": victim["seed"],
        }
        if cell.kind == "results":
            facts |= {"defence": cell.spec["defence"]["method"], "clean": cell.spec["clean_images"]}
        agreeing = []
        for number, entry in enumerate(self.plan.exclude):
            wanted = entry.model_dump(exclude={"reason"}, exclude_none=True)
            if wanted.keys() <= facts.keys() and all(facts[name] == value for name, value in wanted.items()):
                agreeing.append(number)
        self.matched.update(agreeing)
        if agreeing:
            self.excluded.setdefault(self.plan.exclude[agreeing[0]].reason, set()).add(cell.key)
        return bool(agreeing)


def victim_spec(
    data: DataTable,
    arch: str,
    method: str,
    settings: Mapping[str, Any],
    trainer: Trainer,
    seed: int,
    start: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the specification of a victim."""
    return {
        "kind": "victim",
        "data": {"name": data.name, "image_size": data.image_size},
        "arch": arch,
        "attack": {"method": method, "settings": dict(settings)},
        "trainer": describe(trainer),
        "seed": seed,
        "start": start,
    }


def default_arch(data: str) -> str:
    """Return the architecture of a data set where none is named."""
    return "small_cnn" if data == "digits" else "preact_resnet18:width=16"


OWN_COLUMNS = ("target_label", "poison_rate")  # settings of attacks that are columns of every table


def attack_label(victim: Mapping[str, Any]) -> str:
    """Return an attack's name with what differs from its defaults, e.g. "blended alpha=0.1"."""
    method = victim["attack"]["method"]
    if method == NO_ATTACK:
        return "benign"
    label = _label(method, victim["attack"]["settings"], ATTACKS[method], OWN_COLUMNS)
    return label if victim["start"] is None else f"{label} (fine-tuned)"


def defence_label(defence: Mapping[str, Any]) -> str:
    """Return a defence's name with what differs from its defaults."""
    return _label(defence["method"], defence["settings"], DEFENCES[defence["method"]], ())


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
