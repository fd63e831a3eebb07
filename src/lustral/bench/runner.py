"""Working through a grid of cells: what is in the store stays, what is missing is computed, what fails is written down.

One process does it here; ``ray_runner`` sends the same cells to a cluster. Several runners may share a store: each cell is
claimed before it is computed, and looked up again after it was claimed.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Literal

import torch

from lustral.bench.cells import Cell
from lustral.bench.grid import Grid
from lustral.bench.recording import failure
from lustral.bench.sources import Sources
from lustral.bench.trust import Trust
from lustral.bench.workbench import Workbench
from lustral.core.records import OnProgress, Progress
from lustral.store.store import CELLS, Store

State = Literal["computed", "present", "failed", "blocked", "busy"]
NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
WAIT_SECONDS = 0.5  # before looking again at cells that another runner is working on


@dataclass(frozen=True, kw_only=True)
class Event:
    """What became of a cell.

    Attributes:
        cell: which.
        state: "computed" now, "present" before, "failed" (now or before), "blocked" because a cell that it needs failed or is
            nowhere, "busy" because another runner is at it.
        seconds: time spent on it now.
        error: for a failure, its last line.
    """

    cell: Cell
    state: State
    seconds: float = 0.0
    error: str | None = None


OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended: numbers of cells by state."""

    computed: int = 0
    present: int = 0
    failed: int = 0
    blocked: int = 0

    @classmethod
    def of(cls, states: Sequence[State]) -> RunSummary:
        """Count."""
        return cls(**{name: states.count(name) for name in ("computed", "present", "failed", "blocked")})


def run_cell(
    cell: Cell, bench: Workbench, *, retry_failed: bool = False, on_progress: OnProgress | None = None
) -> Event:
    """Bring one cell into the store, unless it is there, has failed before, or somebody else is at it.

    Errors of the method become a record under "failures"; an interruption or a full disk leaves nothing behind.
    """
    store = bench.store
    known = _known(cell, store, retry_failed)
    if known is not None:
        return known
    with store.claim(cell.key) as mine:
        if not mine:
            return Event(cell=cell, state="busy")
        known = _known(cell, store, retry_failed)  # finished between the look and the claim
        if known is not None:
            return known
        started = time.perf_counter()
        try:
            outcome = bench.do(cell, on_progress)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in NO_PLACE:
                raise  # not the method's doing: the next cell would fail likewise
            seconds = time.perf_counter() - started
            store.remove("failures", cell.key)
            store.put("failures", cell.key, failure(cell, error, seconds, bench.device))
            return Event(cell=cell, state="failed", seconds=seconds, error=f"{type(error).__name__}: {error}")
        store.put(cell.kind, cell.key, outcome.record, outcome.files)
        store.remove("failures", cell.key)
        return Event(cell=cell, state="computed", seconds=time.perf_counter() - started)


def _known(cell: Cell, store: Store, retry_failed: bool) -> Event | None:
    if store.has(cell.kind, cell.key):
        return Event(cell=cell, state="present")
    if not retry_failed:
        with suppress(KeyError):
            return Event(cell=cell, state="failed", error=store.read("failures", cell.key)["error"])
        failed = next((need for need in cell.needs if store.has("failures", need.key)), None)
        if failed is not None:
            return Event(cell=cell, state="blocked", error=f"its {failed.noun} failed")
    return None


def obstacle(cell: Cell, store: Store, states: Mapping[str, str], coming: Collection[str]) -> Event | None:
    """Return why a cell cannot be done now: "blocked", or "busy" while another runner is at what it needs; None if it can.

    Args:
        cell: which.
        store: where what it needs should be.
        states: what has become of the cells of this run so far.
        coming: keys of all cells of this run.
    """
    for need in cell.needs:
        state = states.get(need.key)
        if state in ("failed", "blocked"):
            return Event(cell=cell, state="blocked", error=f"its {need.noun} failed")
        if state is None and not store.has(need.kind, need.key):
            if need.key in coming:
                return Event(cell=cell, state="busy")
            return Event(cell=cell, state="blocked", error=f"its {need.noun} is not in the store")
        if need.file is not None and need.file not in store.read(need.kind, need.key)["files"]:
            return Event(cell=cell, state="blocked", error=f"its {need.noun} has no {need.file}")
    return None


def run_local(
    grid: Grid,
    store: Store,
    *,
    device: torch.device,
    retry_failed: bool = False,
    trust: Trust = Trust(),  # noqa: B008
    on_event: OnEvent | None = None,
    on_progress: Callable[[Cell, Progress], None] | None = None,
) -> RunSummary:
    """Work through a grid in this process.

    Cells that another runner is computing are left for later; the run ends when every cell is settled.

    Args:
        grid: the cells, each after those that it needs. What a cell needs and neither the grid nor the store has blocks it.
        store: where they go.
        device: where to compute.
        retry_failed: try cells again that have failed before.
        trust: what the plan may ask for.
        on_event: told what became of each cell.
        on_progress: told what the cell at work reports.
    """
    bench = Workbench(store=store, device=device, keep_models=grid.plan.run.keep_models, sources=Sources(trust=trust))
    states: dict[str, State] = {}

    def record_event(event: Event) -> None:
        states[event.cell.key] = event.state
        if on_event is not None:
            on_event(event)

    def attempt(cell: Cell) -> Event:
        stopped = obstacle(cell, store, states, coming)
        if stopped is not None:
            return stopped
        report = None if on_progress is None else _reporter(cell, on_progress)
        return run_cell(cell, bench, retry_failed=retry_failed, on_progress=report)

    coming, waiting = {cell.key for cell in grid.cells}, []
    present = finished_keys(store)
    for cell in grid.cells:
        if cell.key in present:
            record_event(Event(cell=cell, state="present"))
        else:
            waiting.append(cell)
    with threads(grid.plan.run.threads):
        while waiting:
            left = []
            for cell in waiting:
                event = attempt(cell)
                if event.state == "busy":
                    left.append(cell)
                else:
                    record_event(event)
            if len(left) == len(waiting):
                time.sleep(WAIT_SECONDS)
            waiting = left
    return RunSummary.of(list(states.values()))


def finished_keys(store: Store) -> set[str]:
    """Return the keys of all cells that the store has."""
    return set().union(*(store.keys(kind) for kind in CELLS))


def _reporter(cell: Cell, on_progress: Callable[[Cell, Progress], None]) -> OnProgress:
    def report(progress: Progress) -> None:
        on_progress(cell, progress)

    return report


def wait_for(attempt: Callable[[], Event]) -> Event:
    """Try a cell until no other runner is at it."""
    event = attempt()
    while event.state == "busy":
        time.sleep(WAIT_SECONDS)
        event = attempt()
    return event


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run the block with so many CPU threads: rounding depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
