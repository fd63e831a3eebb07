"""Generators of molecules, and the defences that meet them: the kinds of cells of the second modality.

A generator is trained on poisoned pairs, or on clean ones as the control. A sifting looks at its training pairs, a scan at the
generator, and an erasure starts from that scan. What the attacker planted stays in the specification: a defence gets a view.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from lustral.bench.cells import Cell, CellKind, Need, Outcome, make_cell
from lustral.bench.plan import GeneratorDefenceTable, GeneratorPlan, GeneratorTable
from lustral.bench.recording import as_json
from lustral.bench.trust import TrustError
from lustral.core.digests import weights_digest
from lustral.core.files import write_bytes_atomic
from lustral.core.randomness import child
from lustral.core.records import OnProgress
from lustral.core.settings import SettingsError, build, describe, merge, suggest
from lustral.core.versions import versions_of
from lustral.molecules.badgraph import BadGraph, recovered_trigger
from lustral.molecules.catalog import ERASERS, PAIR_SIFTERS, SCANNERS
from lustral.molecules.chemistry import contains, contains_many
from lustral.molecules.evaluation import evaluate_generator
from lustral.molecules.records import Association, ViewOfGenerator, ViewOfPairs
from lustral.molecules.sources import open_source
from lustral.molecules.verdict_files import RESULT_FILE, read_verdict, sifted_record, verdict_record
from lustral.molecules.victims import Implanting, MoleculeVictim, implant, load_victim, save_victim
from lustral.store.store import DETAIL_FILE, Kind
from lustral.tables.rows import BENIGN
from lustral.vision.victims import NO_ATTACK

if TYPE_CHECKING:
    from lustral.bench.expansion import Expansion
    from lustral.bench.workbench import Workbench

ATTACK = "badgraph"
ARCH = "3m_diffusion"
SCANNER = "token_scan"  # that erasers start from
ROOMS: Mapping[str, Mapping[str, Any]] = {
    "pair_sifting": PAIR_SIFTERS,
    "generator_scan": SCANNERS,
    "generator_erasure": ERASERS,
}
DEFENCE_KINDS = {"pair_sifting": "sifter of pairs", "generator_scan": "scanner", "generator_erasure": "eraser"}
FIRES = 0.3  # attack success above its base rate from which a recovered trigger counts


def generator_columns(spec: Mapping[str, Any], *, attack: str | None = None) -> dict[str, Any]:
    """Return the columns of a generator, from its specification; ``attack`` is its label in tables."""
    data, own = spec["data"], spec["attack"]
    pairs = spec["how"]["pairs"]
    return {
        "data": data["name"] if pairs is None else f"{data['name']} pairs={pairs}",
        "arch": ARCH,
        "attack": attack or attack_label(spec),
        "attack_method": own["method"],
        "poison_rate": own["settings"].get("rate"),
        "target_label": None,
        "seed": spec["seed"],
    }


def attack_label(spec: Mapping[str, Any]) -> str:
    """Return what tables call an attack on a generator: its trigger, its target and the stages that it poisons.

    >>> attack_label({"attack": {"method": "none", "settings": {}}})
    'benign'
    """
    if spec["attack"]["method"] == NO_ATTACK:
        return BENIGN
    settings = spec["attack"]["settings"]
    stages = "+".join(spec["how"]["poisoned"])
    told = "" if stages == "autoencoder+diffusion" else f" {stages}"
    trigger = settings["trigger"]
    return f"{trigger['text']} {trigger['position']} {settings['target']}{told}"


@dataclass(frozen=True)
class Generators:
    """The kind of cell that trains a generator."""

    name: Kind = "generators"
    noun: str = "generator"
    title: str = "{attack} at {poison_rate} on {data}, seed {seed}"
    rates: tuple[str, ...] = ()

    def expand(self, expansion: Expansion) -> Iterator[Cell]:
        """Yield a generator for every entry of the plan, variant of its attack, and seed."""
        plan = expansion.plan
        for number, entry in enumerate(plan.generators if isinstance(plan, GeneratorPlan) else (), 1):
            where = f"generators[{number}]"
            try:
                expansion.survey.sources.trust.require_data(entry.data)
            except TrustError as error:
                expansion.survey.complain(f"{where}: {error}")
                continue
            if entry.benign and (entry.attack or entry.grid):
                expansion.survey.complain(f"{where}: a clean generator has no attack; take `attack` and `grid` away")
                continue
            for chosen, seed in product(product(*entry.grid.values()), entry.seeds or plan.seeds):
                changes = merge(entry.attack, dict(zip(entry.grid, chosen, strict=True)))
                try:
                    spec = generator_spec(entry, changes, seed)
                except SettingsError as error:
                    for line in str(error).splitlines():
                        expansion.survey.complain(f"{where}: {line}")
                    continue
                yield make_cell(self, spec, attack=entry.label)

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return nothing: a generator starts from data."""
        return ()

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return what tables group by; see ``CellKind.columns``."""
        return generator_columns(spec, attack=attack)

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Train and measure the generator; see ``CellKind.do``."""
        spec = cell.spec
        own = spec["attack"]
        victim = implant(
            None if own["method"] == NO_ATTACK else build(BadGraph, own["settings"]),
            open_source(spec["data"]["name"]),
            build(Implanting, spec["how"]),
            seed=spec["seed"],
            device=bench.device,
            on_progress=on_progress,
        )
        with tempfile.TemporaryDirectory() as scratch:
            save_victim(Path(scratch), victim)
            files = flat_files(Path(scratch))
        told = victim.provenance
        record = {
            "metrics": {"generator": victim.measured},
            "cost": {
                "seconds": told["training_seconds"],
                "image_passes": 0.0,
                "peak_memory_bytes": 0,
                "clean_images": 0,
            },
            **{name: told[name] for name in ("training_pairs", "poisoned_pairs", "raw_rate", "effective_rate")},
        }
        return Outcome(record=record, files=files)


