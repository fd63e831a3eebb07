"""What the benchmark runner costs over the work itself, in one run.

    python benchmarks/overhead.py

The runner works through a small plan while the calls that anyone would make by hand are timed inside it: training the victim,
running the defence, measuring the result. What is left is the runner's own: planning, claims, loading victims, records, weights,
pictures, curves, checksums. (Two whole runs against each other were tried: such pairs differed by up to 20 %.)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from lustral.bench import cells
from lustral.bench.expansion import expand
from lustral.bench.plan import parse_plan
from lustral.bench.runner import run_local
from lustral.bench.sources import Sources
from lustral.catalog import PURIFIERS
from lustral.core.files import write_json_atomic
from lustral.store.store import Store

RESULT = Path(__file__).parent / "results" / "overhead_cpu.json"
PLAN = {
    "name": "overhead",
    "seeds": [0],
    "clean": [72],
    "data": [{"name": "digits"}],
    "attacks": [{"method": "badnets"}, {"method": "blended"}],
    "defences": [
        {"method": "mesa", "settings": {"detector": {"inverter": {"steps": 40, "samples": 128, "hidden": 64}}}},
        {"method": "fine_tuning"},
        {"method": "bn_refresh"},
    ],
}


class Stopwatch:
    """Adds up the time inside the outermost of the functions it wraps."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            self.depth += 1
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - started

        return timed


def main() -> None:
    inside = Stopwatch()
    cells.implant = inside.wrap(cells.implant)  # type: ignore[attr-defined]
    cells.evaluate = inside.wrap(cells.evaluate)  # type: ignore[attr-defined]
    for kind in PURIFIERS.values():
        kind.purify = inside.wrap(kind.purify)  # type: ignore[method-assign]
    started = time.perf_counter()
    grid = expand(parse_plan(PLAN), Sources())
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(str(Path(scratch) / "store")).open(create=True)
        summary = run_local(grid, store, device=torch.device("cpu"))
    total = time.perf_counter() - started
    assert summary.computed == len(grid.cells)
    overhead = total / inside.seconds - 1
    print(
        f"{total:.2f} s, {inside.seconds:.2f} s of it inside the methods: {100 * overhead:.2f} % over {len(grid.cells)} cells"
    )
    record = {"cells": len(grid.cells), "seconds": total, "seconds_inside": inside.seconds, "overhead": overhead}
    write_json_atomic(RESULT, {**record, "threads": grid.plan.run.threads, "torch": str(torch.__version__)})


if __name__ == "__main__":
    main()
