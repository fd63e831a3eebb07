"""A folder of finished work, each piece named by the hash of its full specification.

    ROOT/store.json                     what this folder is
    ROOT/victims/ab/abcd....json        a record: specification, results, and the files that belong to it
    ROOT/results/..., ROOT/audits/..., ROOT/assets/..., ROOT/failures/...
    ROOT/files/ab/abcd....-TOKEN/NAME   those files; TOKEN is the attempt that wrote them
    ROOT/claims/abcd....json            who is working on what

A piece exists when its record exists. Files are written first, then the record appears in one step and only where none was, so a
killed process leaves at most files that no record names (``gc`` removes them), and of two writers one wins whole. The root
is a path or any fsspec URL. Nothing here imports torch: tables and pages are made without it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lustral.bench.claims import Claims
from lustral.bench.disk import Disk
from lustral.files import canonical, json_ready

Kind = Literal["victims", "results", "audits", "assets", "failures"]
KINDS: tuple[Kind, ...] = ("victims", "results", "audits", "assets", "failures")
LAYOUT = 1
MODEL_FILE = "model.safetensors"  # files that belong to a record
DETAIL_FILE = "detail.json"
TRIGGER_PICTURE = "trigger.png"
RECOVERED_PICTURE = "recovered.png"


class StoreError(ValueError):
    """The store cannot be used, or something in it is damaged."""


def content_key(spec: Mapping[str, Any]) -> str:
    """Return the name of a specification: the SHA-256 of its canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical(spec)).hexdigest()


def checksum_of(record: Mapping[str, Any]) -> str:
    """Return the checksum of a record: over everything but the checksum itself."""
    return hashlib.sha256(canonical({k: v for k, v in record.items() if k != "checksum"})).hexdigest()


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

    def open(self, *, create: bool) -> Store:
        """Check that the root is a store, or make it one.

        Raises:
            StoreError: there is no store, or it was written by another version.
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
            layout = json.loads(self.disk.fs.cat_file(marker))["layout"]
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{marker} is not readable ({error!r}); {self.url} is no store") from error
        if layout != LAYOUT:
            raise StoreError(f"{self.url} has layout {layout}, this version reads {LAYOUT}")
        return self

    def path(self, kind: Kind, key: str) -> str:
        """Return where a record is."""
        return f"{self.root}/{kind}/{key[:2]}/{key}.json"

    def has(self, kind: Kind, key: str) -> bool:
        """Say whether a record exists."""
        return self.disk.exists(self.path(kind, key))

    def keys(self, kind: Kind) -> set[str]:
        """Return the keys of all records of a kind."""
        return {Path(path).stem for path in self.disk.find(f"{self.root}/{kind}") if path.endswith(".json")}

    def read(self, kind: Kind, key: str) -> dict[str, Any]:
        """Return a record.

        Raises:
            KeyError: there is none.
            StoreError: it is damaged.
        """
        try:
            content = self.disk.fs.cat_file(self.path(kind, key))
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
        paths = sorted(path for path in self.disk.find(f"{self.root}/{kind}") if path.endswith(".json"))
        if self.disk.is_local:
            for path in paths:
                with suppress(FileNotFoundError):  # removed since it was listed
                    yield path, Path(path).read_bytes()
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
        for name, content in (files or {}).items():
            self.disk.write_file(f"{folder}/{name}", content)
            named[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        whole = {**json_ready(dict(record)), "key": key, "files": named}
        if files:
            whole["folder"] = folder.rpartition("/")[2]
        whole["checksum"] = checksum_of(whole)
        written = self.disk.write_once(self.path(kind, key), canonical(whole))
        if not written and files:
            self.disk.fs.rm(folder, recursive=True)
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
        if "folder" in record:
            self.disk.remove_tree(f"{self.root}/files/{key[:2]}/{record['folder']}")

    def file(self, record: Mapping[str, Any], name: str) -> bytes:
        """Return a file of a record.

        Raises:
            StoreError: the record has no such file, it is gone, or its content is not what was written.
        """
        if name not in record["files"]:
            raise StoreError(f"{record['key']} has no file {name!r}; it has {', '.join(record['files']) or 'none'}")
        path = f"{self.folder(record)}/{name}"
        try:
            content: bytes = self.disk.fs.cat_file(path)
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

    def claim(self, key: str) -> AbstractContextManager[bool]:
        """Yield whether this process may work on a piece; see ``Claims.claim``."""
        return self.claims.claim(key)

    def leftovers(self, *, grace_seconds: float) -> list[str]:
        """Return files and folders that no record names and nobody is writing: what killed processes left.

        Args:
            grace_seconds: younger ones may be in use and are left out.
        """
        ages = list(self.disk.ages(self.root))  # before the records: what gets its record in between is named
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
            elif parts[-1].endswith(".tmp") or (parts[0] == "claims" and self.claims.is_forgotten(path, age)):
                found[path] = age
        return sorted(path for path, age in found.items() if age <= oldest)

    def discard(self, path: str) -> None:
        """Remove one of the ``leftovers``."""
        self.disk.remove_tree(path)


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