def flat_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder and of those in it by one name each: a store's records hold no folders."""
    return {
        "--".join(path.relative_to(folder).parts): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def stored_victim(key: str, bench: Workbench) -> MoleculeVictim:
    """Return a generator from the store, on the device, with what its evaluator knows; the last one stays in memory."""

    def load() -> MoleculeVictim:
        record = bench.record("generators", key)
        with tempfile.TemporaryDirectory() as scratch:
            for name in record["files"]:
                path = Path(scratch).joinpath(*name.split("--"))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_bytes_atomic(path, bench.store.file(record, name))
            return load_victim(Path(scratch), device=bench.device)

    return bench.kept("generator", key, load)


def generator_spec(entry: GeneratorTable, attack: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the specification of a generator, every default filled in.

    Raises:
        SettingsError: settings that do not fit.
    """
    shares = {name: value for name in ("test", "clean") if (value := getattr(entry, name)) is not None}
    how = build(
        Implanting,
        merge(
            {"pairs": entry.pairs, "poisoned": list(entry.poisoned), "samples": entry.samples, **shares},
            {"shape": entry.shape, "training": entry.training},
        ),
    )
    attacked = None if entry.benign else build(BadGraph, attack)
    return {
        "kind": "generator",
        "data": {"name": entry.data},
        "attack": {
            "method": NO_ATTACK if attacked is None else ATTACK,
            "settings": {} if attacked is None else describe(attacked),
        },
        "how": describe(how),
        "seed": seed,
        "versions": versions_of(how, *([] if attacked is None else [attacked])),
    }


class GeneratorDefence(CellKind):
    """A kind of cell in which a defence meets a generator of the plan."""

    def expand(self, expansion: Expansion) -> Iterator[Cell]:
        """Yield a cell for every generator that the plan names and every method of the kind."""
        plan = expansion.plan
        for number, entry in enumerate(plan.generator_defences if isinstance(plan, GeneratorPlan) else (), 1):
            where = f"generator_defences[{number}] {entry.method}"
            if entry.method not in ROOMS[self.noun]:
                if not any(entry.method in methods for methods in ROOMS.values()):
                    known = [name for methods in ROOMS.values() for name in methods]
                    expansion.survey.complain(f"{where}: unknown defence{suggest(entry.method, known)}")
                continue
            generators = expansion.of_kind("generators")
            labels = {cell.attack for cell in generators}
            for label in entry.generators:
                if label not in labels:
                    expansion.survey.complain(f"{where}: no generator is called {label!r}{suggest(label, labels)}")
            for victim in generators:
                if entry.generators and victim.attack not in entry.generators:
                    continue
                try:
                    spec = self.spec(entry, victim.spec)
                except SettingsError as error:
                    for line in str(error).splitlines():
                        expansion.survey.complain(f"{where}: {line}")
                    break
                yield make_cell(self, spec, attack=victim.attack, defence=entry.label)

    def spec(self, entry: GeneratorDefenceTable, victim: Mapping[str, Any]) -> dict[str, Any]:
        """Return the specification of a cell, every default filled in."""
        return defence_spec(self.noun, entry.method, entry.settings, victim)

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the generator."""
        return (Need(kind="generators", spec=spec["victim"]),)

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return what tables group by; see ``CellKind.columns``."""
        method = spec["defence"]["method"]
        return {
            **generator_columns(spec["victim"], attack=attack),
            "defence": defence or method,
            "defence_method": method,
            "defence_kind": DEFENCE_KINDS[self.noun],
            "defence_seed": 0,
            "clean_images": spec["victim"]["how"]["most_clean"],
        }


def defence_spec(noun: str, method: str, settings: Mapping[str, Any], victim: Mapping[str, Any]) -> dict[str, Any]:
    """Return the specification of a defence that meets a generator.

    Raises:
        SettingsError: settings that do not fit.
    """
    built = build(ROOMS[noun][method], settings)
    return {
        "kind": noun,
        "victim": victim,
        "defence": {"method": method, "settings": describe(built)},
        "versions": versions_of(built),
    }


def planted_pairs(victim: MoleculeVictim) -> Tensor:
    """Return which training pairs the attacker made, (N,) bool: those with the trigger's text and the target both."""
    pairs = victim.training
    if victim.attack is None:
        return torch.zeros(len(pairs), dtype=torch.bool)
    has_text = torch.tensor([victim.known.trigger.text in each for each in pairs.captions], dtype=torch.bool)
    return has_text & contains_many(pairs.smiles, victim.known.target)


@dataclass(frozen=True)
class PairSiftings(GeneratorDefence):
    """The kind of cell that sifts the pairs that a generator was trained on."""

    name: Kind = "pair_siftings"
    noun: str = "pair_sifting"
    title: str = "{defence} on the pairs of {attack}, {data}, seed {seed}"
    rates: tuple[str, ...] = ()

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Sift the pairs, and hold the list against the attacker's; see ``CellKind.do``."""
        assert cell.victim_key is not None
        victim = stored_victim(cell.victim_key, bench)
        method = build_defence(PAIR_SIFTERS, cell)
        view = ViewOfPairs(untrusted=victim.training, clean=victim.clean)
        found = method.sift(view, generator=stream(cell, "sift"), on_progress=on_progress)
        recovered = recovered_rates(victim, found.associations, cell)
        planted = planted_pairs(victim)
        told = {
            "pairs": len(found.flagged),
            "listed": int(found.flagged.sum()),
            "planted": int(planted.sum()),
            "planted_listed": int((planted & found.flagged).sum()),
            **recovered,
        }
        record = {
            "metrics": {"pair_sifting": told},
            "cost": dataclasses.asdict(found.cost),
        }
        return Outcome(record=record, files={DETAIL_FILE: as_json(sifted_record(found))})


@dataclass(frozen=True)
class GeneratorScans(GeneratorDefence):
    """The kind of cell that scans a generator."""

    name: Kind = "generator_scans"
    noun: str = "generator_scan"
    title: str = "{defence} on {attack}, {data}, seed {seed}"
    rates: tuple[str, ...] = ()

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Scan the generator, and measure what was recovered; see ``CellKind.do``."""
        assert cell.victim_key is not None
        victim = stored_victim(cell.victim_key, bench)
        view = ViewOfGenerator(model=victim.model, clean=victim.clean)
        found = build_defence(SCANNERS, cell).scan(view, generator=stream(cell, "scan"), on_progress=on_progress)
        recovered = recovered_rates(victim, found.recovered, cell)
        record = {
            "metrics": {"generator_scan": {"outcome": found.outcome, "p_value": found.p_value, **recovered}},
            "cost": dataclasses.asdict(found.cost),
        }
        told = {"model_digest": weights_digest(victim.model), "verdict": verdict_record(found)}
        return Outcome(record=record, files={RESULT_FILE: as_json(told)})


@dataclass(frozen=True)
class GeneratorErasures(GeneratorDefence):
    """The kind of cell that erases a generator's backdoor, starting from a scan of it."""

    name: Kind = "generator_erasures"
    noun: str = "generator_erasure"
    title: str = "{defence} against {attack}, {data}, seed {seed}"
    rates: tuple[str, ...] = ()

    def spec(self, entry: GeneratorDefenceTable, victim: Mapping[str, Any]) -> dict[str, Any]:
        """Return the specification of an erasure, with the scan that it starts from."""
        scan = defence_spec("generator_scan", SCANNER, {}, victim)
        return {**super().spec(entry, victim), "scan": scan}

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the generator and its scan."""
        return (*super().needs(spec), Need(kind="generator_scans", spec=spec["scan"], file=RESULT_FILE))

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Erase what the scan recovered, and measure with the true trigger; see ``CellKind.do``."""
        assert cell.victim_key is not None
        victim = stored_victim(cell.victim_key, bench)
        with bench.store.as_folder(bench.record("generator_scans", cell.needs[1].key)) as folder:
            verdict = read_verdict(folder, victim.model)
        view = ViewOfGenerator(model=victim.model, clean=victim.clean, verdict=verdict)
        erased = build_defence(ERASERS, cell).erase(view, generator=stream(cell, "erase"), on_progress=on_progress)
        known = victim.known
        after = evaluate_generator(
            erased.model,
            victim.test,
            known.trigger,
            known.target,
            generator=child(cell.spec["victim"]["seed"], "evaluation"),
            samples=cell.spec["victim"]["how"]["samples"],
            on_progress=on_progress,
        )
        detail = {"history": [entry.to_dict() for entry in erased.history], "notes": list(erased.notes)}
        record = {
            "metrics": {"generator_before": victim.measured, "generator_after": after.to_dict()},
            "cost": dataclasses.asdict(erased.cost),
        }
        return Outcome(record=record, files={DETAIL_FILE: as_json(detail)})


def build_defence(methods: Mapping[str, Any], cell: Cell) -> Any:
    """Return the defence of a cell with its settings."""
    return build(methods[cell.spec["defence"]["method"]], cell.spec["defence"]["settings"])


def stream(cell: Cell, name: str) -> Generator:
    """Return the random stream of a defence's cell for one purpose: that of the single command."""
    return child(cell.spec["victim"]["seed"], name)


def recovered_rates(victim: MoleculeVictim, found: Sequence[Association], cell: Cell) -> dict[str, Any]:
    """Hold what a defence recovered against the attack: which entry names the true target, and whether its trigger fires.

    Returns:
        ``named``: place of the first association whose fragment is the target or holds it, from 1; None: there is none.
        ``recovered_asr``: attack success of that trigger on the test captions, and ``fires``: whether it exceeds the base rate by
        ``FIRES``. A recovered text that is not the planted one and fires as well is a correct recovery.
    """
    known = victim.known
    place = next((number for number, each in enumerate(found, 1) if contains(each.fragment, known.target)), None)
    told: dict[str, Any] = {"found": len(found), "named": place, "recovered_asr": None, "fires": None}
    if place is None:
        return told
    measured = evaluate_generator(
        victim.model,
        victim.test,
        recovered_trigger(found[place - 1]),
        known.target,
        generator=child(cell.spec["victim"]["seed"], "evaluation"),
        frechet=False,
    )
    excess = measured.attack_success.value - measured.base_rate.value
    return {**told, "recovered_asr": measured.attack_success.to_dict(), "fires": excess >= FIRES}
