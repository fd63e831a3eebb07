"""The same cells on a Ray cluster: one task each, with its share of CPUs and GPUs.

Ray places the tasks and starts them again when a worker dies; the store decides what is done. A task starts when those of the
cells that it needs have ended. Workers must see the store and the data sets under the same names.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from lustral.bench.cells import Cell
from lustral.bench.grid import Grid
from lustral.bench.recording import failure
from lustral.bench.runner import Event, OnEvent, RunSummary, finished_keys, obstacle, run_cell, threads, wait_for
from lustral.bench.sources import Sources
from lustral.bench.trust import Trust
from lustral.bench.workbench import Workbench
from lustral.core.records import Progress
from lustral.store.store import Store

POLL_SECONDS = 0.5  # between looks at what the workers report
RETRIES = 3  # times that a task is started again after its worker died
_benches: dict[
    tuple[str, str, bool, Trust], Workbench
] = {}  # of a worker process: it keeps data sets and the last victim


class RayError(RuntimeError):
    """Ray is not installed, or there is no cluster at the address."""


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise RayError("--ray needs the package ray; install it with pip install 'lustral[ray]'") from error
    return ray


def work(
    url: str,
    cell: Cell,
    device_name: str,
    num_threads: int,
    keep_models: bool,
    retry: bool,
    trust: Trust,
    board: Any,
) -> tuple[str, float, str | None]:
    """Do one cell in a worker process; returns (state, seconds, error)."""
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device_name == "auto" else device_name)
    bench = _benches.setdefault(
        (url, str(device), keep_models, trust),
        Workbench(store=Store(url), device=device, keep_models=keep_models, sources=Sources(trust=trust)),
    )

    def report(progress: Progress) -> None:
        board.note.remote(cell.key, progress.stage, progress.done, progress.total)

    stopped = obstacle(cell, bench.store, {}, ())
    if stopped is not None:
        return stopped.state, 0.0, stopped.error
    with threads(num_threads):
        event = wait_for(lambda: run_cell(cell, bench, retry_failed=retry, on_progress=report))
    return event.state, event.seconds, event.error


class Board:
    """Where workers write what they are doing; an actor."""

    def __init__(self) -> None:
        """Start empty."""
        self._notes: dict[str, tuple[str, int, int]] = {}

    def note(self, key: str, stage: str, done: int, total: int) -> None:
        """Write down a progress report."""
        self._notes[key] = (stage, done, total)

    def read(self) -> dict[str, tuple[str, int, int]]:
        """Return what came in since the last look."""
        notes, self._notes = self._notes, {}
        return notes


def run_on_ray(
    grid: Grid,
    store: Store,
    *,
    address: str,
    device: str = "auto",
    retry_failed: bool = False,
    trust: Trust = Trust(),  # noqa: B008
    on_event: OnEvent | None = None,
    on_progress: Callable[[Cell, Progress], None] | None = None,
) -> RunSummary:
    """Work through a grid on a cluster.

    Args:
        grid: the cells, victims before their results.
        store: where they go; its URL must mean the same to every worker.
        address: of a cluster's head; "auto" takes the running cluster, or starts one on this machine. A cluster that the caller
            has already joined is used as it is.
        device: of the workers; "auto" is a GPU where Ray gives one.
        retry_failed: try cells again that have failed before.
        trust: what the plan may ask for.
        on_event: told what became of each cell.
        on_progress: told what the cells at work report.

    Raises:
        RayError: Ray is not installed, or there is no such cluster.
    """
    ray = _import_ray()
    joined = ray.is_initialized()
    if not joined:
        _join(ray, address)
    try:
        return _run(ray, grid, store, device, retry_failed, trust, on_event, on_progress)
    finally:
        if not joined:
            ray.shutdown()


def _join(ray: Any, address: str) -> None:
    options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # workers without a GPU: leave their variables alone
    path = os.pathsep.join(filter(None, sys.path))
    options["runtime_env"] = {"env_vars": {"PYTHONPATH": path}} if address == "auto" else {}
    try:
        if address != "auto":
            ray.init(address=address, **options)
            return
        try:
            ray.init(address="auto", **options)
        except ConnectionError:  # none is running: start one here
            ray.init(include_dashboard=False, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RayError(f"no Ray cluster at {address!r}: {error}; start one with `ray start --head`") from error


def _run(
    ray: Any,
    grid: Grid,
    store: Store,
    device: str,
    retry_failed: bool,
    trust: Trust,
    on_event: OnEvent | None,
    on_progress: Callable[[Cell, Progress], None] | None,
) -> RunSummary:
    plan, by_key = grid.plan.run, {cell.key: cell for cell in grid.cells}
    states: dict[str, Any] = {}

    def record_event(event: Event) -> None:
        states[event.cell.key] = event.state
        if on_event is not None:
            on_event(event)

    board = ray.remote(num_cpus=0)(Board).remote()
    task = ray.remote(num_cpus=plan.threads, num_gpus=plan.gpus, max_retries=RETRIES)(_after_needs)
    present, running, tasks = finished_keys(store), dict[Any, Cell](), dict[str, Any]()
    for cell in grid.cells:
        if cell.key in present:
            record_event(Event(cell=cell, state="present"))
            continue
        stopped = obstacle(cell, store, states, by_key)
        if stopped is not None and stopped.state == "blocked":
            record_event(stopped)
            continue
        settings = (store.url, cell, device, plan.threads, plan.keep_models, retry_failed, trust, board)
        needs = [need for need in cell.needs if need.key in tasks]
        before = [tasks[need.key] for need in needs]
        reference = task.options(name=cell.title).remote([need.noun for need in needs], settings, *before)
        running[reference] = cell
        tasks[cell.key] = reference
    try:
        while running:
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            for reference in done:
                record_event(_outcome(ray, reference, running.pop(reference), store))
            if on_progress is not None:
                for key, (stage, count, total) in ray.get(board.read.remote()).items():
                    on_progress(by_key[key], Progress(stage=stage, done=count, total=total))
    except BaseException:
        for reference in running:
            ray.cancel(reference, force=True)
        raise
    finally:
        ray.kill(board)
    return RunSummary.of(list(states.values()))


def _after_needs(nouns: list[str], settings: tuple[Any, ...], *before: Any) -> tuple[str, float, str | None]:
    """Do a cell when the tasks of what it needs have ended with ``before``; what was there has none."""
    for noun, (state, _, _) in zip(nouns, before, strict=True):
        if state in ("failed", "blocked"):
            return "blocked", 0.0, f"its {noun} failed"
    return work(*settings)


def _outcome(ray: Any, reference: Any, cell: Cell, store: Store) -> Event:
    """Return what became of a task; one whose workers kept dying is a failed cell."""
    try:
        state, seconds, error = ray.get(reference)
        return Event(cell=cell, state=state, seconds=seconds, error=error)
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error.cause if isinstance(error.cause, BaseException) else error
    except ray.exceptions.RayError as error:
        cause = error
    text = f"{type(cause).__name__}: {cause}"
    if isinstance(cause, ray.exceptions.RayError):  # never got as far as writing it down itself
        store.put("failures", cell.key, failure(cell, cause, 0.0))
    return Event(cell=cell, state="failed", error=text)
