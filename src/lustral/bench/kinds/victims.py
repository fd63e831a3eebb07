"""Victims: an attack and a data set make a backdoored model; the attack "none" makes a benign one."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lustral.bench.cells import Cell, Need, Outcome, make_cell
from lustral.bench.code import code_digests
from lustral.bench.columns import victim_columns
from lustral.bench.plan import AttackTable, DataTable
from lustral.bench.recording import as_json, set_digest, without_per_class
from lustral.catalog import ATTACKS
from lustral.core.files import NotRegularError
from lustral.core.history import HistoryEntry
from lustral.core.records import OnProgress
from lustral.core.settings import build, describe
from lustral.core.versions import versions_of
from lustral.store.store import DETAIL_FILE, Kind
from lustral.training import EpochReport, Trainer
from lustral.vision.evaluation import Evaluation
from lustral.vision.models import Classifier, parse_architecture
from lustral.vision.victims import NO_ATTACK, implant, save_victim

if TYPE_CHECKING:
    from lustral.bench.expansion import Expansion
    from lustral.bench.survey import Place
    from lustral.bench.workbench import Workbench


@dataclass(frozen=True)
class Victims:
    """The kind of cell that trains a victim."""

    name: Kind = "victims"
    noun: str = "victim"
    title: str = "{attack} on {data}, seed {seed}"
    rates: tuple[str, ...] = ("before",)

    def expand(self, expansion: Expansion) -> Iterator[Cell]:
        """Yield a victim for every data set, attack, architecture, poison rate and seed."""
        for place in expansion.survey.places:
            for where, entry, settings in expansion.survey.attacks:
                if not entry.data or place.data.title in entry.data:
                    for arch in place.archs:
                        yield from self._of_entry(expansion, place, arch, where, entry, settings)

    def _of_entry(
        self,
        expansion: Expansion,
        place: Place,
        arch: str,
        where: str,
        entry: AttackTable,
        settings: Mapping[str, Any],
    ) -> Iterator[Cell]:
        survey = expansion.survey
        recipe = survey.recipe(place)
        own = None if recipe is None else survey.changed(where, entry.trainer, recipe)
        if recipe is None or own is None:
            return
        benign = entry.method == NO_ATTACK
        if benign and (entry.settings or entry.grid or entry.poison_rates or entry.target_labels or entry.fine_tune):
            survey.complain(f"{where}: a benign model takes no settings, rates or labels")
            return
        versions = place.archs[arch]
        seeds = enumerate(entry.seeds or survey.plan.seeds)
        for rate, (number, seed) in product(survey.rates(entry, settings), seeds):
            values = dict(settings)
            if rate is not None:
                values["poison_rate"] = rate
            if entry.target_labels:
                values["target_label"] = entry.target_labels[number % len(entry.target_labels)]
            if not benign:
                try:
                    attack: Any = build(ATTACKS[entry.method], values)
                    attack.require_possible(place.train)
                except ValueError as error:
                    for line in str(error).splitlines():
                        survey.complain(f"{where} on {place.data.name}: {line}")
                    continue
                values = describe(attack)
            try:
                start = (
                    victim_spec(place.data, arch, NO_ATTACK, {}, recipe, seed, versions) if entry.fine_tune else None
                )
                spec = victim_spec(place.data, arch, entry.method, values, own, seed, versions, start)
            except (NotRegularError, OSError) as error:
                survey.complain(f"{where}: {error}")
                continue
            cell = make_cell(self, spec, attack=entry.label, data=place.data.label)
            expansion.places_of.setdefault(cell.key, []).append(place)
            yield cell

    def needs(self, spec: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the benign model that a fine-tuned victim starts from."""
        return () if spec["start"] is None else (Need(kind="victims", spec=spec["start"]),)

    def columns(self, spec: Mapping[str, Any], *, attack: str | None, defence: str | None) -> dict[str, Any]:
        """Return what tables group by; see ``CellKind.columns``."""
        return victim_columns(spec, attack=attack)

    def do(self, cell: Cell, bench: Workbench, on_progress: OnProgress | None) -> Outcome:
        """Train the victim; see ``CellKind.do``."""
        spec, train = cell.spec, bench.training_set(cell.spec)
        method, epochs = spec["attack"]["method"], list[dict[str, Any]]()

        def note(report: EpochReport) -> None:
            rate = round(report.images_per_second)
            epochs.append(HistoryEntry(count=report.epoch, loss=report.loss, images_per_second=rate).to_dict())

        start = None
        if cell.victim_key is not None:
            model = bench.victim(cell.victim_key).model
            assert isinstance(model, Classifier)
            start = model
        began = time.perf_counter()
        victim = implant(
            None if method == NO_ATTACK else build(ATTACKS[method], spec["attack"]["settings"]),
            train,
            bench.test_set(spec),
            arch=parse_architecture(spec["arch"], allow_code=bench.sources.trust.code),
            trainer=build(Trainer, spec["trainer"]),
            seed=spec["seed"],
            data_name=spec["data"]["name"],
            start=start,
            normalisation=spec["data"].get("normalisation"),
            assets=bench.assets,
            on_epoch=note,
            on_progress=on_progress,
        )
        seconds = time.perf_counter() - began
        with tempfile.TemporaryDirectory() as scratch:
            save_victim(Path(scratch), victim, bench.test_set(spec))
            files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
        metrics, per_class = without_per_class(victim.metrics)
        files[DETAIL_FILE] = as_json({"history": epochs, "per_class": {"before": per_class}})
        cost = {
            "seconds": seconds,
            "image_passes": float(len(epochs) * len(train)),
            "peak_memory_bytes": None,
            "clean_images": 0,
        }
        record = {
            "metrics": {"before": metrics},
            "cost": cost,
            "num_poisoned": victim.provenance["num_poisoned"],
            "training_set": set_digest(train if victim.poisoned is None else victim.poisoned.data),
            "class_names": list(train.class_names),
        }
        return Outcome(record=record, files=files)


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
    """Return the specification of a victim; code that it names stands there with the digest of its file.

    Args:
        data: the data set.
        arch: the architecture.
        method: the attack's name, or ``NO_ATTACK``.
        settings: the attack's, with every default filled in.
        trainer: the training recipe.
        seed: of everything that is drawn.
        versions: of the network and of what makes the data; none of a network that cannot be built.
        start: specification of the benign model that it starts from.

    Raises:
        OSError: a file of code cannot be read.
        NotRegularError: it is no regular file, or too large.
    """
    made_by = dict(versions) | versions_of(trainer, Evaluation)
    if method != NO_ATTACK:
        made_by |= versions_of(build(ATTACKS[method], settings))
    code = code_digests([arch, settings]) if versions else {}
    return {
        "kind": "victim",
        "data": data.spec,
        "arch": arch,
        "attack": {"method": method, "settings": dict(settings)},
        "trainer": describe(trainer),
        "seed": seed,
        "start": start,
        "versions": made_by,
        **({"code": code} if code else {}),
    }
