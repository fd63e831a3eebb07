"""What the user sees: tables on standard output, progress on standard error, or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.text import Text

from lustral.api.progress import SafeConsole, shown_on, standard_error
from lustral.core.characters import visible
from lustral.core.files import json_ready

if TYPE_CHECKING:  # it brings torch along, which tables and pages do not need
    from lustral.core import records
    from lustral.report.page import ReportData
    from lustral.vision.records import Verdict


WIDE = 160  # columns of a table that goes to a file or a pipe


class Screen:
    """Where a command shows things: standard output for people or for programs, standard error for progress."""

    def __init__(self, *, json: bool, quiet: bool, hidden: bool = False, wide: bool = False) -> None:
        """Take the two flags that decide what is shown; ``hidden`` shows progress only, ``wide`` fills no files with
        folded tables."""
        self._json, self._quiet, self._hidden = json, quiet, hidden
        self._out: Console = SafeConsole()
        self._err: Console = standard_error()
        if wide and not self._out.is_terminal:
            self._out = SafeConsole(width=WIDE)

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
            from lustral.core.records import Progress as Report

            yield lambda what, done, total: on_progress(Report(stage=what, done=done, total=total))

    def show(self, *parts: RenderableType) -> None:
        """Print tables and sentences for people; nothing with --json."""
        if not self._json and not self._hidden:
            for part in parts:
                line = Text(visible(part), no_wrap=True) if isinstance(part, str) else part
                self._out.print(line, soft_wrap=isinstance(line, Text) and line.no_wrap is True)

    def trigger_pictures(self, verdict: Verdict | None, page: ReportData) -> list[RenderableType]:
        """Return small pictures of recovered triggers, for a terminal that can show them; nothing with --json or --quiet."""
        from lustral.report.figures.half_blocks import can_draw, trigger_panels

        if verdict is None or self._json or self._hidden or self._quiet or not can_draw(self._out):
            return []
        return trigger_panels(verdict.triggers, verdict.suspect_labels, page.clean, page.class_names, self._out.width)

    def record(self, content: Mapping[str, Any]) -> None:
        """Print the result as JSON, with --json only; numbers that are not finite become null."""
        if self._json:
            print(json.dumps(json_ready(content), indent=2, allow_nan=False))

    @contextmanager
    def progress(self) -> Iterator[records.OnProgress | None]:
        """Yield the callback for progress reports: bars on a terminal, otherwise a line per stage, or None."""
        if self._quiet:
            yield None
            return
        with shown_on(self._err, bars=not self._json) as on_progress:
            yield on_progress
