"""Plans for the tests, as small as they can be."""

from __future__ import annotations

from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from lustral.bench import runner
from lustral.bench.expansion import expand
from lustral.bench.grid import Grid
from lustral.bench.plan import parse_plan
from lustral.bench.sources import Sources
from lustral.store.store import Store

QUICK: dict[str, Any] = {
    "name": "quick",
    "seeds": [0, 1],
    "clean": [60],
    "data": [{"name": "digits", "arch": ["small_cnn:width=8"], "trainer": {"epochs": 6}}],
    "attacks": [{"method": "badnets", "target_labels": [3, 5]}, {"method": "none"}],
    "defences": [
        {"method": "fine_tuning", "settings": {"least_steps": 4, "trainer": {"epochs": 1}}},
        {"method": "bn_refresh"},
    ],
    "run": {"threads": 1},
}


def quick_grid(**changes: Any) -> Grid:
    """Return the cells of the quick plan: 4 victims, 8 results."""
    return expand(parse_plan({**QUICK, **changes}), Sources())


def work_through(store: Path, log: Path, seeds: list[int], ready: Event) -> None:
    """Run the quick plan in a process of its own, and log the keys of the cells it computed itself."""
    with log.open("a", buffering=1) as lines:

        def note(event: runner.Event) -> None:
            if event.state == "computed":
                lines.write(event.cell.key + "\n")

        grid, place = quick_grid(seeds=seeds), Store(str(store)).open(create=True)
        ready.set()
        runner.run_local(grid, place, device=torch.device("cpu"), on_event=note)
