"""Audits of a plan's purified models."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.plans import quick_grid
from lustral.bench.expansion import with_audits
from lustral.bench.grid import Grid
from lustral.bench.kinds import Audits
from lustral.bench.plan import PlanError
from lustral.bench.runner import Event, run_local
from lustral.bench.verification import verify
from lustral.store.store import Store
from lustral.store.waste import find_waste, remove_waste
from lustral.tables.rows import load_cells
from lustral.training import Trainer
from lustral.vision.evaluation import Controls, Reactivation
from lustral.vision.records import Victim

CPU = torch.device("cpu")
ONCE = Trainer(epochs=1, batch_size=64, learning_rate=0.01)
QUICK = Reactivation(
    trainer=ONCE,
    clean_epochs=1,
    push_images=20,
    push_trainer=replace(ONCE, channels_last=False),
    hidden=8,
    path=(0.0, 1.0),
)
PLAN = {
    "seeds": [0],
    "attacks": [{"method": "badnets", "target_labels": [3]}, {"method": "none"}],
    "defences": [
        {"method": "bn_refresh"},
        {"method": "mask_area", "settings": {"inverter": {"steps": 2, "samples": 8}}},
    ],
}


def audits_of(grid: Grid, settings: Reactivation = QUICK) -> Grid:
    return with_audits(grid, Audits(settings=settings))


def run(grid: Grid, store: Store) -> list[Event]:
    events: list[Event] = []
    run_local(grid, store, device=CPU, on_event=events.append)
    return events


def test_audits_are_made_once_and_belong_to_their_purifications(tmp_path: Path) -> None:
    grid = quick_grid(**{**PLAN, "defences": PLAN["defences"][:1]})
    store = Store(str(tmp_path)).open(create=True)
    audits = audits_of(grid).of_kind("audits")
    (one,) = audits.cells  # not of the benign model
    assert [(event.state, event.error) for event in run(audits, store)] == [
        ("blocked", "its victim is not in the store")
    ]
    run(grid, store)
    assert [event.state for event in run(audits, store)] == ["computed"]
    record = store.read("audits", one.key)
    assert record["purification_key"] == one.needs[1].key
    assert record["victim_key"] == one.victim_key
    assert set(record["metrics"]) == {"before", "retuned", "retuned_clean", "resistance", "pushed", "path"}
    assert record["facts"]["defence"] == "bn_refresh"
    assert record["title"] == "audit of bn_refresh against badnets on digits, seed 0"
    assert [event.state for event in run(audits, store)] == ["present"]
    other = audits_of(grid, replace(QUICK, hidden=9)).of_kind("audits")
    assert [event.state for event in run(other, store)] == ["computed"]  # other settings, another audit
    assert not verify(store, grid=audits_of(grid), sample=9).faults
    assert not find_waste(store, keep=[cell.spec for cell in grid.cells]).records
    bare = quick_grid(**{**PLAN, "defences": []})
    remove_waste(store, find_waste(store, keep=[cell.spec for cell in bare.cells]))
    assert not store.keys("audits")
    assert not store.keys("purifications")


def test_the_audits_of_a_victim_share_their_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = [*({"method": "badnets", "target_labels": [label]} for label in (3, 4)), {"method": "none"}]
    defences = [{"method": "bn_refresh"}, {"method": "bn_refresh", "settings": {"passes": 3}}]
    grid = audits_of(quick_grid(**{**PLAN, "attacks": attacks, "defences": defences}))
    store = Store(str(tmp_path)).open(create=True)
    made: list[str] = []
    whole = Reactivation.controls

    def counted(self: Reactivation, victim: Victim, **rest: Any) -> Controls:
        made.append(str(victim.relabel(torch.zeros(1, dtype=torch.int64), 10).item()))
        return whole(self, victim, **rest)

    monkeypatch.setattr(Reactivation, "controls", counted)
    assert Counter(event.state for event in run(grid, store)) == {"computed": 3 + 6 + 4}
    assert made == ["3", "4"]
    records = [store.read("audits", cell.key) for cell in grid.of_kind("audits").cells]
    rates = [record["metrics"]["retuned"]["benign"] for record in records]
    assert rates[0] == rates[1]
    assert rates[2] == rates[3]
    audited = run(grid.shard(1, 3).of_kind("audits"), store)  # each part has the benign model that its audits need
    assert [event.state for event in audited] == ["present"] * 2


def test_a_model_without_weights_is_not_audited_and_a_failed_audit_is_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = {**PLAN, "defences": PLAN["defences"][:1]}
    store = Store(str(tmp_path)).open(create=True)
    bare = audits_of(quick_grid(**plan, run={"threads": 1, "keep_models": False}))
    assert run(bare, store)[-1].error == "its purification has no model.safetensors"

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    for key in store.keys("purifications"):
        store.remove("purifications", key)
    monkeypatch.setattr(Reactivation, "controls", fail)
    event = run(audits_of(quick_grid(**plan)), store)[-1]
    assert (event.state, event.error) == ("failed", "RuntimeError: no such luck")
    assert store.read("failures", event.cell.key)["title"] == event.cell.title
    assert load_cells(store).num_rows == 4  # tables show what was measured: nobody waits for a row of an audit


def test_an_audit_without_its_purification_is_a_fault(tmp_path: Path) -> None:
    grid = quick_grid(**{**PLAN, "defences": PLAN["defences"][:1]})
    store = Store(str(tmp_path)).open(create=True)
    run(audits_of(grid), store)
    for key in store.keys("purifications"):
        store.remove("purifications", key)
    (fault,) = verify(store, sample=0).faults
    assert "its purification" in fault
    assert "is missing" in fault


def test_a_plan_without_a_benign_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"none for digits, .*, seed 0: add an attack with method none"):
        audits_of(quick_grid(**{**PLAN, "attacks": PLAN["attacks"][:1]}))


def test_scans_are_not_audited() -> None:
    audits = audits_of(quick_grid(**PLAN)).of_kind("audits")
    assert {cell.columns["defence_method"] for cell in audits.cells} == {"bn_refresh"}
