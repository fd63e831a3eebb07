"""Audits of a plan's purified models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.plans import quick_grid
from lustral.bench.audits import audits_of, run_audits
from lustral.bench.plan import PlanError
from lustral.bench.runner import run_local
from lustral.bench.upkeep import find_waste, remove_waste, verify
from lustral.store.store import Store
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


def test_audits_are_made_once_and_belong_to_their_results(tmp_path: Path) -> None:
    grid = quick_grid(**{**PLAN, "defences": PLAN["defences"][:1]})
    store = Store(str(tmp_path)).open(create=True)
    audits = audits_of(grid, QUICK)
    (one,) = audits  # not of the benign model
    assert [state for _, state, _ in run_audits(audits, store, QUICK, device=CPU)] == ["blocked"]
    run_local(grid, store, device=CPU)
    ((_, state, record),) = run_audits(audits, store, QUICK, device=CPU)
    assert state == "computed"
    assert record is not None
    assert record["result_key"] == one.result.key
    assert set(record["metrics"]) == {"before", "retuned", "retuned_clean", "resistance", "pushed", "path"}
    assert record["facts"]["defence"] == "bn_refresh"
    ((_, state, again),) = run_audits(audits, store, QUICK, device=CPU)
    assert state == "present"
    assert again is not None
    assert again["metrics"] == record["metrics"]
    ((_, state, _),) = run_audits(audits_of(grid, replace(QUICK, hidden=9)), store, QUICK, device=CPU)
    assert state == "computed"  # other settings, another audit
    assert not verify(store, grid=grid, sample=0).faults
    assert not find_waste(store, keep=[grid]).records
    remove_waste(store, find_waste(store, keep=[quick_grid(**{**PLAN, "defences": []})]))
    assert not store.keys("audits")
    assert not store.keys("results")


def test_the_audits_of_a_victim_share_their_controls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attacks = [*({"method": "badnets", "target_labels": [label]} for label in (3, 4)), {"method": "none"}]
    defences = [{"method": "bn_refresh"}, {"method": "bn_refresh", "settings": {"passes": 3}}]
    grid = quick_grid(**{**PLAN, "attacks": attacks, "defences": defences})
    store = Store(str(tmp_path)).open(create=True)
    run_local(grid, store, device=CPU)
    made: list[str] = []
    whole = Reactivation.controls

    def counted(self: Reactivation, victim: Victim, **rest: Any) -> Controls:
        made.append(str(victim.relabel(torch.zeros(1, dtype=torch.int64), 10).item()))
        return whole(self, victim, **rest)

    monkeypatch.setattr(Reactivation, "controls", counted)
    outcomes = list(run_audits(audits_of(grid, QUICK), store, QUICK, device=CPU))
    assert [state for _, state, _ in outcomes] == ["computed"] * 4
    assert made == ["3", "4"]
    rates = [record["metrics"]["retuned"]["benign"] for _, _, record in outcomes if record is not None]
    assert rates[0] == rates[1]
    assert rates[2] == rates[3]


def test_an_audit_without_its_result_is_a_fault(tmp_path: Path) -> None:
    grid = quick_grid(**{**PLAN, "defences": PLAN["defences"][:1]})
    store = Store(str(tmp_path)).open(create=True)
    run_local(grid, store, device=CPU)
    list(run_audits(audits_of(grid, QUICK), store, QUICK, device=CPU))
    for key in store.keys("results"):
        store.remove("results", key)
    (fault,) = verify(store, sample=0).faults
    assert "its result is missing" in fault


def test_a_plan_without_a_benign_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"none for digits, .*, seed 0: add an attack with method none"):
        audits_of(quick_grid(**{**PLAN, "attacks": PLAN["attacks"][:1]}), QUICK)


def test_detectors_are_not_audited() -> None:
    assert {audit.result.spec["defence"]["method"] for audit in audits_of(quick_grid(**PLAN), QUICK)} == {"bn_refresh"}
