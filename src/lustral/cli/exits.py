"""What the command ends with: exit codes, and errors in one line. Imports the standard library alone, so that it works where
nothing else can be imported."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import FrameType

from lustral.core.characters import visible

ERROR = 2
CRASHED = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
BROKEN_PIPE = 141  # 128 + SIGPIPE, likewise
MOST_CHARACTERS = 2000  # of an error's message; some quote what they were given
FORESEEN = (ValueError, OSError, ArithmeticError, ImportError, MemoryError, SystemExit)
NO_MEMORY = (
    "DefaultCPUAllocator",
    "not enough memory",
    "CUDA out of memory",
    "std::bad_alloc",
)  # in torch's RuntimeErrors
FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
USER_CODE = "lustral_user_file_"  # how the modules of FILE.py:function are called


class HelpShown(Exception):
    """The help was asked for and printed."""


def exit_code(error: BaseException, *, debug: bool, words: Sequence[str] = ()) -> int:
    """Say on standard error what ended a command, in one line, and return its exit code.

    Never raises, whatever became of standard error: an exit code of Python's own would read as a verdict.

    Args:
        error: what was raised.
        debug: print the traceback too.
        words: the command line.
    """
    if isinstance(error, HelpShown):
        return 0
    if isinstance(error, KeyboardInterrupt):
        say("interrupted")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader went away, e.g. `| head`: nobody to tell
        return BROKEN_PIPE
    if debug:
        say(visible("".join(traceback.format_exception(error)), keep="\n\t").rstrip("\n"))
    if is_foreseen(error):
        say(f"error: {one_line(error, words)}")
        return ERROR
    say(
        f"error: unforeseen {type(error).__name__}: {one_line(error)}; nothing was decided, and this is a defect of lustral: "
        f"{'report it with the traceback' if debug else 'run it again with --debug for a traceback to report'}"
    )
    return CRASHED


def say(text: str) -> None:
    """Print on standard error, if there still is one."""
    with suppress(Exception):
        print(text, file=sys.stderr, flush=True)


def flush_output() -> None:
    """Write out what standard output holds back, so that a failure counts now and not after the exit code is chosen."""
    if sys.stdout is not None:
        sys.stdout.flush()


def abandon_output() -> None:
    """Keep Python from writing to a failed standard output on its way out, which would replace the exit code."""
    with suppress(Exception):
        sys.stdout.flush()
        return
    with suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_foreseen(error: BaseException) -> bool:
    """Say whether an error is about what was given, the user's own code, or the machine; and not a defect of ours."""
    return (
        isinstance(error, FORESEEN)
        or type(error).__module__.startswith("lustral.")
        or lacks_memory(error)
        or is_of_the_network(error)
    )


def lacks_memory(error: BaseException) -> bool:
    """Say whether memory ran out, of the machine or of a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in NO_MEMORY)


def is_of_the_network(error: BaseException) -> bool:
    """Say whether an error arose in a network's own forward pass, or in a Python file that the user named."""
    return any(
        frame.f_globals.get("__name__", "").startswith(USER_CODE)
        or (frame.f_globals.get("__name__") == "lustral.vision.models.classifier" and frame.f_code.co_name == "forward")
        for frame in frames(error)
    )


def frames(error: BaseException) -> Iterator[FrameType]:
    """Yield the frames that an error came through, from the outside in."""
    step = error.__traceback__
    while step is not None:
        yield step.tb_frame
        step = step.tb_next


def one_line(error: BaseException, words: Sequence[str] = ()) -> str:
    r"""Return an error's message as one line that says what to do, safe to show.

    Args:
        error: what was raised.
        words: the command line, to name the flag that chose a place.

    >>> one_line(OSError(28, "No space left on device", "out/report.html"), ["demo", "--out", "out"])
    'out/report.html: No space left on device; free some space there or choose another --out'
    """
    return _shortened(visible(_message(error, words)))


def _message(error: BaseException, words: Sequence[str]) -> str:
    if isinstance(error, SystemExit):
        called = f"called sys.exit({error.code!r})"
        return f"code that this command ran {called}, such as the file that --arch names; nothing was decided"
    if lacks_memory(error):
        said = _joined(str(error).partition("\n")[0])
        return f"not enough memory{f' ({said})' if said else ''}; use fewer or smaller images, or another --device"
    if isinstance(error, OSError) and error.strerror:
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes | os.PathLike) else ""
        return f"{place}{error.strerror}{_advice(error, words)}"
    said = _joined(str(error)) or type(error).__name__
    if not isinstance(error, FORESEEN) and is_of_the_network(error):
        return f"the network failed: {type(error).__name__}: {said}"
    return said


def _advice(error: OSError, words: Sequence[str]) -> str:
    """Return what to do about a place that is full or may not be written: it is the flag's that chose the place."""
    if error.errno not in (*FULL, *REFUSED):
        return ""
    do = "free some space there" if error.errno in FULL else "see to its permissions"
    if not isinstance(error.filename, str | os.PathLike):
        return "; free some space" if error.errno in FULL else ""
    flag = flag_of(os.fspath(error.filename), words)
    if flag is not None:
        return f"; {do} or choose another {flag}"
    if is_inside(os.fspath(error.filename), tempfile.gettempdir()):
        return f"; {do} or name another temporary folder in the environment variable TMPDIR"
    return f"; {do} or name another place"


def flag_of(path: str, words: Sequence[str]) -> str | None:
    """Return the flag of a command line whose value is a file or folder that a path is, or is in.

    >>> flag_of("runs/a/files/x", ["bench", "run", "plan.toml", "--store", "runs/a", "--json"])
    '--store'
    """
    flag = None
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            flag = name
        if (not word.startswith("--") or equals) and flag is not None and is_inside(path, value if equals else word):
            return flag
    return None


def is_inside(path: str, folder: str) -> bool:
    """Tell whether a path is a folder or file, or below it."""
    real, top = os.path.realpath(os.path.expanduser(path)), os.path.realpath(os.path.expanduser(folder))
    return real == top or real.startswith(top.rstrip(os.sep) + os.sep)


def _joined(text: str) -> str:
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return "; ".join(lines).replace(":; ", ": ")


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ... ({len(text):,} characters)"
