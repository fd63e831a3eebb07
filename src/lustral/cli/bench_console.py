"""What ``lustral bench run`` shows while it works: a line per finished cell, and where it is."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lustral.cli.console import Screen
from lustral.core.characters import visible

if TYPE_CHECKING:
    from lustral.bench.cells import Cell
    from lustral.bench.grid import Grid
    from lustral.bench.runner import Event
    from lustral.core import records

LOG_SECONDS = 60.0  # between lines about the cell at work, where there is no terminal
STYLES = {"computed": "green", "failed": "red", "blocked": "yellow"}


class ProgressBoard:
    """Shows events and progress on standard error: bars on a terminal, otherwise lines."""

    def __init__(self, screen: Screen, grid: Grid) -> None:
        """Count the cells to come."""
        self._console: Console = screen.aside
        self._quiet = screen.is_quiet
        self._total, self._settled, self._present = len(grid.cells), 0, 0
        self._bars: Progress | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        """Start the bars."""
        if not self._quiet and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bars = Progress(*columns, console=self._console)
            self._whole = self._bars.add_task("cells", total=self._total)
            self._now = self._bars.add_task("", total=None)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the bars."""
        if self._bars is not None:
            self._bars.stop()
        if isinstance(error, KeyboardInterrupt) and not self._quiet:
            self._console.print(f"{self._settled} of {self._total} cells are settled; the same command goes on.")

    def record_event(self, event: Event) -> None:
        """Note what became of a cell."""
        self._settled += 1
        self._present += event.state == "present"
        if self._quiet:
            return
        if self._bars is not None:
            self._bars.update(self._whole, completed=self._settled)
        if event.state == "present":
            return
        took = f" in {event.seconds:.1f} s" if event.seconds else ""
        reason = "" if event.error is None else f": {event.error}"
        style = STYLES.get(event.state, "")
        clock = time.strftime("%H:%M:%S")
        self._console.print(
            Text.assemble(
                f"{clock} ",
                (event.state, style),
                f" {self._settled}/{self._total} ",
                visible(f"{event.cell.title}{took}{reason}"),
            ),
            soft_wrap=True,
        )

    def report(self, cell: Cell, progress: records.Progress) -> None:
        """Show what the cell at work is doing."""
        text = f"{cell.title}: {progress.stage}"
        if self._bars is not None:
            self._bars.update(self._now, description=text, completed=progress.done, total=progress.total)
        elif not self._quiet and time.monotonic() - self._last > LOG_SECONDS:
            self._last = time.monotonic()
            self._console.print(Text(visible(f"{text} {progress.done}/{progress.total}")), soft_wrap=True)
