"""A look at a plan before its cells are made: every method, setting, data set, architecture and budget that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from lustral.bench.columns import DEFENCES, OWN_COLUMNS
from lustral.bench.plan import AttackTable, DataTable, DefenceTable, Plan, PlanError
from lustral.bench.sources import Sources
from lustral.bench.trust import TrustError
from lustral.catalog import ATTACKS, DETECTORS, SAFE_TRAINERS, SIFTERS
from lustral.core.settings import SettingsError, build, describe, merge, suggest
from lustral.core.versions import versions_of
from lustral.training import Trainer, default_trainer
from lustral.vision.erasing import scan_method, takes_verdict
from lustral.vision.models import look_at, parse_architecture
from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, SourceError
from lustral.vision.victims import NO_ATTACK


@dataclass(frozen=True, kw_only=True)
class Defence:
    """An entry of a plan's defences with one of the settings that its grid makes.

    Attributes:
        entry: as the plan has it.
        settings: of the method, every default filled in.
        versions: of what computes it.
        scan: settings of the detector that it starts from; None where it starts from none.
        scan_versions: of that detector.
    """

    entry: DefenceTable
    settings: Mapping[str, Any]
    versions: Mapping[str, int]
    scan: Mapping[str, Any] | None = None
    scan_versions: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A data set of a plan.

    Attributes:
        data: as the plan has it.
        source: opened.
        train: the attacker's images.
        archs: versions of what makes each architecture and its data; none of one that cannot be built.
        budgets: clean images of each of the plan's defences.
    """

    data: DataTable
    source: DataSource
    train: ImageSet
    archs: Mapping[str, Mapping[str, int]]
    budgets: Sequence[Sequence[int]]


@dataclass(kw_only=True)
class Survey:
    """What a plan names, looked at; what cannot be is complained of, all of it before anything is done.

    Attributes:
        plan: the plan.
        sources: opens each data set once; its ``trust`` is for what the plan may ask for.
        problems: complaints, in order, each once.
        attacks: (how complaints name it, entry, settings) of every attack.
        defences: every defence.
        places: every data set that could be opened.
    """

    plan: Plan
    sources: Sources
    problems: dict[str, None] = field(default_factory=dict)
    attacks: list[tuple[str, AttackTable, Mapping[str, Any]]] = field(default_factory=list)
    defences: list[Defence] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)

    def complain(self, text: str) -> None:
        """Note a problem; it refuses the plan."""
        self.problems[text] = None

    def refuse(self) -> None:
        """Raise ``PlanError`` with all problems, if there are any."""
        if self.problems:
            raise PlanError("\n".join(self.problems))

    def look(self) -> None:
        """Fill in attacks, defences and places, and complain of what cannot be."""
        for number, entry in enumerate(self.plan.defences, 1):
            self.defences += self.defences_of(f"defences[{number}] {entry.method}", entry)
        catalog = {**ATTACKS, NO_ATTACK: None}
        for number, attack in enumerate(self.plan.attacks, 1):
            where = f"attacks[{number}] {attack.method}"
            self.attacks += [(where, attack, settings) for settings in self.variants(where, attack, catalog)]
        self.check_names()
        for data in self.plan.data:
            source = self.open(data)
            if source is None:
                continue
            archs, pool = self.archs(data, source), len(source.defender_indices())
            train = self.sources.training_set(data.name, data.image_size, data.images)
            budgets = [self.budgets(defence.entry, data, source, pool) for defence in self.defences]
            self.places.append(Place(data=data, source=source, train=train, archs=archs, budgets=budgets))

    def defences_of(self, where: str, entry: DefenceTable) -> Iterator[Defence]:
        """Yield the defences that an entry and its grid make, with the scan that a purifier starts from."""
        scans = takes_verdict(DEFENCES.get(entry.method, object))
        if not scans and (entry.scan or not entry.audit):
            self.complain(f"{where}: it starts from no scan; take `scan` and `audit` away")
        if entry.own_model and entry.method not in SIFTERS:
            self.complain(f"{where}: it is no sifter, so it looks at no model of its own; take `own_model` away")
        try:
            detector = build(DETECTORS[scan_method(DEFENCES[entry.method])], entry.scan) if scans else None
        except SettingsError as error:
            for line in str(error).splitlines():
                self.complain(f"{where}: scan: {line}")
            return
        for settings in self.variants(where, entry, DEFENCES):
            method: Any = build(DEFENCES[entry.method], settings)
            yield Defence(
                entry=entry,
                settings=settings,
                versions=versions_of(method, *([detector] if scans and entry.audit else [])),
                scan=None if detector is None else describe(detector),
                scan_versions=versions_of(detector) if scans else {},
            )

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

    def check_names(self) -> None:
        """Complain about names that attacks and exclusions use and the plan does not have."""
        known = [data.title for data in self.plan.data]
        for number, data in enumerate(self.plan.data, 1):
            if data.label is not None and known.count(data.label) > 1:
                self.complain(
                    f"data[{number}] {data.name}: another data set is called {data.label!r} too; give it another label"
                )
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
        """Return a data set; None, and a complaint, where it cannot be used."""
        try:
            source = self.sources.open(data.name, data.image_size)
            self.sources.training_set(data.name, data.image_size, data.images)
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
            whole = len(source.train) if data.images is None else data.images
            count = clean if isinstance(clean, int) else round(clean * whole)
            if count == 0 and (entry.method in SIFTERS or entry.method in SAFE_TRAINERS):
                found.append(0)
            elif not 2 <= count <= pool:
                self.complain(
                    f"defence {entry.method} on {data.name}: a clean budget of {clean} asks for {count} images; the "
                    f"defenders' reserve has {pool}: give a budget of 2 to {pool} images"
                )
            else:
                found.append(count)
        return list(dict.fromkeys(found))

    def rates(self, entry: AttackTable, settings: Mapping[str, Any]) -> list[float | None]:
        """Return the poison rates of an attack; None for one that its settings have, or where nothing is poisoned."""
        if entry.method == NO_ATTACK or ("poison_rate" in settings and not entry.poison_rates):
            return [None]
        return [*(entry.poison_rates or self.plan.poison_rates)]

    def recipe(self, place: Place) -> Trainer | None:
        """Return the training recipe of a data set with the plan's changes and its own; None where they do not fit."""
        base = default_trainer(flip=place.source.flip, num_images=len(place.train))
        common = self.changed("plan", self.plan.trainer, base)
        return None if common is None else self.changed(f"data {place.data.title}", place.data.trainer, common)

    def changed(self, where: str, changes: Mapping[str, Any], base: Trainer) -> Trainer | None:
        """Return a recipe with changes; None, and a complaint, where they do not fit."""
        try:
            return build(Trainer, changes, base=base)
        except SettingsError as error:
            for line in str(error).splitlines():
                self.complain(f"{where}: trainer: {line}")
            return None


def default_arch(data: str) -> str:
    """Return the architecture of a data set where none is named."""
    return "small_cnn" if data == "digits" else "preact_resnet18:width=16"
