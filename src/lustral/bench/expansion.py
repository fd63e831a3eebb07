"""From a plan to its cells: lists expand to their product, named exclusions take cells away.

Nothing is trained before every setting, data set, architecture, poison rate and clean budget has been looked at; all problems
are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lustral.bench.grid import (
    DEFENCES,
    OWN_COLUMNS,
    SCAN_METHOD,
    Cell,
    Grid,
    default_arch,
    result_spec,
    victim_spec,
)
from lustral.bench.plan import AttackTable, DataTable, DefenceTable, Plan, PlanError
from lustral.bench.sources import Sources
from lustral.bench.trust import TrustError
from lustral.catalog import ATTACKS, DETECTORS
from lustral.core.settings import SettingsError, build, describe, merge, suggest
from lustral.core.versions import versions_of
from lustral.tables.rows import BENIGN, UNDEFENDED
from lustral.training import Trainer, default_trainer
from lustral.vision.erasing import takes_verdict
from lustral.vision.models import look_at, parse_architecture
from lustral.vision.sources import DataSource, SourceError
from lustral.vision.victims import NO_ATTACK


def expand(plan: Plan, sources: Sources) -> Grid:
    """Turn a plan into cells, looking at everything that can be looked at without training.

    Args:
        plan: the plan.
        sources: opens each data set once; its ``trust`` is for what the plan may ask for.

    Raises:
        PlanError: unknown methods or settings, data sets that are not there, poison rates or budgets that are impossible;
            one line for each problem.
    """
    return _Expansion(plan, sources).run()


_Defence = tuple[DefenceTable, dict[str, Any], dict[str, int]]  # entry, method with settings and scan, versions
_Budget = tuple[DefenceTable, dict[str, Any], dict[str, int], Sequence[int]]  # the same, and images


@dataclass
class _Expansion:
    plan: Plan
    sources: Sources
    problems: dict[str, None] = field(default_factory=dict)  # in order, each once
    victims: dict[str, Cell] = field(default_factory=dict)
    results: dict[str, list[Cell]] = field(default_factory=dict)  # by victim
    excluded: dict[str, set[str]] = field(default_factory=dict)  # keys by reason
    labels: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)  # what each stands for
    matched: set[int] = field(default_factory=set)  # exclusions that some cell agrees with

    def run(self) -> Grid:
        defences = [
            defence
            for number, entry in enumerate(self.plan.defences, 1)
            for defence in self.defences(f"defences[{number}] {entry.method}", entry)
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
            archs, pool = self.archs(data, source), len(source.defender_indices())
            budgets = [(*defence, self.budgets(defence[0], data, source, pool)) for defence in defences]
            for where, entry, settings in attacks:
                if entry.data and data.name not in entry.data:
                    continue
                for arch, versions in archs.items():
                    for cell in self.victim_cells(where, entry, settings, data, arch, versions, source):
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

    def defences(self, where: str, entry: DefenceTable) -> Iterator[_Defence]:
        """Yield the defences that an entry and its grid make, with the scan that a purifier starts from."""
        scans = takes_verdict(DEFENCES.get(entry.method, object))
        if not scans and (entry.scan or not entry.audit):
            self.complain(f"{where}: it starts from no scan; take `scan` and `audit` away")
        try:
            detector = build(DETECTORS[SCAN_METHOD], entry.scan)
        except SettingsError as error:
            for line in str(error).splitlines():
                self.complain(f"{where}: scan: {line}")
            return
        scan = {"scan": {"method": SCAN_METHOD, "settings": describe(detector), "audit": entry.audit}} if scans else {}
        for settings in self.variants(where, entry, DEFENCES):
            versions = versions_of(build(DEFENCES[entry.method], settings), *([detector] if scans else []))
            yield entry, {"method": entry.method, "settings": settings, **scan}, versions

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
            try:
                self.sources.trust.require_code(settings)
            except TrustError as error:
                self.complain(f"{where}: {error}")
                continue
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
        except (SourceError, TrustError, OSError) as error:
            self.complain(f"data {data.name}: {' '.join(str(error).splitlines())}")
            return None
        if source.test is None:
            self.complain(f"data {data.name}: has no test set, which a benchmark needs")
            return None
        return source

    def archs(self, data: DataTable, source: DataSource) -> dict[str, dict[str, int]]:
        """Return the versions of each architecture of a data set, having complained about those that cannot be."""
        found: dict[str, dict[str, int]] = {}
        for arch in data.arch or [default_arch(data.name)]:
            try:
                self.sources.trust.require_code(arch)
                classifier = look_at(
                    parse_architecture(arch, allow_code=self.sources.trust.code),
                    num_classes=source.train.num_classes,
                    image_shape=source.train.image_shape,
                )
            except (ValueError, ImportError, OSError) as error:
                self.complain(f"data {data.name}: arch {arch!r}: {' '.join(str(error).splitlines())}")
                found[arch] = {}
            else:
                found[arch] = versions_of(source, *classifier.modules())
        return found

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
        versions: Mapping[str, int],
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
        seeds = enumerate(entry.seeds or self.plan.seeds)
        for rate, (number, seed) in product(self.rates(entry, settings), seeds):
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
            start = victim_spec(data, arch, NO_ATTACK, {}, recipe, seed, versions) if entry.fine_tune else None
            spec = victim_spec(data, arch, entry.method, values, own, seed, versions, start)
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

    def add(self, victim: Cell, budgets: Sequence[_Budget]) -> None:
        """Add a victim and the results on it, except what is excluded, and the benign model that it starts from."""
        if self.is_excluded(victim):
            return
        self.check_label("attack", victim.attack, victim.spec)
        if victim.spec["start"] is not None:
            start = Cell.of(victim.spec["start"])
            self.victims.setdefault(start.key, start)
        results = {}
        for (entry, defence, versions, counts), defence_seed in product(budgets, self.plan.defence_seeds):
            for count in counts:
                spec = result_spec(victim.spec, defence, count, defence_seed, versions)
                cell = Cell.of(spec, attack=victim.attack, defence=entry.label)
                if not self.is_excluded(cell):
                    self.check_label("defence", str(cell.defence), spec["defence"])
                    results[cell.key] = cell
        self.victims[victim.key] = victim
        known = {cell.key: cell for cell in self.results.get(victim.key, [])}
        self.results[victim.key] = list({**known, **results}.values())

    def check_label(self, kind: str, label: str, spec: Mapping[str, Any]) -> None:
        """Complain about a label that stands for two things: tables would average them together."""
        own = dict(spec) if kind == "defence" else _attack_of(spec)
        first = self.labels.setdefault((kind, label), own)
        if first != own and not self.problems:  # one label for a grid has been complained of
            self.complain(f"two {kind}s are called {label!r}; give one of them another label")
        if label == (UNDEFENDED if kind == "defence" else BENIGN) and own["method"] != NO_ATTACK:
            self.complain(f"{own['method']} cannot be called {label!r}, which means that there is no {kind}")

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


def _attack_of(victim: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes an attack another one in tables: not its rate and label, which are columns of their own."""
    attack, settings = victim["attack"], victim["attack"]["settings"]
    own = {name: value for name, value in settings.items() if name not in OWN_COLUMNS}
    return {"method": attack["method"], "settings": own, "is_fine_tuned": victim["start"] is not None}
