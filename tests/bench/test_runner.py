"""Runs that are killed, interrupted, doubled and sharded end with the same store as one that was left alone."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import random
import signal
import time
from collections import Counter
from multiprocessing.synchronize import Event as Signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.plans import QUICK, quick_grid, work_through
from lustral.bench.runner import Event, RunSummary, run_local
from lustral.bench.verification import verify
from lustral.store.store import Store
from lustral.vision.purifiers import BNRefresh, FineTuning

CPU = torch.device("cpu")
RATES = ("acc", "asr", "ra", "natural_rate")

processes = multiprocessing.get_context("forkserver")  # torch is imported once, so a worker is at work at once
processes.set_forkserver_preload(["bench.plans"])


def outcome(store: Store) -> dict[str, Any]:
    """Return what tables are made of: every rate of every cell, by name."""
    found: dict[str, Any] = {}
    for kind in ("victims", "scans", "purifications"):
        for record in store.records(kind):  # type: ignore[arg-type]
            for when in {"before", "after"} & record["metrics"].keys():
                found[f"{record['key']} {when}"] = {name: record["metrics"][when][name]["hits"] for name in RATES}
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("bench") / "undisturbed")).open(create=True)
    assert run_local(quick_grid(), store, device=CPU) == RunSummary(computed=12)
    return store


def start(store: Path, log: Path, seeds: list[int]) -> tuple[multiprocessing.process.BaseProcess, Signal]:
    """Start a worker; the event says when it begins with the cells."""
    ready = processes.Event()
    worker = processes.Process(target=work_through, args=(store, log, seeds, ready))
    worker.start()
    return worker, ready


def wait_for_lines(log: Path, count: int) -> None:
    """Wait until a worker has logged so many cells."""
    until = time.monotonic() + 120
    while len(log.read_text().split()) < count:
        assert time.monotonic() < until, "no cell was finished in two minutes"
        time.sleep(0.01)


def test_a_second_run_computes_nothing(undisturbed: Store) -> None:
    events: list[Event] = []
    assert run_local(quick_grid(), undisturbed, device=CPU, on_event=events.append) == RunSummary(present=12)
    assert {event.state for event in events} == {"present"}


def test_equal_seeds_give_equal_results(undisturbed: Store, tmp_path: Path) -> None:
    again = Store(str(tmp_path / "again")).open(create=True)
    run_local(quick_grid(), again, device=CPU)
    assert outcome(again) == outcome(undisturbed)


def test_shards_add_up(undisturbed: Store, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "shards")).open(create=True)
    done = [run_local(quick_grid().shard(index, 3), store, device=CPU).computed for index in range(3)]
    assert sum(done) == 12
    assert max(done) < 12
    assert outcome(store) == outcome(undisturbed)


def test_killed_at_any_moment_and_resumed(tmp_path: Path) -> None:
    """SIGKILL at 20 moments, drawn over the start and over training, defences and writing; then one run to the end.

    Kills follow what a worker has done and not the clock alone, so that a slow machine tests as much as a fast one.
    """
    seeds, alone = [0, 1, 2, 3], Store(str(tmp_path / "alone")).open(create=True)
    grid, began = quick_grid(seeds=seeds), time.perf_counter()
    assert run_local(grid, alone, device=CPU) == RunSummary(computed=24)
    cell_seconds = (time.perf_counter() - began) / 24
    folder, log = tmp_path / "store", tmp_path / "log"
    log.touch()
    moments = random.Random(0)
    kept = [0]  # cells finished when each kill came
    for number in range(20):
        worker, ready = start(folder, log, seeds)
        if number % 5:  # at work
            assert ready.wait(60)
            wait_for_lines(log, min(kept[-1] + moments.randint(0, 1), 20))
            time.sleep(moments.uniform(0, cell_seconds))
        else:  # still starting, or just at work
            time.sleep(moments.uniform(0, 0.5))
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL, "it ended before it was killed"
        kept.append(len(log.read_text().split()))
        if (folder / "store.json").exists():
            assert not verify(Store(str(folder)), sample=0).faults
    assert len(set(kept)) >= 3, "hardly a cell was finished between the kills: too little was tested"
    last, _ = start(folder, log, seeds)
    last.join(timeout=300)
    assert last.exitcode == 0
    store = Store(str(folder)).open(create=False)
    assert outcome(store) == outcome(alone)
    report = verify(store, grid=grid, sample=2)
    assert (report.faults, report.missing, report.failed) == ([], [], [])
    computed = Counter(log.read_text().split())
    assert max(computed.values()) == 1, "a finished cell was computed again"
    for path in store.leftovers(grace_seconds=0):
        store.discard(path)
    assert outcome(store) == outcome(alone)


def test_two_runners_on_one_store(undisturbed: Store, tmp_path: Path) -> None:
    folder, log = tmp_path / "store", tmp_path / "log"
    log.touch()
    workers = [start(folder, log, [0, 1]) for _ in range(2)]
    for worker, _ in workers:
        worker.join(timeout=300)
    assert [worker.exitcode for worker, _ in workers] == [0, 0]
    computed = Counter(log.read_text().split())
    assert len(computed) == 12
    assert max(computed.values()) == 1, "both computed one cell"
    assert outcome(Store(str(folder))) == outcome(undisturbed)
    assert not verify(Store(str(folder)), grid=quick_grid(), sample=0).faults


def test_a_failed_cell_is_a_record_and_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: BNRefresh, *_: Any, **__: Any) -> None:
        raise RuntimeError("no such luck")

    store = Store(str(tmp_path / "store")).open(create=True)
    with monkeypatch.context() as patch:
        patch.setattr(BNRefresh, "purify", fail)
        assert run_local(quick_grid(seeds=[0]), store, device=CPU) == RunSummary(computed=4, failed=2)
    failures = list(store.records("failures"))
    assert {record["error"] for record in failures} == {"RuntimeError: no such luck"}
    assert all("in fail" in record["traceback"] for record in failures)
    assert run_local(quick_grid(seeds=[0]), store, device=CPU) == RunSummary(present=4, failed=2)  # not tried again
    assert run_local(quick_grid(seeds=[0]), store, device=CPU, retry_failed=True) == RunSummary(computed=2, present=4)
    assert not store.keys("failures")


def test_results_of_a_failed_victim_are_blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("too large")

    store = Store(str(tmp_path / "store")).open(create=True)
    with monkeypatch.context() as patch:
        patch.setattr("lustral.bench.kinds.victims.implant", fail)
        assert run_local(quick_grid(seeds=[0]), store, device=CPU) == RunSummary(failed=2, blocked=4)
    assert run_local(quick_grid(seeds=[0]), store, device=CPU) == RunSummary(failed=2, blocked=4)
    assert run_local(quick_grid(seeds=[0]), store, device=CPU, retry_failed=True) == RunSummary(computed=6)


def test_an_interruption_leaves_no_claim_and_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FineTuning.purify

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    store = Store(str(tmp_path / "store")).open(create=True)
    monkeypatch.setattr(FineTuning, "purify", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_local(quick_grid(seeds=[0]), store, device=CPU)
    assert not list((tmp_path / "store").rglob("claims/*.json"))
    assert not store.keys("failures")
    monkeypatch.setattr(FineTuning, "purify", original)
    assert run_local(quick_grid(seeds=[0]), store, device=CPU) == RunSummary(computed=5, present=1)


def test_threads_are_the_plans_and_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    store = Store(str(tmp_path / "store")).open(create=True)
    torch.set_num_threads(3)  # another number than the plan's
    try:
        run_local(quick_grid(seeds=[0], attacks=[{"method": "none"}], run={"threads": 1}), store, device=CPU)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert {record["made"]["threads"] for record in store.records("purifications")} == {1}
    assert QUICK["run"] == {"threads": 1}
