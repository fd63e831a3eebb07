"""Checks, repetitions, clean-ups and estimates of a store with real cells in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save

from bench.plans import QUICK, quick_grid
from bench.synthetic import synthetic_store
from lustral.bench.grid import Grid
from lustral.bench.kinds import KINDS as KINDS_OF_CELLS
from lustral.bench.kinds import cell_of
from lustral.bench.runner import Event, RunSummary, run_local
from lustral.bench.verification import differences, inconsistencies, repeat, verify
from lustral.bench.workbench import StoreAssets
from lustral.core.files import canonical
from lustral.core.rates import Rate
from lustral.core.records import Cost
from lustral.core.versions import current_versions
from lustral.store.estimate import estimate
from lustral.store.store import KINDS, Kind, Store, StoreError, checksum_of, content_key
from lustral.store.waste import UNREADABLE, Waste, find_waste, remove_waste
from lustral.training import Trainer
from lustral.vision.detectors import MaskArea
from lustral.vision.evaluation import Evaluation, compare_evaluations
from lustral.vision.images import as_float
from lustral.vision.models import load_model
from lustral.vision.purifiers import BNRefresh
from lustral.vision.records import Verdict
from lustral.vision.sources import load_source

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "seeds": [0],
    "data": [{**QUICK["data"][0], "image_size": 16}],
    "attacks": [{"method": "badnets", "target_labels": [3]}, {"method": "none"}],
}


@pytest.fixture(scope="module")
def grid() -> Grid:
    return quick_grid(**SMALL)


@pytest.fixture(scope="module")
def finished(grid: Grid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all cells of the plan: two victims, four results."""
    folder = tmp_path_factory.mktemp("upkeep") / "store"
    assert run_local(grid, Store(str(folder)).open(create=True), device=CPU) == RunSummary(computed=6)
    return folder


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> Store:
    shutil.copytree(finished, tmp_path / "store")
    return Store(str(tmp_path / "store")).open(create=False)


def victim_of(store: Store, attack: str = "badnets") -> dict[str, Any]:
    (record,) = (record for record in store.records("victims") if record["facts"]["attack"] == attack)
    return record


def result_of(store: Store, defence: str = "fine_tuning", attack: str = "badnets") -> dict[str, Any]:
    (record,) = (
        record
        for record in store.records("purifications")
        if (record["facts"]["defence_method"], record["facts"]["attack"]) == (defence, attack)
    )
    return record


def rewrite(store: Store, kind: Kind, record: dict[str, Any]) -> None:
    """Write a record back as somebody would who wants it to look right."""
    Path(store.path(kind, record["key"])).write_bytes(canonical({**record, "checksum": checksum_of(record)}))


def specs(*grids: Grid) -> list[Mapping[str, Any]]:
    return [cell.spec for grid in grids for cell in grid.cells]


def flip(path: str, position: int = -5) -> None:
    """Change one bit of a file."""
    content = bytearray(Path(path).read_bytes())
    content[position] ^= 1
    Path(path).write_bytes(bytes(content))


def whole(store: Store) -> dict[str, bytes]:
    return {path: Path(path).read_bytes() for path in store.disk.fs.find(store.root)}


# Verify


def test_nothing_is_wrong_with_a_good_store(store: Store, grid: Grid) -> None:
    before, steps = whole(store), []
    report = verify(store, grid=grid, sample=99, on_step=lambda *step: steps.append(step))
    assert (report.faults, report.missing, report.failed) == ([], [], [])
    assert report.records == {**dict.fromkeys(KINDS, 0), "victims": 2, "purifications": 4}
    assert report.files == sum(len(record["files"]) for kind in KINDS for record in store.records(kind)) == 16
    assert sorted(report.measured) == sorted(cell.title for cell in grid.cells)
    assert {what for what, _, _ in steps} == {"checking victims", "checking purifications", "measuring again"}
    assert steps[-1] == ("measuring again", 6, 6)
    assert whole(store) == before


def test_the_sample_is_as_large_as_asked_and_drawn_by_the_seed(store: Store) -> None:
    assert verify(store, sample=0).measured == []
    drawn = {tuple(verify(store, sample=1, seed=seed).measured) for seed in range(8)}
    assert len(drawn) > 1
    assert verify(store, sample=1, seed=3).measured == verify(store, sample=1, seed=3).measured
    with pytest.raises(ValueError, match="sample"):
        verify(store, sample=-1)


