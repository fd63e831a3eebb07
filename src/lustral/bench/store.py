"""A folder of finished work, each piece named by the hash of its full specification.

    ROOT/store.json                     what this folder is
    ROOT/victims/ab/abcd....json        a record: specification, results, and the files that belong to it
    ROOT/results/..., ROOT/assets/..., ROOT/failures/...
    ROOT/files/ab/abcd....-TOKEN/NAME   those files; TOKEN is the attempt that wrote them
    ROOT/claims/abcd....json            who is working on what

A piece exists when its record exists. Files are written first, then the record appears in one step and only where none was, so a
killed process leaves at most files that no record names (``gc`` removes them), and of two writers one wins whole. The root
is a path or any fsspec URL. Nothing here imports torch: tables and pages are made without it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import secrets
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lustral.files import json_ready, write_bytes_atomic

Kind = Literal["victims", "results", "assets", "failures"]
KINDS: tuple[Kind, ...] = ("victims", "results", "assets", "failures")
LAYOUT = 1
BEAT_SECONDS = 10.0  # how often a worker says that it is alive
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)  # file systems without hard links
SILENCE_SECONDS = 60.0  # a claim that has not changed for so long belongs to nobody


class StoreError(ValueError):
    """The store cannot be used, or something in it is damaged."""


def canonical(content: Any) -> bytes:
    """Return plain data as the one JSON text that stands for it: sorted keys, no blanks."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode()


