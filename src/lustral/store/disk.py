"""The file system below a store: a path or any fsspec URL, with files that appear whole. Imports no torch."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lustral.core.files import NotRegularError, read_regular, write_bytes_atomic, write_bytes_once

MOST_CLAIM_BYTES = 1 << 16


class StoreError(ValueError):
    """The store cannot be used, or something in it is damaged."""


@dataclass
class Disk:
    """Files under one root; all paths are whole paths below it. A store may come from anywhere: on a local file system, only
    regular files below the root are touched, never what a link leads to.

    Attributes:
        url: a path, or an fsspec URL such as "s3://bucket/folder" or "memory://bench".
    """

    url: str

    def __post_init__(self) -> None:
        """Resolve the root; raises ``ValueError`` or ``ImportError`` where fsspec cannot."""
        fs, root = fsspec.core.url_to_fs(self.url)
        self.fs: Any = fs
        self.root: str = root.rstrip("/")
        self.is_local = isinstance(fs, LocalFileSystem)
        self._inside: set[str] = set()  # folders that no link leads out of

    def require_inside(self, path: str) -> None:
        """Raise ``StoreError`` if the folder of a path is not below the root, for instance behind a symbolic link."""
        folder = path.rpartition("/")[0]
        if not self.is_local or folder in self._inside:
            return
        root, real = os.path.realpath(self.root), os.path.realpath(folder)
        if real != root and not real.startswith(root.rstrip("/") + "/"):
            raise StoreError(f"{folder} leads out of the store, to {real}; a store has its files in its own folder")
        self._inside.add(folder)

    def read(self, path: str, *, most: int) -> bytes:
        """Return a file's bytes; on a local file system never more than ``most``.

        Raises:
            StoreError: it is no regular file, is outside of the root, or larger.
            FileNotFoundError: there is none.
        """
        if not self.is_local:
            return bytes(self.fs.cat_file(path))
        self.require_inside(path)
        try:
            return read_regular(path, most=most, follow=False)
        except NotRegularError as error:
            raise StoreError(str(error)) from error

    def now(self) -> float:
        """Return the time by the file system's own clock, which may differ from ours: that of a file written just now."""
        probe = f"{self.root}/.{secrets.token_hex(8)}.tmp"
        self.write_file(probe, b"clock")
        try:
            return float(self.fs.modified(probe).timestamp())
        except NotImplementedError:
            return 0.0  # it has no times: nothing is old
        finally:
            self.discard(probe)

    def exists(self, path: str) -> bool:
        """Say whether there is such a file or folder, now."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(path))

    def find(self, folder: str) -> list[str]:
        """Return the paths of all files in a folder and below."""
        if self.is_local:  # several times faster than asking through fsspec
            return [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
        self.fs.invalidate_cache()
        return list(self.fs.find(folder)) if self.fs.exists(folder) else []

    def ages(self, folder: str) -> Iterable[tuple[str, float]]:
        """Yield (path, time of last change) of all files in a folder and below; those that are gone by now are left out."""
        for path in self.find(folder):
            try:
                yield path, self.fs.modified(path).timestamp()
            except (FileNotFoundError, NotImplementedError):  # gone, or a link to nowhere
                continue

    def content(self, path: str) -> bytes | None:
        """Return the bytes of a small file as they are now, or None if there is none; of what is no file, none."""
        try:
            self.fs.invalidate_cache()
            return self.read(path, most=MOST_CLAIM_BYTES)
        except FileNotFoundError:
            return None
        except StoreError:
            return b""

    def write_file(self, path: str, content: bytes) -> None:
        """Write a whole file, in place of the one there may be."""
        self.require_inside(path)
        if self.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(path, content)
        else:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, content)

    def write_once(self, path: str, content: bytes) -> bool:
        """Make a file appear whole, unless there is one already; say whether it was made."""
        self.require_inside(path)
        if not self.is_local:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            try:
                self.fs.pipe_file(path, content, mode="create")
            except FileExistsError:
                return False
            return True
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return write_bytes_once(path, content)

    def discard(self, path: str) -> None:
        """Remove a file, if it is there."""
        self.require_inside(path)
        with suppress(FileNotFoundError):
            self.fs.rm(path)

    def remove_tree(self, path: str) -> None:
        """Remove a file or a folder with all that is in it, if it is there."""
        self.require_inside(path)
        with suppress(FileNotFoundError):
            self.fs.rm(path, recursive=True)