@pytest.mark.parametrize("kind", ["victims", "purifications"])
def test_a_flipped_bit_in_any_record(store: Store, kind: Kind) -> None:
    for key in store.keys(kind):
        path = store.path(kind, key)
        good = Path(path).read_bytes()
        for position in (1, len(good) // 3, len(good) // 2, -2):
            flip(path, position)
            assert any(key[:12] in fault for fault in verify(store, sample=0).faults), position
            Path(path).write_bytes(good)
    assert not verify(store, sample=0).faults


def test_a_flipped_bit_in_any_file(store: Store) -> None:
    for kind in ("victims", "purifications"):
        for record in list(store.records(kind)):
            for name in record["files"]:
                path = f"{store.folder(record)}/{name}"
                flip(path)
                faults = verify(store, sample=0).faults
                assert any(f"{path} has changed" in fault for fault in faults), name
                flip(path)
    assert not verify(store, sample=0).faults


def test_a_missing_file_and_a_file_that_cannot_be_read(store: Store) -> None:
    record = result_of(store)
    path = Path(store.folder(record), "detail.json")
    path.unlink()
    assert verify(store, sample=0).faults == [f"{path} is missing"]
    path.mkdir()
    (fault,) = verify(store, sample=0).faults
    assert "detail.json" in fault


def test_a_missing_victim(store: Store, grid: Grid) -> None:
    victim = victim_of(store)
    store.remove("victims", victim["key"])
    report = verify(store, grid=grid, sample=99)
    missing = [fault for fault in report.faults if f"its victim {victim['key'][:12]} is missing" in fault]
    assert len(missing) == 2
    assert all(fault.startswith("purifications/") and "against badnets on digits, seed 0" in fault for fault in missing)
    assert report.missing == ["badnets on digits, seed 0"]


def test_a_missing_start_of_a_fine_tuned_victim(store: Store) -> None:
    attacks = [{"method": "badnets", "fine_tune": True}]
    run_local(quick_grid(**{**SMALL, "attacks": attacks, "defences": []}), store, device=CPU)
    assert not verify(store, sample=0).faults
    store.remove("victims", victim_of(store, "benign")["key"])
    faults = verify(store, sample=0).faults
    assert sum("its victim" in fault for fault in faults) == 3  # two results and the fine-tuned victim


def test_the_count_against_the_plan(store: Store, grid: Grid) -> None:
    removed = result_of(store)
    store.remove("purifications", removed["key"])
    report = verify(store, grid=grid, sample=0)
    assert (report.faults, report.missing, report.failed) == ([], [removed["title"]], [])
    store.put("failures", removed["key"], {"spec": removed["spec"], "title": removed["title"], "error": "x"})
    report = verify(store, grid=grid, sample=0)
    assert (report.faults, report.missing, report.failed) == ([], [], [removed["title"]])
    larger = quick_grid(**{**SMALL, "seeds": [0, 1]})
    assert len(verify(store, grid=larger, sample=0).missing) == 6
    assert verify(store, sample=0).missing == []


def test_a_record_under_another_name(store: Store) -> None:
    record = result_of(store)
    other = Path(store.path("purifications", "f" * 64))
    other.parent.mkdir(exist_ok=True)
    shutil.copy(store.path("purifications", record["key"]), other)
    assert any("another name" in fault for fault in verify(store, sample=0).faults)
    other.unlink()
    shutil.copytree(Path(store.root, "purifications"), Path(store.root, "victims"), dirs_exist_ok=True)
    assert sum("filed as another kind" in fault for fault in verify(store, sample=0).faults) == 4


@pytest.mark.parametrize("field", ["spec", "facts", "metrics", "victim_key"])
def test_a_record_that_lacks_a_field(store: Store, field: str) -> None:
    record = result_of(store)
    del record[field]
    rewrite(store, "purifications", record)
    (fault,) = verify(store, sample=99).faults
    assert record["key"][:12] in fault
    assert field in fault


def test_a_result_hung_on_another_victim(store: Store) -> None:
    record = result_of(store)
    rewrite(store, "purifications", {**record, "victim_key": victim_of(store, "benign")["key"]})
    (fault,) = verify(store, sample=0).faults
    assert "names another victim" in fault


def test_the_victims_of_the_first_layout_stay_in_use(store: Store, grid: Grid) -> None:
    """There, a purification was a "result", whose specification has another name."""
    former = result_of(store)
    for key in store.keys("purifications"):
        store.remove("purifications", key)
    spec = {**former["spec"], "kind": "result"}
    store.put("results", content_key(spec), {**former, "kind": "result", "spec": spec})
    Path(store.root, "store.json").write_bytes(canonical({"layout": 1}))
    events: list[Event] = []
    opened = Store(store.url).open(create=True)
    assert run_local(grid, opened, device=CPU, on_event=events.append) == RunSummary(computed=4, present=2)
    assert {event.cell.kind for event in events if event.state == "present"} == {"victims"}
    report = verify(opened, grid=grid, sample=0)
    assert (report.faults, report.missing, report.records["purifications"]) == ([], [], 4)
    assert estimate(grid.cells, opened)[0].done == 6


# Numbers that were improved


def better(metrics: dict[str, Any], **hits: int) -> dict[str, Any]:
    """Return an evaluation with other hits, and with values and intervals to match."""
    return metrics | {name: Rate(count, metrics[name]["n"]).to_dict() for name, count in hits.items()}


def recompared(record: dict[str, Any]) -> dict[str, Any]:
    before, after = (Evaluation.from_dict({**record["metrics"][when], "per_class": []}) for when in ("before", "after"))
    return {**record, "metrics": {**record["metrics"], "compare": compare_evaluations(before, after)}}


@pytest.mark.parametrize("name", ["acc", "asr", "ra", "natural_rate"])
def test_a_model_that_does_not_measure_as_written(store: Store, name: str) -> None:
    """Everything about the forged record is consistent: only the model itself can contradict it."""
    record = result_of(store)
    after = record["metrics"]["after"]
    lie = after[name]["n"] if after[name]["hits"] < after[name]["n"] / 2 else 0
    record["metrics"]["after"] = better(after, **{name: lie})
    rewrite(store, "purifications", recompared(record))
    assert not verify(store, sample=0).faults
    (fault,) = verify(store, sample=99).faults
    assert f"{name} was {lie} of {after[name]['n']}, measured again it is {after[name]['hits']}" in fault
    assert record["title"] in fault


def test_a_victim_that_does_not_measure_as_written(store: Store) -> None:
    """The lie is told in all results on the victim, too."""
    victim = victim_of(store)
    count = victim["metrics"]["before"]["asr"]["n"]
    victim["metrics"]["before"] = better(victim["metrics"]["before"], asr=count, ra=0, acc=360)
    rewrite(store, "victims", victim)
    faults = verify(store, sample=0).faults
    assert len(faults) == 2
    assert all("rates before the defence are not those of its victim" in fault for fault in faults)
    for defence in ("fine_tuning", "bn_refresh"):
        result = result_of(store, defence)
        result["metrics"]["before"] = victim["metrics"]["before"]
        rewrite(store, "purifications", recompared(result))
    assert not verify(store, sample=0).faults
    faults = verify(store, sample=99).faults
    assert faults
    assert all(fault.startswith("badnets on digits, seed 0") and "measured again" in fault for fault in faults)


def test_a_few_images_may_change_sides_on_other_hardware(store: Store) -> None:
    record = result_of(store)
    now = Evaluation.from_dict({**record["metrics"]["after"], "per_class": []})
    for change, count in ((-2, 0), (2, 0), (-3, 1)):
        was = better(record["metrics"]["after"], acc=now.acc.hits + change)
        assert len(differences(was, now)) == count
    many = {**record["metrics"]["after"], "acc": Rate(9000, 10_000).to_dict()}
    for hits, count in ((8980, 0), (8979, 1), (9021, 1)):
        again = Evaluation.from_dict({**many, "acc": Rate(hits, 10_000).to_dict(), "per_class": []})
        assert len(differences(many, again)) == count
    fewer = Evaluation.from_dict({**many, "acc": Rate(8999, 9_999).to_dict(), "per_class": []})
    assert len(differences(many, fewer)) == 1


def test_further_rates_of_an_attack_are_measured_too(store: Store) -> None:
    after = result_of(store)["metrics"]["after"]
    was = {**after, "probes": {"noise_accuracy": Rate(300, 360).to_dict()}}
    again = Evaluation.from_dict({**was, "per_class": [], "probes": {"noise_accuracy": Rate(30, 360).to_dict()}})
    assert differences(was, again) == ["noise_accuracy was 300 of 360, measured again it is 30 of 360"]


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda metrics: metrics["after"]["asr"].update(value=0.0), "after.asr"),
        (lambda metrics: metrics["after"]["acc"].update(low=0.99), "after.acc"),
        (lambda metrics: metrics["after"].update(non_finite=True), "after.non_finite"),
        (lambda metrics: metrics["compare"].update(der=1.0), "compare.der"),
        (lambda metrics: metrics["compare"].update(erased=None), "compare.erased"),
    ],
)
def test_numbers_must_follow_from_the_counts(store: Store, change: Callable[[Any], None], place: str) -> None:
    """Tables read the values, not the counts."""
    record = result_of(store)
    change(record["metrics"])
    rewrite(store, "purifications", record)
    (fault,) = verify(store, sample=0).faults
    assert f"{place} is " in fault
    assert record["key"][:12] in fault