def content_key(spec: Mapping[str, Any]) -> str:
    """Return the name of a specification: the SHA-256 of its canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(spec)).hexdigest()


def checksum_of(record: Mapping[str, Any]) -> str:
    """Return the checksum of a record: over everything but the checksum itself."""
    return hashlib.sha256(canonical({k: v for k, v in record.items() if k != "checksum"})).hexdigest()


@dataclass
class _Watch:
    """What a claim looked like, and since when it has looked so, by our own clock."""

    content: bytes
    since: float


@dataclass
class Store:
    """Records and their files under one root.

    Attributes:
        url: a path, or an fsspec URL such as "s3://bucket/folder" or "memory://bench".
    """

    url: str
    _watched: dict[str, _Watch] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Resolve the root."""
        try:
            fs, root = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"the store {self.url!r} cannot be opened: {error}") from error
        self.fs: Any = fs
        self.root: str = root.rstrip("/")
        self.is_local = isinstance(fs, LocalFileSystem)

    def open(self, *, create: bool) -> Store:
        """Check that the root is a store, or make it one.

        Raises:
            StoreError: there is no store, or it was written by another version.
        """
        marker = f"{self.root}/store.json"
        if not self.fs.exists(marker):
            if not create:
                raise StoreError(f"{self.url} is no store of benchmark results; make one with `lustral bench run`")
            found = self.fs.ls(self.root, detail=False) if self.fs.exists(self.root) else []
            strangers = [path for path in found if not path.endswith(".tmp")]  # of a process that is making it, too
            if strangers and not self.fs.exists(marker):
                raise StoreError(f"{self.url} is not empty and no store: name a new folder, or an existing store")
            self.fs.makedirs(self.root, exist_ok=True)
            self._write_once(marker, canonical({"layout": LAYOUT}))
        try:
            layout = json.loads(self.fs.cat_file(marker))["layout"]
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{marker} is not readable ({error!r}); {self.url} is no store") from error
        if layout != LAYOUT:
            raise StoreError(f"{self.url} has layout {layout}, this version reads {LAYOUT}")
        return self

    # -- records ------------------------------------------------------------------------------------------------

    def path(self, kind: Kind, key: str) -> str:
        """Return where a record is."""
        return f"{self.root}/{kind}/{key[:2]}/{key}.json"

    def has(self, kind: Kind, key: str) -> bool:
        """Say whether a record exists."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(kind, key)))

    def keys(self, kind: Kind) -> set[str]:
        """Return the keys of all records of a kind."""
        return {Path(path).stem for path in self._find(f"{self.root}/{kind}") if path.endswith(".json")}

    def read(self, kind: Kind, key: str) -> dict[str, Any]:
        """Return a record.

        Raises:
            KeyError: there is none.
            StoreError: it is damaged.
        """
        try:
            content = self.fs.cat_file(self.path(kind, key))
        except FileNotFoundError as error:
            raise KeyError(f"no {kind} record {key}") from error
        return _parse(content, self.path(kind, key))

    def records(self, kind: Kind, *, check: bool = True) -> Iterator[dict[str, Any]]:
        """Yield all records of a kind, sorted by key; damaged ones raise ``StoreError``.

        Args:
            kind: which.
            check: compare each with its checksum; without, only what is not JSON counts as damaged.
        """
        for path, content in self.contents(kind):
            yield _parse(content, path, check=check)

    def contents(self, kind: Kind) -> Iterator[tuple[str, bytes]]:
        """Yield (path, bytes) of all records of a kind, sorted by key."""
        paths = sorted(path for path in self._find(f"{self.root}/{kind}") if path.endswith(".json"))
        if self.is_local:
            for path in paths:
                with suppress(FileNotFoundError):  # removed since it was listed
                    yield path, Path(path).read_bytes()
            return
        for start in range(0, len(paths), 500):  # asynchronous file systems fetch a block at once
            block = paths[start : start + 500]
            found = self.fs.cat(block, on_error="return")
            for path in block:
                if isinstance(found[path], FileNotFoundError):
                    continue
                if isinstance(found[path], Exception):  # to go on without it would make its files look like leftovers
                    raise found[path]
                yield path, found[path]

    def put(self, kind: Kind, key: str, record: Mapping[str, Any], files: Mapping[str, bytes] | None = None) -> bool:
        """Write a piece, whole or not at all.

        Args:
            kind: where it goes.
            key: ``content_key`` of its specification.
            record: plain data; "key", "files" and "checksum" are added.
            files: content by name.

        Returns:
            Whether this call wrote it; False if it was there already, which then stays as it is.
        """
        named: dict[str, Any] = {}
        folder = f"{self.root}/files/{key[:2]}/{key}-{secrets.token_hex(6)}"
        for name, content in (files or {}).items():
            self._write_file(f"{folder}/{name}", content)
            named[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        whole = {**json_ready(dict(record)), "key": key, "files": named}
        if files:
            whole["folder"] = folder.rpartition("/")[2]
        whole["checksum"] = checksum_of(whole)
        written = self._write_once(self.path(kind, key), canonical(whole))
        if not written and files:
            self.fs.rm(folder, recursive=True)
        return written

    def remove(self, kind: Kind, key: str) -> None:
        """Remove a record and its files; nothing happens if there is none."""
        try:
            record = self.read(kind, key)
        except KeyError:
            return
        except StoreError:
            record = {}
        self._discard(self.path(kind, key))
        if "folder" in record:
            self._remove_tree(f"{self.root}/files/{key[:2]}/{record['folder']}")

    def file(self, record: Mapping[str, Any], name: str) -> bytes:
        """Return a file of a record.

        Raises:
            StoreError: the record has no such file, it is gone, or its content is not what was written.
        """
        if name not in record["files"]:
            raise StoreError(f"{record['key']} has no file {name!r}; it has {', '.join(record['files']) or 'none'}")
        path = f"{self.folder(record)}/{name}"
        try:
            content: bytes = self.fs.cat_file(path)
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing") from error
        if hashlib.sha256(content).hexdigest() != record["files"][name]["sha256"]:
            raise StoreError(f"{path} has changed since it was written: its checksum differs")
        return content

    def folder(self, record: Mapping[str, Any]) -> str:
        """Return where a record's files are."""
        return f"{self.root}/files/{record['key'][:2]}/{record['folder']}"

    @contextmanager
    def as_folder(self, record: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a local folder with a record's files, checked against their checksums."""
        with tempfile.TemporaryDirectory() as scratch:
            for name in record["files"]:
                (Path(scratch) / name).write_bytes(self.file(record, name))
            yield Path(scratch)

    # -- claims -------------------------------------------------------------------------------------------------

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Yield whether this process may work on a piece; while it does, others are told no.

        A claim ends with the block, with its process on this machine, or when it has been silent for a minute.
        """
        path, token = f"{self.root}/claims/{key}.json", secrets.token_hex(8)
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
            if _token(self._content(path)) == token:
                self._discard(path)

    def _take(self, path: str, token: str) -> bool:
        claim = canonical({**_whoami(), "token": token, "beat": 0})
        if self._write_once(path, claim):
            return True
        content = self._content(path)
        if content is None:  # it has just ended
            return self._write_once(path, claim)
        if not self._is_dead(path, content):
            return False
        right = f"{path}.{hashlib.sha256(content).hexdigest()[:16]}"  # to replace this very claim: one process has it
        if not self._write_once(right, claim):
            holder = self._content(right)
            if holder is not None and self._is_dead(right, holder):  # killed before it could use it
                self._discard(right)
            return False
        try:
            if self._content(path) != content:  # somebody was faster
                return False
            self._write_file(path, claim)
            return True
        finally:
            self._discard(right)

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
                if _token(self._content(path)) != token:
                    return  # taken over, after a long silence
                beat += 1
                self._write_file(path, canonical({**_whoami(), "token": token, "beat": beat}))

    # -- cleaning -----------------------------------------------------------------------------------------------

    def leftovers(self, *, grace_seconds: float) -> list[str]:
        """Return files and folders that no record names and nobody is writing: what killed processes left.

        Args:
            grace_seconds: younger ones may be in use and are left out.
        """
        ages = list(self._ages(self.root))  # before the records: what gets its record in between is named
        named = {record["folder"] for kind in KINDS for record in self.records(kind) if "folder" in record}
        found: dict[str, float] = {}
        oldest = time.time() - grace_seconds
        for path, age in ages:
            relative = path.removeprefix(self.root + "/")
            parts = relative.split("/")
            if parts[0] == "files" and len(parts) >= 4:
                if parts[2] not in named:
                    folder = f"{self.root}/files/{parts[1]}/{parts[2]}"
                    found[folder] = max(age, found.get(folder, 0.0))
            elif parts[-1].endswith(".tmp") or (parts[0] == "claims" and self._is_forgotten(path, age)):
                found[path] = age
        return sorted(path for path, age in found.items() if age <= oldest)

    def discard(self, path: str) -> None:
        """Remove one of the ``leftovers``."""
        self._remove_tree(path)

    def _is_forgotten(self, path: str, age: float) -> bool:
        """Say whether a claim, last written at ``age``, is nobody's: for a process elsewhere, by a wide margin of time."""
        content = self._content(path)
        is_running = None if content is None else _runs_here(content)
        return not is_running if is_running is not None else age < time.time() - 10 * SILENCE_SECONDS

    # -- the file system ----------------------------------------------------------------------------------------

    def _find(self, folder: str) -> list[str]:
        if self.is_local:  # several times faster than asking through fsspec
            return [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
        self.fs.invalidate_cache()
        return list(self.fs.find(folder)) if self.fs.exists(folder) else []

    def _ages(self, folder: str) -> Iterable[tuple[str, float]]:
        for path in self._find(folder):
            try:
                yield path, self.fs.modified(path).timestamp()
            except (FileNotFoundError, NotImplementedError):
                continue

    def _content(self, path: str) -> bytes | None:
        try:
            self.fs.invalidate_cache()
            return bytes(self.fs.cat_file(path))
        except FileNotFoundError:
            return None

    def _write_file(self, path: str, content: bytes) -> None:
        """Write a whole file, in place of the one there may be."""
        if self.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(path, content)
        else:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, content)

    def _write_once(self, path: str, content: bytes) -> bool:
        """Make a file appear whole, unless there is one already; say whether it was made."""
        if not self.is_local:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                self.fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.link(temporary, target)  # unlike a rename, this refuses to replace
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            if target.exists():
                return False
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def _discard(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm(path)

    def _remove_tree(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm(path, recursive=True)


def _parse(content: bytes, path: str, *, check: bool = True) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(content)
        for name in (record["key"], record.get("folder", "-"), *record["files"]):
            if name in ("", ".", "..") or "/" in name or "\\" in name:  # a store may come from anywhere
                raise StoreError(f"{path} names a file outside of its folder: {name!r}")
        if check and (record["checksum"] != checksum_of(record) or content != canonical(record)):  # to the byte
            raise StoreError(f"{path} has changed since it was written: its checksum differs")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is not a readable record ({error!r})") from error
    return record


def _token(content: bytes | None) -> str | None:
    try:
        return None if content is None else str(json.loads(content)["token"])
    except (ValueError, TypeError, KeyError):
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
    except (ValueError, TypeError, KeyError):
        return None
