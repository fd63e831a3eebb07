"""A real Ray cluster of two worker processes on this machine: equal results, and a killed worker is survived."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.plans import quick_grid
from bench.test_runner import outcome
from lustral.bench.runner import Event, RunSummary, run_local
from lustral.bench.verification import verify
from lustral.store.store import Store

ray: Any = pytest.importorskip("ray", reason="needs the extra lustral[ray]")
run_on_ray = pytest.importorskip("lustral.bench.ray_runner").run_on_ray
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src")])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray's own start
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
        )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")  # Ray leaves files and sockets to the garbage collector
def test_a_cluster_gives_the_table_of_one_process(tmp_path: Path) -> None:
    alone = Store(str(tmp_path / "alone")).open(create=True)
    run_local(quick_grid(), alone, device=CPU)
    shared = Store(str(tmp_path / "shared")).open(create=True)
    events: list[Event] = []
    assert run_on_ray(quick_grid(), shared, address="auto", device="cpu", on_event=events.append) == RunSummary(
        computed=12
    )
    assert len(events) == 12
    assert outcome(shared) == outcome(alone)
    assert run_on_ray(quick_grid(), shared, address="auto", device="cpu") == RunSummary(present=12)


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore")
def test_a_worker_killed_in_mid_cell_is_survived(tmp_path: Path) -> None:
    alone = Store(str(tmp_path / "alone")).open(create=True)
    grid = quick_grid(data=[{"name": "digits", "arch": ["small_cnn:width=8"], "trainer": {"epochs": 6}}])
    run_local(grid, alone, device=CPU)
    shared = Store(str(tmp_path / "shared")).open(create=True)
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        """Kill the first process that claims a cell, while it is at it."""
        import json

        while not over.is_set() and not killed:
            for claim in (tmp_path / "shared" / "claims").glob("*.json"):
                try:
                    pid = json.loads(claim.read_bytes())["pid"]
                    os.kill(pid, signal.SIGKILL)
                except (OSError, ValueError):
                    continue
                killed.append(pid)
                break
            time.sleep(0.005)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        summary = run_on_ray(grid, shared, address="auto", device="cpu")
    finally:
        over.set()
        killer.join()
    assert killed, "no worker was killed: nothing was tested"
    assert (summary.computed, summary.failed, summary.blocked) == (12, 0, 0)
    assert outcome(shared) == outcome(alone)
    assert not verify(shared, grid=grid, sample=0).faults