@pytest.mark.parametrize("metrics", [{}, [], "x", None, {"after": {}}])
def test_a_record_without_rates_is_no_good_one(metrics: Any) -> None:
    with pytest.raises(UNREADABLE):
        inconsistencies(metrics, ("before", "after"))


def test_numbers_that_a_later_version_adds_are_not_missed(store: Store) -> None:
    record = result_of(store)
    del record["metrics"]["compare"]["rir"]
    del record["metrics"]["after"]["probes"]
    rewrite(store, "purifications", record)
    assert not verify(store, sample=99).faults


def test_the_numbers_of_a_made_up_store_are_consistent(tmp_path: Path) -> None:
    made_up = synthetic_store(tmp_path, results=40, attacks=3, defences=3, seeds=2)
    for kind in ("victims", "scans", "purifications"):
        rates = KINDS_OF_CELLS[kind].rates
        assert all(not inconsistencies(record["metrics"], rates) for record in made_up.records(kind))
    assert not verify(made_up, sample=0).faults


def test_weights_of_another_model(store: Store) -> None:
    """Somebody put other weights into a store, with all checksums right."""
    record = result_of(store)
    path = Path(store.folder(record), "model.safetensors")
    weights = {name: tensor.flip(0) for name, tensor in load(path.read_bytes()).items()}
    with safe_open(path, "pt") as file:
        content = save(weights, file.metadata())
    path.write_bytes(content)
    record["files"]["model.safetensors"] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    rewrite(store, "purifications", record)
    assert not verify(store, sample=0).faults
    assert any("acc was" in fault and record["title"] in fault for fault in verify(store, sample=99).faults)
    path.write_bytes(b"no weights")
    record["files"]["model.safetensors"] |= {"sha256": hashlib.sha256(b"no weights").hexdigest()}
    rewrite(store, "purifications", record)
    (fault,) = verify(store, sample=99).faults
    assert "cannot be measured again" in fault


