"""Progress for people: bars on a terminal, otherwise one line for each stage. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from lustral.core.characters import visible

if TYPE_CHECKING:  # it brings torch along, which tables and pages do not need
    from lustral.core import records


class SafeConsole(Console):
    """A console on which names are only text: no markup, no emoji codes, no control characters, no direction of reading."""

    def __init__(self, file: IO[str] | None = None, width: int | None = None) -> None:
        """Write to ``file``; None is standard output."""
        super().__init__(file=file, width=width, markup=False, emoji=False, highlight=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as usual, but for characters that a terminal would obey or a reader not see."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text, keep="\n"), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        """Raise the error on: the inherited method ends the process with 1, which means "backdoored"."""
        raise


class Forgiving:
    """A stream for what is not the result: where it cannot be written, the work goes on without."""

    def __init__(self, stream: Any) -> None:
        """Wrap ``stream``, which may be None."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Answer as the stream."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError, ValueError, AttributeError):  # closed, full, or never there
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError, ValueError, AttributeError):
            self._stream.flush()

    def isatty(self) -> bool:
        """Say whether it is a terminal."""
        with suppress(OSError, ValueError, AttributeError):
            return bool(self._stream.isatty())
        return False


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

    def __call__(self, report: records.Progress) -> None:
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

    def __call__(self, report: records.Progress) -> None:
        """Note one report."""
        if report.stage != self._stage:
            self._stage = report.stage
            self._console.print(f"{report.stage} ...")


@contextmanager
def shown_on(console: Console, *, bars: bool = True) -> Iterator[records.OnProgress]:
    """Yield a callback that shows progress reports.

    Args:
        console: where; usually on standard error.
        bars: draw bars if the console is a terminal, in place of one line for each stage.
    """
    if not (bars and console.is_terminal):
        yield StageLines(console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress)


def standard_error() -> Console:
    """Return standard error as a console that never fails."""
    return SafeConsole(file=Forgiving(sys.stderr))  # type: ignore[arg-type]
