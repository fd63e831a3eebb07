"""What the user sees: tables on standard output, progress on standard error, or one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from lustral.files import json_ready

if TYPE_CHECKING:  # it brings torch along, which tables and pages do not need
    from lustral import protocols


WIDE = 160  # columns of a table that goes to a file or a pipe


class RateColumn(ProgressColumn):
    """Shows the images per second that a method reports."""

    def render(self, task: Task) -> Text:
        """Return e.g. "1,900 images/s", or nothing before the first report."""
        rate = task.fields.get("images_per_second")
        return Text("" if rate is None else f"{rate:,.0f} images/s", style="progress.data.speed")


class Bars:
    """Draws progress reports as bars, one per stage."""

    def __init__(self, progress: Progress) -> None:
        """Draw on ``progress``."""
        self._progress = progress
        self._task: Any = None
        self._stage = ""

    def __call__(self, report: protocols.Progress) -> None:
        """Show one report."""
        if report.stage != self._stage:
            self._stage, self._task = report.stage, self._progress.add_task(report.stage, total=report.total)
        rate = report.values.get("images_per_second")
        self._progress.update(self._task, completed=report.done, total=report.total, images_per_second=rate)


class StageLines:
    """Writes one line when a new stage begins."""

    def __init__(self, console: Console) -> None:
        """Write to ``console``."""
        self._console = console
        self._stage = ""

    def __call__(self, report: protocols.Progress) -> None:
        """Note one report."""
        if report.stage != self._stage:
            self._stage = report.stage
            self._console.print(f"{report.stage} ...", markup=False, highlight=False)


class Screen:
    """Where a command shows things: standard output for people or for programs, standard error for progress."""

    def __init__(self, *, json: bool, quiet: bool, hidden: bool = False, wide: bool = False) -> None:
        """Take the two flags that decide what is shown; ``hidden`` shows progress only, ``wide`` fills no files with
        folded tables."""
        self._json, self._quiet, self._hidden = json, quiet, hidden
        self._out, self._err = Console(), Console(stderr=True)
        if wide and not self._out.is_terminal:
            self._out = Console(width=WIDE)

    @property
    def aside(self) -> Console:
        """Standard error, for what is not the result."""
        return self._err

    @property
    def is_quiet(self) -> bool:
        """Whether progress is unwanted."""
        return self._quiet

    @contextmanager
    def steps(self) -> Iterator[Callable[[str, int, int], None] | None]:
        """Yield a callback for (what, done, total), shown as ``progress`` shows reports."""
        with self.progress() as on_progress:
            if on_progress is None:
                yield None
                return
            from lustral.protocols import Progress as Report

            yield lambda what, done, total: on_progress(Report(stage=what, done=done, total=total))

    def show(self, *parts: RenderableType) -> None:
        """Print tables and sentences for people; nothing with --json."""
        if not self._json and not self._hidden:
            for part in parts:
                self._out.print(part, soft_wrap=isinstance(part, str), highlight=False)

    def record(self, content: Mapping[str, Any]) -> None:
        """Print the result as JSON, with --json only; numbers that are not finite become null."""
        if self._json:
            sys.stdout.write(json.dumps(json_ready(content), indent=2, allow_nan=False) + "\n")

    @contextmanager
    def progress(self) -> Iterator[protocols.OnProgress | None]:
        """Yield the callback for progress reports: bars on a terminal, otherwise a line per stage, or None."""
        if self._quiet:
            yield None
        elif self._json or not self._err.is_terminal:
            yield StageLines(self._err)
        else:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                RateColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
            )
            with Progress(*columns, console=self._err) as progress:
                yield Bars(progress)