def test_rates_are_those_of_the_kept_weights(store: Store, tmp_path: Path) -> None:
    """Counted by hand: the stored models on the test images of the digits."""
    test = load_source("digits", image_size=16).test
    assert test is not None
    victim, result = victim_of(store), result_of(store, "bn_refresh")
    answers = []
    for record, when in ((victim, "before"), (result, "after")):
        (tmp_path / "model.safetensors").write_bytes(store.file(record, "model.safetensors"))
        model = load_model(tmp_path / "model.safetensors").model.eval()
        with torch.inference_mode():
            answers.append(model(as_float(test.images)))
        hits = int((answers[-1].argmax(1) == test.labels).sum())
        assert abs(record["metrics"][when]["acc"]["hits"] - hits) <= 2
    assert not torch.allclose(*answers, atol=1e-3), "both records hold one model"


def test_what_attacks_build_is_built_once(store: Store) -> None:
    calls = []

    def build() -> dict[str, torch.Tensor]:
        calls.append(1)
        return {"weights": torch.arange(4.0, requires_grad=True).view(2, 2).T * len(calls)}

    expected = torch.tensor([[0.0, 2.0], [1.0, 3.0]])
    for url in (store.url, store.url):
        assert torch.equal(StoreAssets(Store(url)).get({"kind": "surrogate", "seed": 0}, build)["weights"], expected)
    assert len(calls) == 1
    StoreAssets(store).get({"kind": "surrogate", "seed": 1}, build)
    assert len(calls) == 2
    report = verify(store, sample=0)
    assert (report.faults, report.records["assets"]) == ([], 2)
    (key, *_) = store.keys("assets")
    flip(f"{store.folder(store.read('assets', key))}/trigger.safetensors")
    assert len(verify(store, sample=0).faults) == 1


