"""The entry point: one command, one exit code, one line for an error."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Sequence

from lustral.cli.console import Screen
from lustral.cli.parsing import HelpShown

ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXPECTED = (ValueError, OSError, ArithmeticError, ImportError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: the words after the program's name; None takes them from the process.

    Returns:
        The exit code: 0 done; for ``scan`` 0 no backdoor found, 1 backdoored, 3 cannot tell; 2 an error, said in one
        line on standard error; 130 interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.DEBUG if "--debug" in words else logging.WARNING, format="%(message)s")
    try:
        if words[:1] == ["bench"]:  # tables and pages start without torch
            from lustral.cli.bench_commands import run_bench

            return run_bench(words)
        return run(words)
    except HelpShown:
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if not is_expected(error):
            raise
        if "--debug" in words:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return ERROR


def is_expected(error: Exception) -> bool:
    """Say whether an error is about what was given or the machine, not a defect of ours."""
    name = type(error).__name__
    return isinstance(error, EXPECTED) or name == "OutOfMemoryError" or type(error).__module__.startswith("lustral.")


def run(argv: Sequence[str]) -> int:
    """Run a command line of any command but ``bench`` and return its exit code."""
    from lustral.cli import commands
    from lustral.cli.arguments import Demo, Erase, Evaluate, Implant, Scan, parse

    if argv[:1] == ["erase"] and "--list" in argv:
        return commands.list_purifiers(Screen(json="--json" in argv, quiet=False))
    if argv[:1] == ["implant"] and "--list" in argv:
        return commands.list_attacks(Screen(json="--json" in argv, quiet=False))
    command = parse(argv)
    screen = Screen(json=command.common.json, quiet=command.common.quiet)
    match command:
        case Implant():
            return commands.implant(command, argv, screen)
        case Scan():
            return commands.scan(command, argv, screen)
        case Erase():
            return commands.erase(command, argv, screen)
        case Evaluate():
            return commands.evaluate(command, argv, screen)
        case Demo():
            return commands.demo(command, argv, screen)
    raise AssertionError(f"no command for {command}")


def one_line(error: BaseException) -> str:
    """Return an error's message as one line that says what to do.

    >>> one_line(OSError(28, "No space left on device", "out/report.html"))
    'out/report.html: No space left on device; free some space or choose another --out'
    """
    if isinstance(error, OSError) and error.strerror:
        advice = "; free some space or choose another --out" if error.errno == errno.ENOSPC else ""
        return f"{error.filename}: {error.strerror}{advice}" if error.filename else f"{error.strerror}{advice}"
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ") or type(error).__name__
