"""Who is working on what: claims keep two runners of one store from computing the same piece.

They are hints. A store stays right without them, because a record appears only where none was. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lustral.core.files import canonical
from lustral.store.disk import Disk

BEAT_SECONDS = 10.0  # how often a worker says that it is alive
SILENCE_SECONDS = 60.0  # a claim that has not changed for so long belongs to nobody


@dataclass
class _Watch:
    """What a claim looked like, and since when it has looked so, by our own clock."""

    content: bytes
    since: float


@dataclass
class Claims:
    """Claims of one store.

    Attributes:
        disk: where the store is.
        folder: of the claims, a whole path.
    """

    disk: Disk
    folder: str
    _watched: dict[str, _Watch] = field(default_factory=dict, repr=False)

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yield whether this process may work on a piece; while it does, others are told no.

        A claim ends with the block, with its process on this machine, or when it has been silent for a minute.
        """
        path, token = f"{self.folder}/{key}.json", secrets.token_hex(8)
        if not self._take(path, token):
            yield False
            return
        done = threading.Event()
        beating = threading.Thread(target=self._beat, args=(path, token, done), daemon=True)
        beating.start()
        try:
            yield True
        finally:
            done.set()
            beating.join()
            if _token(self.disk.content(path)) == token:
                self.disk.discard(path)

    def _take(self, path: str, token: str) -> bool:
        claim = canonical({**_whoami(), "token": token, "beat": 0})
        if self.disk.write_once(path, claim):
            return True
        content = self.disk.content(path)
        if content is None:  # it has just ended
            return self.disk.write_once(path, claim)
        if not self._is_dead(path, content):
            return False
        right = f"{path}.{hashlib.sha256(content).hexdigest()[:16]}"  # to replace this very claim: one process has it
        if not self.disk.write_once(right, claim):
            holder = self.disk.content(right)
            if holder is not None and self._is_dead(right, holder):  # killed before it could use it
                self.disk.discard(right)
            return False
        try:
            if self.disk.content(path) != content:  # somebody was faster
                return False
            self.disk.write_file(path, claim)
            return True
        finally:
            self.disk.discard(right)

    def _is_dead(self, path: str, content: bytes) -> bool:
        is_running = _runs_here(content)
        if is_running is not None:
            return not is_running
        watch = self._watched.get(path)
        if watch is None or watch.content != content:
            self._watched[path] = _Watch(content, time.monotonic())
            return False
        return time.monotonic() - watch.since > SILENCE_SECONDS

    def _beat(self, path: str, token: str, done: threading.Event) -> None:
        beat = 0
        while not done.wait(BEAT_SECONDS):
            with suppress(OSError):  # a full disk, a network that is gone for a while: try again
                if _token(self.disk.content(path)) != token:
                    return  # taken over, after a long silence
                beat += 1
                self.disk.write_file(path, canonical({**_whoami(), "token": token, "beat": beat}))

    def forgotten(self, ages: Mapping[str, float], now: float) -> set[str]:
        """Return which claims are surely nobody's.

        The process is on this machine and has ended; or it is elsewhere, and its claim is ten minutes old by the clock of the
        store's own file system and does not change while we watch it, by a clock that nobody can set.

        Args:
            ages: when each claim was written, by its path; by the clock that ``now`` is from.
            now: the time by the file system's clock.
        """
        found, silent = set[str](), dict[str, bytes]()
        for path, age in ages.items():
            content = self.disk.content(path)
            is_running = None if content is None else _runs_here(content)
            if is_running is False:
                found.add(path)
            elif is_running is None and content is not None and age < now - 10 * SILENCE_SECONDS:
                silent[path] = content
        if silent:
            time.sleep(SILENCE_SECONDS)
        return found | {path for path, content in silent.items() if self.disk.content(path) == content}


def _token(content: bytes | None) -> str | None:
    try:
        return None if content is None else str(json.loads(content)["token"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _whoami() -> dict[str, Any]:
    """Return what tells this process from all others: the machine (and process namespace), the number, the start."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        host = f"{platform.node()}/{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        host = ""  # cannot tell whether a process of this number is the same one: silence decides
    return {"host": host, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie works no more


def _runs_here(claim: bytes) -> bool | None:
    """Say whether the process that made a claim still runs; None if it is another machine's, or cannot be read."""
    try:
        content = json.loads(claim)
        if not content["host"] or content["host"] != _whoami()["host"]:
            return None
        now = _started(content["pid"])
        return now is not None and now == content["started"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