def test_a_run_ends_though_its_victim_is_taken_away(store: Store, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody cleans up while it works; nobody else will ever train that victim."""

    def wait(seconds: float) -> None:
        raise AssertionError("it waits for ever")

    def take_away(event: Event) -> None:
        if event.cell.kind == "victims":
            store.remove("victims", event.cell.key)

    monkeypatch.setattr("lustral.bench.runner.time.sleep", wait)
    for key in store.keys("purifications"):
        store.remove("purifications", key)
    assert run_local(grid, store, device=CPU, on_event=take_away) == RunSummary(present=2, failed=4)
    assert all("is not in the store; run the plan" in record["error"] for record in store.records("failures"))


# Clean-up


def test_what_gets_its_record_meanwhile_is_no_leftover(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer names its files between the two looks of a clean-up without any grace."""
    ages, key = store.disk.ages, "e" * 64

    def late(folder: str) -> Any:
        written = store.put("assets", key, {"spec": {}}, {"trigger.safetensors": b"new"}) if not seen else None
        seen.append(written)
        return ages(folder)

    seen: list[Any] = []
    monkeypatch.setattr(store.disk, "ages", late)
    remove_waste(store, find_waste(store, grace_seconds=0))
    assert seen == [True]
    assert store.file(store.read("assets", key), "trigger.safetensors") == b"new"


def test_a_finished_store_holds_no_waste(store: Store, grid: Grid) -> None:
    assert find_waste(store, grace_seconds=0) == Waste()
    assert find_waste(store, keep=specs(grid), failures=True, grace_seconds=0) == Waste()


def test_what_no_plan_names_goes(store: Store, grid: Grid) -> None:
    benign = quick_grid(**{**SMALL, "attacks": [{"method": "none"}]})
    refreshed = quick_grid(**{**SMALL, "attacks": SMALL["attacks"][:1], "defences": [{"method": "bn_refresh"}]})
    gone = result_of(store)
    waste = find_waste(store, keep=specs(benign, refreshed))
    assert waste.records == [("purifications", gone["key"], gone["title"])]
    assert len(find_waste(store, keep=specs(grid, benign)).records) == 0
    before = whole(store)
    waste = find_waste(store, keep=specs(benign))
    assert {kind for kind, _, _ in waste.records} == {"victims", "purifications"}
    assert len(waste.records) == 3
    assert whole(store) == before  # looking removes nothing
    remove_waste(store, waste)
    report = verify(store, grid=benign, sample=0)
    assert (report.faults, report.missing, report.records["victims"], report.records["purifications"]) == ([], [], 1, 2)
    assert find_waste(store, keep=specs(benign), grace_seconds=0) == Waste()
    assert set(whole(store)) < set(before)
    remove_waste(store, waste)  # again: somebody else was faster
    assert run_local(grid, store, device=CPU) == RunSummary(computed=3, present=3)


def test_assets_and_files_of_kept_cells_stay(store: Store, grid: Grid) -> None:
    store.put("assets", "a" * 64, {"title": "surrogate", "spec": {}}, {"trigger.safetensors": b"dear"})
    benign = quick_grid(**{**SMALL, "attacks": [{"method": "none"}]})
    remove_waste(store, find_waste(store, keep=specs(benign), failures=True, grace_seconds=0))
    assert store.file(store.read("assets", "a" * 64), "trigger.safetensors") == b"dear"


def test_failures_go_only_when_asked(store: Store, grid: Grid) -> None:
    failed, stranger = result_of(store), "f" * 64
    store.remove("purifications", failed["key"])
    for key, spec in ((failed["key"], failed["spec"]), (stranger, {})):
        store.put("failures", key, {"spec": spec, "title": "failed", "error": "x"})
    assert find_waste(store).records == []
    assert find_waste(store, keep=specs(grid)).records == [("failures", stranger, "failed")]
    waste = find_waste(store, failures=True)
    assert sorted(key for _, key, _ in waste.records) == sorted([failed["key"], stranger])
    remove_waste(store, waste)
    assert store.keys("failures") == set()
    assert len(store.keys("purifications")) == 3


def test_leftovers_go_after_their_grace(store: Store) -> None:
    before = whole(store)
    orphan = Path(store.root, "files", "ab", "ab" + "0" * 62 + "-0123456789ab")
    orphan.mkdir(parents=True)
    (orphan / "model.safetensors").write_bytes(b"half")
    (Path(store.root) / "victims" / ".0123.tmp").write_bytes(b"half")
    assert find_waste(store) == Waste()
    waste = find_waste(store, grace_seconds=0)
    assert sorted(waste.leftovers) == sorted([str(orphan), f"{store.root}/victims/.0123.tmp"])
    remove_waste(store, waste)
    assert whole(store) == before


def test_nothing_goes_from_a_damaged_store(store: Store) -> None:
    """The files of a record that cannot be read look like leftovers."""
    record = result_of(store)
    flip(store.path("purifications", record["key"]))
    before = whole(store)
    with pytest.raises(StoreError, match=record["key"]):
        find_waste(store, failures=True, grace_seconds=0)
    assert whole(store) == before


# Estimates


def took(store: Store, kind: Kind, seconds: float, **facts: str) -> None:
    for record in list(store.records(kind)):
        if facts.items() <= record["facts"].items():
            rewrite(store, kind, {**record, "made": {**record["made"], "seconds": seconds}})


def test_an_estimate_goes_by_what_like_cells_took(store: Store) -> None:
    took(store, "victims", 10.0, attack="badnets")
    took(store, "victims", 30.0, attack="benign")
    took(store, "purifications", 5.0, defence_method="fine_tuning")
    took(store, "purifications", 2.0, defence_method="bn_refresh")
    larger = quick_grid(**{**SMALL, "seeds": [0, 1, 2]})
    found, states = estimate(larger.cells, store)
    assert (found.done, found.failed, found.left, found.unknown) == (6, 0, 12, 0)
    assert found.seconds == pytest.approx(2 * (10 + 30 + 2 * (5 + 2)))
    assert [states[cell.key] for cell in larger.cells[:3]] == ["done"] * 3
    assert len(states) == 18


def test_an_estimate_without_a_precedent(store: Store, grid: Grid) -> None:
    assert estimate(grid.cells, None)[0].unknown == 6
    assert set(estimate(grid.cells, None)[1].values()) == {"to do"}
    took(store, "victims", 10.0, attack="badnets")
    took(store, "victims", 30.0, attack="benign")
    took(store, "purifications", 7.0)
    other_attack = quick_grid(**{**SMALL, "attacks": [{"method": "blended"}], "defences": []})
    assert estimate(other_attack.cells, store)[0].seconds == 30.0  # the upper median of victims on the same data
    elsewhere = {**SMALL["data"][0], "arch": ["small_cnn:width=4"]}
    other_arch = quick_grid(**{**SMALL, "data": [elsewhere], "attacks": [{"method": "badnets"}], "defences": []})
    assert estimate(other_arch.cells, store)[0].seconds == 10.0  # the same method
    neither = quick_grid(**{**SMALL, "data": [elsewhere], "attacks": [{"method": "blended"}]})
    found, _ = estimate(neither.cells, store)
    assert (found.left, found.unknown, found.seconds) == (3, 1, 14.0)  # defences are known, the attack is not


def test_failed_cells_are_not_to_be_waited_for(store: Store, grid: Grid) -> None:
    record = result_of(store)
    store.put("failures", record["key"], {"spec": record["spec"], "title": "", "error": "x"})
    assert estimate(grid.cells, store)[0].done == 6  # it was done after all
    store.remove("purifications", record["key"])
    found, states = estimate(grid.cells, store)
    assert (found.done, found.failed, found.left, found.seconds) == (5, 1, 0, 0.0)
    assert states[record["key"]] == "failed"


# Repeating


def test_cells_repeat_with_equal_rates(store: Store, grid: Grid) -> None:
    before = whole(store)
    for cell in grid.cells[:2]:
        record, found = repeat(cell, store, device=CPU, num_threads=1)
        assert found == []
        stored = store.read(cell.kind, cell.key)
        assert json.loads(canonical(record["metrics"])) == stored["metrics"]
    assert whole(store) == before


def test_a_cell_that_does_not_repeat(store: Store, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    record = result_of(store)
    count = record["metrics"]["after"]["asr"]["n"]
    record["metrics"]["after"] = better(record["metrics"]["after"], asr=count, ra=0)
    rewrite(store, "purifications", recompared(record))
    _, found = repeat(cell_of(record["spec"]), store, device=CPU, num_threads=1)
    assert [line.partition(" ")[0] for line in found] == ["asr", "ra"]

    def do_nothing(self: Trainer, model: Any, *_: Any, **__: Any) -> Any:
        return model.eval()

    monkeypatch.setattr(Trainer, "fit", do_nothing)
    _, found = repeat(grid.cells[0], store, device=CPU, num_threads=1)
    assert any(line.startswith("acc was") for line in found)


def test_a_verdict_that_does_not_repeat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates before a detector are the victim's own: what can differ is its answer."""
    answers = iter(["backdoored", "backdoored", "clean"])

    def inspect(self: MaskArea, view: Any, **_: Any) -> Verdict:
        outcome: Any = next(answers)
        return Verdict(
            outcome=outcome,
            suspect_labels=(3,) if outcome == "backdoored" else (),
            score=1.0,
            threshold=2.0,
            basis="A toy says so.",
            evidence=(),
            triggers=(),
            cost=Cost(seconds=1.0, image_passes=1.0, peak_memory_bytes=0, clean_images=60),
        )

    monkeypatch.setattr(MaskArea, "inspect", inspect)
    detecting = quick_grid(**{**SMALL, "attacks": SMALL["attacks"][:1], "defences": [{"method": "mask_area"}]})
    assert run_local(detecting, store, device=CPU) == RunSummary(computed=1, present=1)
    cell = detecting.cells[1]
    assert store.read("scans", cell.key)["metrics"]["detection"]["correct"] is True
    assert not verify(store, sample=99).faults  # there are no weights to measure
    assert repeat(cell, store, device=CPU, num_threads=1)[1] == []
    _, found = repeat(cell, store, device=CPU, num_threads=1)
    assert found == ["outcome was 'backdoored', now it is 'clean'", "suspects was [3], now it is []"]


def test_threads_are_given_back_after_a_repetition(store: Store, grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: BNRefresh, *_: Any, **__: Any) -> None:
        assert torch.get_num_threads() == 1
        raise RuntimeError("no such luck")

    before = torch.get_num_threads()
    monkeypatch.setattr(BNRefresh, "purify", fail)
    cell = next(cell for cell in grid.cells if cell.defence == "bn_refresh")
    with pytest.raises(RuntimeError, match="luck"):
        repeat(cell, store, device=CPU, num_threads=1)
    assert torch.get_num_threads() == before


def test_what_older_versions_made_is_kept_until_asked_and_not_repeated(
    store: Store, grid: Grid, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = {**current_versions(), "BNRefresh": 99}
    monkeypatch.setattr("lustral.core.versions.current_versions", lambda: later)
    monkeypatch.setattr(BNRefresh, "version", 99)
    newer = quick_grid(**SMALL)
    assert not {cell.key for cell in newer.cells} >= {cell.key for cell in grid.cells}
    assert find_waste(store, keep=specs(newer), grace_seconds=0) == Waste()
    old = find_waste(store, old=True, grace_seconds=0).records
    assert {key for _, key, _ in old} == {cell.key for cell in grid.cells} - {cell.key for cell in newer.cells}
    refreshed = cell_of(result_of(store, "bn_refresh")["spec"])
    with pytest.raises(StoreError, match=r"made by older versions \(BNRefresh 1, now 99\)"):
        repeat(refreshed, store, device=CPU, num_threads=1)
