"""The entry point: one command, one exit code, one line for an error."""

from __future__ import annotations

import errno
import logging
import sys
import traceback
from collections.abc import Sequence

import torch

from lustral.cli import commands
from lustral.cli.arguments import Command, Demo, Erase, Evaluate, HelpShown, Implant, Scan, parse
from lustral.cli.console import Screen

ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXPECTED = (ValueError, OSError, ArithmeticError, ImportError, MemoryError, torch.OutOfMemoryError)


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
        if words[:1] == ["erase"] and "--list" in words:
            return commands.list_purifiers(Screen(json="--json" in words, quiet=False))
        return run(parse(words), words)
    except HelpShown:
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except EXPECTED as error:
        if "--debug" in words:
            traceback.print_exc()
        print(f"error: {one_line(error)}", file=sys.stderr)
        return ERROR


def run(command: Command, argv: Sequence[str]) -> int:
    """Run a parsed command and return its exit code; ``argv`` is what it was parsed from."""
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
