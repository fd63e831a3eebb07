"""A folder of finished work, each piece named by the hash of its full specification.

    ROOT/store.json                     what this folder is
    ROOT/victims/ab/abcd....json        a record: specification, results, and the files that belong to it
    ROOT/scans/..., ROOT/purifications/..., ROOT/siftings/..., ROOT/trainings/..., ROOT/audits/...
    ROOT/generators/..., ROOT/pair_siftings/..., ROOT/generator_scans/..., ROOT/generator_erasures/...
    ROOT/assets/..., ROOT/failures/...
    ROOT/files/ab/abcd....-TOKEN/NAME   those files; TOKEN is the attempt that wrote them
    ROOT/claims/abcd....json            who is working on what

A piece exists when its record exists. Files are written first, then the record appears in one step and only where none was, so a
killed process leaves at most files that no record names (``gc`` removes them), and of two writers one wins whole. The root
is a path or any fsspec URL. Nothing here imports torch: tables and pages are made without it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lustral.core.files import canonical, json_ready, write_bytes_atomic
from lustral.core.settings import shortened
from lustral.store.claims import Claims
from lustral.store.disk import Disk
from lustral.store.disk import StoreError as StoreError
from lustral.store.parsing import checksum_of as checksum_of
from lustral.store.parsing import content_key as content_key
from lustral.store.parsing import parse_record
from lustral.store.parsing import read_json as read_json

Kind = Literal[
    "victims",
    "scans",
    "purifications",
    "siftings",
    "trainings",
    "audits",
    "generators",
    "pair_siftings",
    "generator_scans",
    "generator_erasures",
    "assets",
    "failures",
    "results",
]
CELLS: tuple[Kind, ...] = (  # what needs others comes after them
    *("victims", "scans", "purifications", "siftings", "trainings"),
    "audits",
    *("generators", "pair_siftings", "generator_scans", "generator_erasures"),
)
KINDS: tuple[Kind, ...] = (*CELLS, "assets", "failures")
FORMER: tuple[Kind, ...] = ("results",)  # of the first layout; see ``former.py``
LAYOUT = 4
READABLE = (
    1,
    2,
    3,
    LAYOUT,
)  # the victims of the first are today's; the second had no siftings, the third no generators
MOST_RECORD_BYTES = 16 << 20  # ours have some kilobytes
MOST_FILE_BYTES = 4 << 30  # of a file that belongs to a record
KEY = re.compile(r"[0-9a-f]{64}")
MODEL_FILE = "model.safetensors"  # files that belong to a record
DETAIL_FILE = "detail.json"
TRIGGER_PICTURE = "trigger.png"
RECOVERED_PICTURE = "recovered.png"


@dataclass
class Store:
    """Records and their files under one root.

    Attributes:
        url: a path, or an fsspec URL such as "s3://bucket/folder" or "memory://bench".
    """

    url: str

    def __post_init__(self) -> None:
        """Resolve the root."""
        try:
            self.disk = Disk(self.url)
        except (ValueError, ImportError) as error:
            raise StoreError(f"the store {self.url!r} cannot be opened: {error}") from error
        self.root = self.disk.root
        self.claims = Claims(disk=self.disk, folder=f"{self.root}/claims")

    def open(self, *, create: bool, write: bool = False) -> Store:
        """Check that the root is a store, or make it one.

        Args:
            create: make a store where there is none, and write into it.
            write: whether cells will be written: a store of a former layout is marked as one of this layout first, so that no
                earlier version takes what it does not know for leftovers.

        Raises:
            StoreError: there is no store, or it was written by a later version.
        """
        marker = f"{self.root}/store.json"
        if not self.disk.fs.exists(marker):
            if not create:
                raise StoreError(f"{self.url} is no store of benchmark results; make one with `lustral bench run`")
            found = self.disk.fs.ls(self.root, detail=False) if self.disk.fs.exists(self.root) else []
            strangers = [path for path in found if not path.endswith(".tmp")]  # of a process that is making it, too
            if strangers and not self.disk.fs.exists(marker):
                raise StoreError(f"{self.url} is not empty and no store: name a new folder, or an existing store")
            self.disk.fs.makedirs(self.root, exist_ok=True)
            self.disk.write_once(marker, canonical({"layout": LAYOUT}))
        try:
            layout = read_json(self.disk.read(marker, most=MOST_RECORD_BYTES))["layout"]
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{marker} is not readable ({error!r}); {self.url} is no store") from error
        if layout not in READABLE or isinstance(layout, bool):
            raise StoreError(
                f"{self.url} has layout {shortened(layout)}; this version reads {READABLE[0]} to {LAYOUT}: use the "
                "version of lustral that wrote it, or name another store"
            )
        if layout != LAYOUT and (create or write):
            self.disk.write_file(marker, canonical({"layout": LAYOUT}))
        return self

    def path(self, kind: Kind, key: str) -> str:
        """Return where a record is."""
        return f"{self.root}/{kind}/{key[:2]}/{key}.json"

    def has(self, kind: Kind, key: str) -> bool:
        """Say whether a record exists."""
        return self.disk.exists(self.path(kind, key))

    def keys(self, kind: Kind) -> set[str]:
        """Return the keys of all records of a kind; what is elsewhere than its name says is no record."""
        found = {path.rpartition("/")[2].removesuffix(".json"): path for path in self.disk.find(f"{self.root}/{kind}")}
        return {key for key, path in found.items() if path == self.path(kind, key)}

    def read(self, kind: Kind, key: str) -> dict[str, Any]:
        """Return a record.

        Raises:
            KeyError: there is none.
            StoreError: it is damaged.
        """
        try:
            content = self.disk.read(self.path(kind, key), most=MOST_RECORD_BYTES)
        except FileNotFoundError as error:
            raise KeyError(f"no {kind} record {key}") from error
        return parse_record(content, self.path(kind, key))

    def records(self, kind: Kind, *, check: bool = True) -> Iterator[dict[str, Any]]:
        """Yield all records of a kind, sorted by key; damaged ones raise ``StoreError``.

        Args:
            kind: which.
            check: compare each with its checksum; without, only what is not JSON counts as damaged.
        """
        for path, content in self.contents(kind):
            yield parse_record(content, path, check=check)

    def contents(self, kind: Kind) -> Iterator[tuple[str, bytes]]:
        """Yield (path, bytes) of all records of a kind, sorted by key."""
        paths = sorted(path for path in self.disk.find(f"{self.root}/{kind}") if path.endswith(".json"))
        if self.disk.is_local:
            for path in paths:
                with suppress(FileNotFoundError):  # removed since it was listed
                    yield path, self.disk.read(path, most=MOST_RECORD_BYTES)
            return
        for start in range(0, len(paths), 500):  # asynchronous file systems fetch a block at once
            block = paths[start : start + 500]
            found = self.disk.fs.cat(block, on_error="return")
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
        written = False
        try:
            for name, content in (files or {}).items():
                self.disk.write_file(f"{folder}/{name}", content)
                named[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            whole = {**json_ready(dict(record)), "key": key, "files": named}
            if files:
                whole["folder"] = folder.rpartition("/")[2]
            whole["checksum"] = checksum_of(whole)
            written = self.disk.write_once(self.path(kind, key), canonical(whole))
        finally:
            if not written and files:  # somebody was faster, or the disk is full
                self.disk.remove_tree(folder)
        return written

    def remove(self, kind: Kind, key: str) -> None:
        """Remove a record and its files; nothing happens if there is none."""
        try:
            record = self.read(kind, key)
        except KeyError:
            return
        except StoreError:
            record = {}
        self.disk.discard(self.path(kind, key))
        if record.get("files"):
            self.disk.remove_tree(f"{self.root}/files/{key[:2]}/{record['folder']}")

    def file(self, record: Mapping[str, Any], name: str, *, most: int = MOST_FILE_BYTES) -> bytes:
        """Return a file of a record, of at most so many bytes.

        Raises:
            StoreError: the record has no such file, it is gone, or its content is not what was written.
        """
        if name not in record["files"]:
            raise StoreError(f"{record['key']} has no file {name!r}; it has {', '.join(record['files']) or 'none'}")
        path = f"{self.folder(record)}/{name}"
        try:
            content = self.disk.read(path, most=most)
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
                write_bytes_atomic(Path(scratch) / name, self.file(record, name))
            yield Path(scratch)

    def claim(self, key: str) -> AbstractContextManager[bool]:
        """Yield whether this process may work on a piece; see ``Claims.claim``."""
        return self.claims.claim(key)

    def leftovers(self, *, grace_seconds: float) -> list[str]:
        """Return files and folders that no record names and nobody is writing: what killed processes left.

        While any claim may be somebody's, only claims that are nobody's are: what else no record names may be in work. Ages
        are by the clock of the store's own file system; what is from its future stays. Watching claims of other machines
        takes a minute.

        Args:
            grace_seconds: younger ones may be in use and are left out.
        """
        ages = dict(self.disk.ages(self.root))  # before the records: what gets its record in between is named
        now = self.disk.now()
        claims = {path: age for path, age in ages.items() if path.startswith(f"{self.root}/claims/")}
        claims = {path: age for path, age in claims.items() if not path.endswith(".tmp")}
        forgotten = self.claims.forgotten(claims, now)
        if any(self.disk.exists(path) for path in claims.keys() - forgotten):
            return sorted(path for path in forgotten if ages[path] <= now - grace_seconds)
        named = {record["folder"] for kind in (*KINDS, *FORMER) for record in self.records(kind) if "folder" in record}
        found: dict[str, float] = {path: claims[path] for path in forgotten}
        for path, age in ages.items():
            parts = path.removeprefix(self.root + "/").split("/")
            if parts[0] == "files" and len(parts) >= 4:
                if parts[2] not in named:
                    folder = f"{self.root}/files/{parts[1]}/{parts[2]}"
                    found[folder] = max(age, found.get(folder, 0.0))
            elif parts[-1].endswith(".tmp"):
                found[path] = age
        return sorted(path for path, age in found.items() if age <= now - grace_seconds)

    def discard(self, path: str) -> None:
        """Remove one of the ``leftovers``."""
        self.disk.remove_tree(path)
