"""The entry point: one command, one exit code, one line for an error. Everything else is imported inside, so that an
environment which cannot import it ends like any other error."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress

from lustral.cli.exits import abandon_output, exit_code, flush_output
from lustral.core.characters import visible


class VisibleFormatter(logging.Formatter):
    """Formats messages so that names in them command no terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the message; line breaks of tracebacks stay."""
        return visible(super().format(record), keep="\n" if record.exc_info else "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name; None takes them from the process.

    Returns:
        The exit code: 0 done; for ``scan`` 0 no backdoor found, 1 backdoored, 3 cannot tell; for ``sift`` 0 none
        and 1 poisoned images or pairs listed; 2 an error, said in one
        line on standard error; 70 an error that was not foreseen, likewise; 130 interrupted; 141 nobody reads the output.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        show_any_character()
        handler = logging.StreamHandler()
        handler.setFormatter(VisibleFormatter("%(message)s"))
        logging.basicConfig(level=logging.DEBUG if "--debug" in words else logging.WARNING, handlers=[handler])
        code = run(words)
        flush_output()
        return code
    except BaseException as error:  # whatever escaped would end the process with 1, which means "backdoored"
        code = exit_code(error, debug="--debug" in words, words=words)
        abandon_output()
        return code


def show_any_character() -> None:
    """Make output of characters that a terminal or pipe lacks an escape, not an error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # replaced by something simpler, or closed
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def run(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    if list(argv) in (["--help"], ["-h"]):
        from lustral.cli.console import Screen
        from lustral.cli.overview import show_overview

        show_overview(Screen(json=False, quiet=False))
        return 0
    if argv[:1] == ["completion"]:
        from lustral.cli.completion import show_script

        return show_script(argv[1:])
    if argv[:1] == ["bench"]:  # tables and pages start without torch
        from lustral.cli.bench_commands import run_bench

        return run_bench(argv)
    if argv[:1] == ["molecules"]:
        from lustral.cli.molecules.commands import run_molecules

        return run_molecules(argv)
    from lustral.cli import commands
    from lustral.cli.arguments import Demo, Erase, Evaluate, Implant, Scan, parse
    from lustral.cli.console import Screen
    from lustral.cli.saved import commands as saved_commands
    from lustral.cli.saved.arguments import Report
    from lustral.cli.untrusted import commands as untrusted_commands
    from lustral.cli.untrusted.arguments import Sift, Train

    if argv[:1] == ["erase"] and "--list" in argv:
        return commands.list_purifiers(Screen(json="--json" in argv, quiet=False))
    if argv[:1] == ["implant"] and "--list" in argv:
        return commands.list_attacks(Screen(json="--json" in argv, quiet=False))
    if argv[:1] in (["sift"], ["train"]) and "--list" in argv:
        return untrusted_commands.list_untrusted(argv[0], Screen(json="--json" in argv, quiet=False))
    command = parse(argv)
    screen = Screen(json=command.common.json, quiet=command.common.quiet)
    match command:
        case Implant():
            return commands.implant(command, argv, screen)
        case Scan():
            return commands.scan(command, argv, screen)
        case Erase():
            return commands.erase(command, argv, screen)
        case Sift():
            return untrusted_commands.sift(command, argv, screen)
        case Train():
            return untrusted_commands.train(command, argv, screen)
        case Evaluate():
            return commands.evaluate(command, argv, screen)
        case Report():
            return saved_commands.report(command, argv, screen)
        case Demo():
            return commands.demo(command, argv, screen)
    raise AssertionError(f"no command for {command}")
