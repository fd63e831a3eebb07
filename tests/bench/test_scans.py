"""Scans as cells: one scan of a victim serves every purifier that starts from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.plans import quick_grid
from lustral.bench.columns import defence_label
from lustral.bench.grid import Grid
from lustral.bench.runner import Event, run_local
from lustral.bench.verification import verify
from lustral.bench.workbench import Workbench
from lustral.core.randomness import child
from lustral.store.store import Store
from lustral.vision.detectors import MaskArea
from lustral.vision.erasing import erase
from lustral.vision.evaluation import Evaluation
from lustral.vision.inverters import MaxEntropy
from lustral.vision.purifiers import Mesa
from lustral.vision.records import DefenderView, Verdict
from lustral.vision.verdict_files import read_verdict

CPU = torch.device("cpu")
SEARCH = {"steps": 4, "samples": 16, "hidden": 8}
ONCE = {"epochs": 1}
DEFENCES: list[dict[str, Any]] = [
    {
        "method": "baeraser",
        "label": "BaEraser",
        "settings": {"inverter": SEARCH, "rounds": 1, "trainer": ONCE, "least_steps": 4},
        "scan": {"inverter": SEARCH},
        "audit": False,
    },
    {
        "method": "mesa",
        "label": "MESA",
        "settings": {"inverter": SEARCH, "trainer": ONCE, "least_steps": 4},
        "scan": {"inverter": SEARCH},
        "audit": False,
    },
]


def grid_of(*defences: dict[str, Any], **changes: Any) -> Grid:
    attacks = [{"method": "badnets", "target_labels": [3]}]
    return quick_grid(**{"seeds": [0], "attacks": attacks, "defences": list(defences), **changes})


def run(grid: Grid, store: Store) -> list[Event]:
    events: list[Event] = []
    run_local(grid, store, device=CPU, on_event=events.append)
    return events


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store")).open(create=True)


def test_one_scan_serves_every_purifier_of_a_victim(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Verdict] = []
    whole = MaskArea.inspect

    def accuse(self: MaskArea, view: DefenderView, **rest: Any) -> Verdict:
        found = whole(self, view, **rest)
        searched.append(
            dataclasses.replace(found, outcome="backdoored", suspect_labels=(found.triggers[0].target_label,))
        )
        return searched[-1]

    monkeypatch.setattr(MaskArea, "inspect", accuse)
    grid = grid_of(*DEFENCES)
    assert [cell.kind for cell in grid.cells] == ["victims", "scans", "purifications", "purifications"]
    assert [event.state for event in run(grid, store)] == ["computed"] * 4
    (verdict,) = searched
    (scan,) = store.records("scans")
    assert {"result.json", "triggers.safetensors", "detail.json", "recovered.png"} == set(scan["files"])
    victim, _, baeraser, mesa = grid.cells
    for cell in (baeraser, mesa):
        assert [need.key for need in cell.needs] == [victim.key, scan["key"]]
        record = store.read("purifications", cell.key)
        assert record["cost"]["seconds"] > scan["cost"]["seconds"]  # what it started from is part of what it took
        assert record["cost"]["image_passes"] > scan["cost"]["image_passes"]
    bench = Workbench(store=store, device=CPU)
    loaded = bench.victim(victim.key)
    view = DefenderView(model=loaded.model, clean=bench.clean_images(mesa.spec))
    with store.as_folder(scan) as folder:
        read = read_verdict(folder, view)
    assert read.evidence == verdict.evidence
    assert torch.equal(read.triggers[0].masks, verdict.triggers[0].masks)
    by_hand = erase(
        Mesa(
            **{
                "least_steps": 4,
                "inverter": MaxEntropy(**SEARCH),
                "trainer": dataclasses.replace(Mesa().trainer, **ONCE),
            }
        ),
        dataclasses.replace(view, verdict=verdict),
        generator=child(0, "erase"),
        audit=False,
    )
    after = bench.evaluate(loaded, by_hand.model, victim.spec)
    stored = store.read("purifications", mesa.key)["metrics"]["after"]
    assert Evaluation.from_dict({**stored, "per_class": []}).acc == after.acc
    assert not verify(store, grid=grid, sample=9).faults
    store.remove("scans", scan["key"])
    assert sum("its scan" in fault for fault in verify(store, sample=0).faults) == 2


def test_a_detector_of_the_plan_is_that_scan_if_its_settings_are_equal() -> None:
    own = {"method": "mask_area", "label": "areas", "settings": {"inverter": SEARCH}}
    grid = grid_of(own, *DEFENCES)
    (scan,) = grid.of_kind("scans").cells
    assert scan.defence == "areas"
    assert {cell.needs[1].key for cell in grid.of_kind("purifications").cells} == {scan.key}
    other = grid_of({**own, "settings": {}}, *DEFENCES)
    assert len(other.of_kind("scans").cells) == 2
    twice = grid_of(*DEFENCES, clean=[60, 70], defence_seeds=[0, 1])
    assert len(twice.of_kind("scans").cells) == 4  # other clean images, another scan
    assert len(twice.of_kind("purifications").cells) == 8


def test_a_failed_scan_blocks_what_starts_from_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Verdict:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(MaskArea, "inspect", fail)
    events = run(grid_of(DEFENCES[0], {"method": "bn_refresh"}), store)
    states = {event.cell.defence: (event.state, event.error) for event in events}
    assert states["BaEraser"] == ("blocked", "its scan failed")
    assert states["bn_refresh"] == ("computed", None)


def test_what_starts_from_a_scan_is_named_by_it() -> None:
    (cell,) = grid_of({**DEFENCES[1], "label": None, "settings": {}}).of_kind("purifications").cells
    label = defence_label(cell.spec["defence"], cell.spec["scan"])
    assert (
        label
        == "mesa scan: mask_area inverter.hidden=8 inverter.steps=4 inverter.samples=16 audit=False"
        == cell.defence
    )
    (plain,) = grid_of({"method": "mesa"}).of_kind("purifications").cells
    assert plain.defence == "mesa"
