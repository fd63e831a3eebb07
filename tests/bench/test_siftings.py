"""Siftings and trainings as cells: the victim's training set is made again as it was, and the lists are held against it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Generator
from torch.nn.functional import cross_entropy

from bench.plans import quick_grid
from lustral.bench.columns import DEFENCES
from lustral.bench.grid import Grid
from lustral.bench.plan import PlanError
from lustral.bench.recording import set_digest
from lustral.bench.runner import Event, run_local
from lustral.bench.verification import inconsistencies, repeat, verify
from lustral.bench.workbench import Workbench
from lustral.catalog import ATTACKS, DETECTORS, PURIFIERS, SAFE_TRAINERS, SIFTERS
from lustral.core.cost import CostMeter
from lustral.core.files import canonical
from lustral.core.records import OnProgress
from lustral.store.store import DETAIL_FILE, MODEL_FILE, Store, checksum_of
from lustral.tables.rows import load_cells
from lustral.tables.summary import Query, table
from lustral.training import Trainer
from lustral.vision.interfaces import CraftedAttack, SteersTraining
from lustral.vision.models.features import gather
from lustral.vision.purifiers import BNRefresh
from lustral.vision.records import DefenderView, Purified, Sifted, TrainingView
from lustral.vision.suspicion.scoring_model import plain_model
from lustral.vision.victims import implant, poisons_data

CPU = torch.device("cpu")
SEEN: list[Any] = []  # views that the fakes were given


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowLoss:
    """A sifter for the tests: images of a low loss are suspicious."""

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 0.3

    in_parts: bool = False

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        SEEN.append(view)
        model = plain_model(view, generator=generator, trainer=Trainer(epochs=1), on_progress=on_progress)
        with CostMeter(model, clean_images=0) as meter:
            logits = gather(model, view.untrusted)[1]
        scores = -cross_entropy(logits, view.untrusted.labels.cpu(), reduction="none")
        line = float(scores.quantile(0.9))
        found = Sifted(scores=scores, flagged=scores > line, threshold=line, basis="The loss.", cost=meter.cost)
        parts = {"loss": found, "nobody": dataclasses.replace(found, flagged=scores > 1e9)}
        return dataclasses.replace(found, parts=parts) if self.in_parts else found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relearns(BNRefresh):
    """A purifier for the tests that takes the training set."""

    takes_untrusted: ClassVar[bool] = True

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        SEEN.append(view)
        return super().purify(view, generator=generator, on_progress=on_progress)


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SIFTERS, "low_loss", LowLoss)
    monkeypatch.setitem(PURIFIERS, "relearns", Relearns)
    SEEN.clear()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store")).open(create=True)


BADNETS: dict[str, Any] = {"method": "badnets", "target_labels": [3]}
BENIGN: dict[str, Any] = {"method": "none"}
TACT: dict[str, Any] = {"method": "tact", "target_labels": [3], "settings": {"poison_rate": 0.05}}
SIFTER: dict[str, Any] = {"method": "low_loss"}
PLAIN: dict[str, Any] = {"method": "plain", "settings": {"trainer": {"epochs": 2}}}


def grid_of(*defences: dict[str, Any], **changes: Any) -> Grid:
    data = [{"name": "digits", "images": 600, "arch": ["small_cnn:width=4"], "trainer": {"epochs": 3}}]
    return quick_grid(**{"seeds": [0], "data": data, "attacks": [BADNETS], "defences": list(defences), **changes})


def run(grid: Grid, store: Store) -> list[Event]:
    events: list[Event] = []
    run_local(grid, store, device=CPU, on_event=events.append)
    assert [event.error for event in events if event.error] == []
    return events


def detail_of(store: Store, record: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(store.file(record, DETAIL_FILE))
    return content


def test_names_of_methods_are_unique_whatever_they_do() -> None:
    rooms = (ATTACKS, DETECTORS, PURIFIERS, SIFTERS, SAFE_TRAINERS)
    names = [name for room in rooms for name in room]
    assert len(set(names)) == len(names)
    assert set(DEFENCES) == set(names) - set(ATTACKS)


def test_attacks_that_steer_training_are_those_that_say_so() -> None:
    steering = {name for name in ATTACKS if not poisons_data(name)}
    assert {"wanet", "bpp", "input_aware", "imc"} <= steering
    for name, kind in ATTACKS.items():
        attack = kind()
        if not isinstance(attack, CraftedAttack):  # what comes of crafting says it then, and victims find out
            assert isinstance(attack, SteersTraining) == (name in steering), name


def test_a_training_set_is_made_again_as_the_victim_learnt_it(store: Store) -> None:
    surrogate = {"arch": "small_cnn:width=4", "epochs": 1}
    settings = {"target_label": 2, "steps": 2, "surrogate": surrogate}
    crafted = {"method": "label_consistent", "settings": settings, "poison_rates": [0.02]}
    fine_tuned = {**BADNETS, "fine_tune": True, "seeds": [4], "settings": {"size": 2}}
    run(grid_of(attacks=[BADNETS, TACT, BENIGN, crafted, fine_tuned]), store)
    bench = Workbench(store=store, device=CPU)
    counts = []
    for record in store.records("victims"):
        made = bench.poisoned_set(record["key"], record["spec"])
        assert set_digest(made.data) == record["training_set"]
        assert len(made.data) == 600
        counts.append((record["facts"]["attack_method"], int(made.is_poisoned.sum()), made.is_cover is not None))
        assert bench.poisoned_set(record["key"], record["spec"]) is made
    assert ("none", 0, False) in counts
    assert ("badnets", 60, False) in counts
    assert ("tact", 30, True) in counts


def test_the_victims_own_training_set_is_what_its_record_tells(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, learnt = Trainer.fit, []

    def spy(self: Trainer, model: torch.nn.Module, data: Any, **rest: Any) -> torch.nn.Module:
        learnt.append(set_digest(data))
        return fit(self, model, data, **rest)

    monkeypatch.setattr(Trainer, "fit", spy)
    run(grid_of(), store)
    assert [record["training_set"] for record in store.records("victims")] == learnt


def test_another_set_than_the_victims_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(grid_of(), store)
    (record,) = store.records("victims")
    whole = ATTACKS["badnets"].poison  # type: ignore[union-attr]

    def otherwise(self: Any, clean: Any, *, generator: Generator) -> Any:
        torch.rand(1, generator=generator)
        return whole(self, clean, generator=generator)

    monkeypatch.setattr(ATTACKS["badnets"], "poison", otherwise)
    events: list[Event] = []
    run_local(grid_of(SIFTER), store, device=CPU, on_event=events.append)
    assert [event.state for event in events] == ["present", "failed"]
    assert f"the training set of the victim {record['key'][:12]} cannot be made again here" in str(events[1].error)


def test_a_sifting_holds_the_list_against_the_attackers(store: Store) -> None:
    grid = grid_of({**SIFTER, "settings": {"in_parts": True}}, attacks=[BADNETS, TACT, BENIGN], clean=[60])
    assert [cell.kind for cell in grid.cells] == ["victims", "siftings"] * 3
    run(grid, store)
    bench = Workbench(store=store, device=CPU)
    for record in store.records("siftings"):
        victim = store.read("victims", record["victim_key"])
        made = bench.poisoned_set(victim["key"], victim["spec"])
        found, poisons = record["metrics"]["sifting"], int(made.is_poisoned.sum())
        covers = 0 if made.is_cover is None else int(made.is_cover.sum())
        assert found["tpr"]["n"] == poisons
        assert found["fpr"]["n"] == 600 - poisons - covers
        assert found["listed"]["n"] == 600
        assert found["covers_listed"]["n"] == covers
        assert (found["auroc"] is None) == (poisons == 0)
        assert set(record["metrics"]["parts"]) == {"loss", "nobody"}
        assert record["metrics"]["parts"]["loss"] == found
        assert record["metrics"]["parts"]["nobody"]["listed"]["hits"] == 0
        assert record["metrics"]["before"] == victim["metrics"]["before"]
        told = detail_of(store, record)["sifting"]
        assert sum(told["histogram"]["poisoned"]) == poisons
        assert sum(told["histogram"]["clean"]) == 600 - poisons - covers
        assert set(told["parts"]) == {"loss", "nobody"}
    report = verify(store, grid=grid, sample=9)
    assert (report.faults, report.missing, len(report.measured)) == ([], [], 3)
    view = SEEN[0]
    assert len(view.clean) == 60
    assert not view.flip
    assert view.model is not None
    built = view.build_model(torch.Generator().manual_seed(1))
    assert {name: value.shape for name, value in built.state_dict().items()} == {
        name: value.shape for name, value in view.model.state_dict().items()
    }
    rows = [row for row in load_cells(store).to_pylist() if row["kind"] == "sifting"]
    assert {row["defence_kind"] for row in rows} == {"sifter"}
    assert all(row["acc"] is None and row["fpr"] is not None for row in rows)
    shown = table(
        load_cells(store), Query(by=("defence", "attack"), metrics=("auroc", "tpr", "fpr", "precision", "listed"))
    )
    by_attack = {row["attack"]: row for row in shown.rows.to_pylist() if row["defence"] != "none"}
    assert by_attack["benign"]["auroc"] is None
    assert by_attack["benign"]["listed"] == pytest.approx(0.1)
    assert by_attack["badnets"]["tpr"] == next(row["tpr"] for row in rows if row["attack"] == "badnets")


def test_a_sifter_of_its_own_model_and_without_clean_images_gets_neither(store: Store) -> None:
    grid = grid_of({**SIFTER, "own_model": True, "clean": [0]}, SIFTER)
    labels = [cell.defence for cell in grid.cells if cell.kind == "siftings"]
    assert labels == ["low_loss own_model=True", "low_loss"]
    run(grid, store)
    alone, given = SEEN
    assert (alone.model, alone.clean) == (None, None)
    assert given.model is not None
    auroc = {record["metrics"]["sifting"]["auroc"] for record in store.records("siftings")}
    assert len(auroc) == 2


def test_no_clean_image_is_in_the_training_set_too(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Workbench.clean_images

    def with_copies(self: Workbench, spec: dict[str, Any]) -> Any:
        train = self.training_set(spec["victim"])
        drawn = draw(self, spec)
        images = torch.cat([drawn.images, train.images[:5]])
        return dataclasses.replace(drawn, images=images, labels=torch.cat([drawn.labels, train.labels[:5]]))

    monkeypatch.setattr(Workbench, "clean_images", with_copies)
    run(grid_of(SIFTER, attacks=[BENIGN]), store)
    (record,) = store.records("siftings")
    assert len(SEEN[0].clean) == 60
    assert detail_of(store, record)["notes"][0].startswith("5 of the clean images are in the training set too")


def test_a_training_is_measured_beside_the_plain_victim(store: Store) -> None:
    grid = grid_of(PLAIN, attacks=[BADNETS, BENIGN], clean=[0])
    assert [cell.kind for cell in grid.cells] == ["victims", "trainings"] * 2
    run(grid, store)
    for record in store.records("trainings"):
        victim = store.read("victims", record["victim_key"])
        assert record["metrics"]["before"] == victim["metrics"]["before"]
        assert record["metrics"]["compare"]["acc_loss"] == pytest.approx(
            victim["metrics"]["before"]["acc"]["value"] - record["metrics"]["after"]["acc"]["value"]
        )
        assert len(detail_of(store, record)["history"]) == 2
        assert record["cost"]["image_passes"] == pytest.approx(2 * 600, rel=0.2)
        assert MODEL_FILE in record["files"]
    assert verify(store, grid=grid, sample=9).faults == []
    rows = [row for row in load_cells(store).to_pylist() if row["kind"] == "training"]
    assert {row["defence_kind"] for row in rows} == {"safe trainer"}
    assert all(row["acc"] is not None and row["auroc"] is None for row in rows)


def test_a_cell_done_again_is_the_stored_one_and_a_wrong_number_is_found(store: Store) -> None:
    grid = grid_of(SIFTER, PLAIN)
    run(grid, store)
    for cell in grid.cells:
        assert repeat(cell, store, device=CPU, num_threads=1)[1] == []
    (record,) = store.records("siftings")
    metrics = record["metrics"]
    metrics["sifting"]["tpr"]["value"] = 0.123
    assert any("sifting.tpr" in line for line in inconsistencies(metrics, ("before",)))


def test_a_purifier_that_takes_the_training_set_gets_it(store: Store) -> None:
    data = [{"name": "digits", "arch": ["small_cnn:width=8"], "trainer": {"epochs": 6}}]
    run(grid_of({"method": "relearns"}, {"method": "bn_refresh"}, data=data), store)
    (view,) = SEEN
    (victim,) = store.records("victims")
    assert set_digest(view.untrusted) == victim["training_set"]


@pytest.mark.parametrize("defence", ["low_loss", "plain", "relearns"])
def test_an_attack_that_poisons_no_data_is_refused_unless_excluded(defence: str) -> None:
    attacks = [BADNETS, {"method": "wanet"}]
    with pytest.raises(PlanError, match=f"{defence} looks at the training set, and wanet poisons none"):
        grid_of({"method": defence}, attacks=attacks)
    left_out = [{"reason": "no data", "attack": "wanet", "defence": defence}]
    grid = grid_of({"method": defence}, {"method": "bn_refresh"}, attacks=attacks, exclude=left_out)
    assert len(grid.cells) == 2 + 1 + 2


def test_budgets_of_nothing_and_own_models_are_for_some_only() -> None:
    for method in ("low_loss", "plain"):
        assert grid_of({"method": method}, clean=[0]).cells[1].spec["clean_images"] == 0
    with pytest.raises(PlanError, match="a clean budget of 0 asks for 0 images"):
        grid_of({"method": "bn_refresh"}, clean=[0])
    with pytest.raises(PlanError, match="clean budget of 1 asks"):
        grid_of(SIFTER, clean=[1])
    with pytest.raises(PlanError, match="take `own_model` away"):
        grid_of({"method": "plain", "own_model": True})


def test_shards_keep_all_of_a_victim_together() -> None:
    grid = grid_of(SIFTER, PLAIN, {"method": "relearns"}, attacks=[BADNETS, BENIGN])
    parts = [grid.shard(index, 2) for index in range(2)]
    assert [[cell.kind for cell in part.cells] for part in parts] == [
        ["victims", "purifications", "siftings", "trainings"]
    ] * 2


def test_a_victim_of_a_version_without_digests_can_be_sifted(store: Store) -> None:
    run(grid_of(), store)
    (record,) = store.records("victims")
    del record["training_set"]
    record["checksum"] = checksum_of(record)
    Path(store.path("victims", record["key"])).write_bytes(canonical(record))
    assert [event.state for event in run(grid_of(SIFTER), store)] == ["present", "computed"]


def test_a_set_is_poisoned_alike_by_implant_and_by_the_benchmark(store: Store) -> None:
    run(grid_of(), store)
    (record,) = store.records("victims")
    bench = Workbench(store=store, device=CPU)
    victim = implant(
        ATTACKS["badnets"](**record["spec"]["attack"]["settings"]),
        bench.training_set(record["spec"]),
        bench.test_set(record["spec"]),
        arch="small_cnn:width=4",
        trainer=Trainer(epochs=1),
        seed=0,
        data_name="digits",
    )
    assert victim.poisoned is not None
    assert set_digest(victim.poisoned.data) == record["training_set"]
