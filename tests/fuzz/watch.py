"""What a process does while it opens a file: everything that runs code or reaches beyond the file is noted.

Python reports such acts to audit hooks, also those of C code that goes through Python. A hook stays for the life of its
process, so it is installed in workers alone.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fuzz.mutators import CANARY, MARK

RUNS = (
    *("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "pty.spawn"),
    *(
        "subprocess.Popen",
        "webbrowser.open",
        "pickle.find_class",
        "ctypes.dlopen",
        "cpython.run_file",
        "cpython.run_command",
    ),
    *("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "urllib.Request", "ftplib.connect"),
    *(
        "os.kill",
        "signal.pthread_kill",
        "sys.unraisablehook",
        "os.chmod",
        "os.chown",
        "os.truncate",
        "shutil.unpack_archive",
    ),
)
CHANGES = (
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.utime",
    "shutil.rmtree",
    "shutil.move",
)
# Installed code that makes classes out of source text; what else runs text may do so while it is imported alone.
MAKERS = (
    "dataclasses.py",
    "collections/__init__.py",
    "typing.py",
    "pydantic",
    "jinja2",
    "rich",
    "tyro",
    "functools.py",
    "attr",
)
SYSTEM = ("/dev/null", "/dev/urandom", "/proc/", "/sys/", "/etc/localtime", "/usr/share/zoneinfo")


def _files(frame: FrameType | None) -> Iterator[str]:
    """Yield the files whose code is running, from the inside out."""
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


class Watch:
    """Notes what must not happen while it is on."""

    def __init__(self, scratch: Path) -> None:
        """Install the hook; files may be written in ``scratch`` alone."""
        self.scratch = str(scratch.resolve())
        installed = {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()}
        repository = str(Path(__file__).resolve().parents[2])
        self.readable = (self.scratch, repository, *map(os.path.realpath, installed))
        self.seen: list[str] = []
        self.is_on = False
        sys.addaudithook(self._note)

    @contextmanager
    def on(self) -> Iterator[list[str]]:
        """Note acts within the block; yields the notes."""
        self.seen.clear()
        self.is_on = True
        try:
            yield self.seen
        finally:
            self.is_on = False
            if os.path.lexists(MARK):
                self.seen.append(f"something made a file called {MARK!r}")
                os.remove(MARK)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on:
            return
        self.is_on = False  # for what happens in here
        try:
            reason = self._reason(event, arguments)
            if reason is not None:
                self.seen.append(f"{event}: {reason}"[:500])
        finally:
            self.is_on = True

    def _reason(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        """Return what is wrong with an act; None: nothing."""
        if event in RUNS:
            return repr(arguments)
        if event == "import" and str(arguments[0]).partition(".")[0] in (CANARY, "evil", "modeling"):
            return str(arguments[0])
        if event == "exec":
            return self._reason_to_run(arguments[0])
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int):
                return None
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)) or (
                isinstance(mode, str) and any(letter in mode for letter in "wax+")
            )
            return self._reason_to_touch(path, writes=writes)
        if event in CHANGES:
            return self._reason_to_touch(arguments[0], writes=True)
        return None

    def _reason_to_run(self, code: Any) -> str | None:
        """Code of installed packages and of this repository may run; source text where such code makes classes of it."""
        file = getattr(code, "co_filename", "?")
        if file.startswith("<frozen "):
            return None
        if file.startswith("<"):
            callers = list(_files(sys._getframe(3)))
            caller = next((name for name in callers if not name.startswith("<")), "?")
            makes = any(maker in caller for maker in MAKERS) or "<frozen importlib._bootstrap>" in callers
            return None if makes and self._is_within(caller, self.readable[2:]) else f"{file} from {caller}"
        inside = self._is_within(file, self.readable[1:]) and not self._is_within(file, self.readable[:1])
        return None if inside else file

    def _reason_to_touch(self, path: Any, *, writes: bool) -> str | None:
        name = os.fsdecode(path)
        if not writes and name.startswith(SYSTEM):
            return None
        inside = self._is_within(name, self.readable[:1] if writes else self.readable)
        return None if inside or name == os.devnull else f"{'writes' if writes else 'reads'} {name}"

    def _is_within(self, name: str, folders: tuple[str, ...]) -> bool:
        found = os.path.abspath(name)  # not what a link leads to: whoever follows one is told by what it reads
        return any(found == folder or found.startswith(folder + os.sep) for folder in folders)
