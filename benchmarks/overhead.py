"""What the benchmark runner costs over doing the same cells by hand, in one run.

    python benchmarks/overhead.py [--repeats 2]

By hand means: train the victim, measure it, run the defences, measure them, keep everything in memory. The runner does the same
and plans, claims, writes records, weights, pictures and curves. Both ways take turns; the order alternates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from lustral.bench.plan import Grid, expand, parse_plan
from lustral.bench.runner import run_local, threads
from lustral.bench.sources import Sources
from lustral.bench.store import Store
from lustral.catalog import ATTACKS, PURIFIERS
from lustral.evaluation import evaluate
from lustral.files import write_json_atomic
from lustral.images import stratified_indices
from lustral.protocols import DefenderView, Victim
from lustral.randomness import child
from lustral.settings import build
from lustral.training import Trainer
from lustral.victims import implant

RESULT = Path(__file__).parent / "results" / "overhead_cpu.json"
PLAN = {
    "name": "overhead",
    "seeds": [0],
    "clean": [80],
    "data": [{"name": "digits"}],
    "attacks": [{"method": "badnets"}, {"method": "blended"}],
    "defences": [
        {"method": "mesa", "settings": {"detector": {"inverter": {"steps": 40, "samples": 128, "hidden": 64}}}},
        {"method": "fine_tuning"},
        {"method": "bn_refresh"},
    ],
}


def by_hand(grid: Grid) -> int:
    """Do the cells of a grid without a store; returns how many."""
    source = Sources().open("digits", None)
    (train, _), pool, test = source.training_split(), source.defender_pool(), source.test
    assert test is not None
    victim: Victim | None = None
    for cell in grid.cells:
        spec = cell.spec
        if cell.kind == "victims":
            victim = implant(
                build(ATTACKS[spec["attack"]["method"]], spec["attack"]["settings"]),
                train,
                test,
                arch=spec["arch"],
                trainer=build(Trainer, spec["trainer"]),
                seed=spec["seed"],
                data_name="digits",
            )
            continue
        assert victim is not None
        seed = spec["victim"]["seed"]
        chosen, _ = stratified_indices(
            pool.labels, pool.num_classes, spec["clean_images"], generator=child(seed, "clean")
        )
        view = DefenderView(model=victim.model, clean=pool.subset(chosen))
        purifier = build(PURIFIERS[spec["defence"]["method"]], spec["defence"]["settings"])
        purified = purifier.purify(view, generator=child(seed, "erase"))
        evaluate(victim, purified.model, test, generator=child(seed, "evaluation"))
    return len(grid.cells)


def by_runner(grid: Grid) -> int:
    """Do them with the runner and a new store; returns how many."""
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(str(Path(scratch) / "store")).open(create=True)
        return run_local(grid, store, device=torch.device("cpu")).computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    grid = expand(parse_plan(PLAN), Sources())
    seconds: dict[str, list[float]] = {"by_hand": [], "by_runner": []}
    ways = {"by_hand": by_hand, "by_runner": by_runner}
    with threads(grid.plan.run.threads):
        by_hand(grid.shard(0, len(grid.cells)))  # warm up
        for repeat in range(repeats):
            for name in sorted(ways, reverse=bool(repeat % 2)):
                started = time.perf_counter()
                assert ways[name](grid) == len(grid.cells)
                seconds[name].append(time.perf_counter() - started)
                print(f"{name}: {seconds[name][-1]:.1f} s", flush=True)
    ratio = statistics.median(a / b for a, b in zip(seconds["by_runner"], seconds["by_hand"], strict=True))
    print(f"runner / by hand = {ratio:.4f} over {len(grid.cells)} cells")
    record = {"cells": len(grid.cells), "seconds": seconds, "ratio": ratio, "threads": grid.plan.run.threads}
    write_json_atomic(RESULT, {**record, "torch": str(torch.__version__)})


if __name__ == "__main__":
    main()
