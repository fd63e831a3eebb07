"""The file system below a store: a path or any fsspec URL, with files that appear whole. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lustral.files import write_bytes_atomic, write_bytes_once


@dataclass
class Disk:
    """Files under one root; all paths are whole paths below it.

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
            except (FileNotFoundError, NotImplementedError):
                continue

    def content(self, path: str) -> bytes | None:
        """Return a file's bytes as they are now, or None if there is none."""
        try:
            self.fs.invalidate_cache()
            return bytes(self.fs.cat_file(path))
        except FileNotFoundError:
            return None

    def write_file(self, path: str, content: bytes) -> None:
        """Write a whole file, in place of the one there may be."""
        if self.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(path, content)
        else:
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.fs.pipe_file(path, content)

    def write_once(self, path: str, content: bytes) -> bool:
        """Make a file appear whole, unless there is one already; say whether it was made."""
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
        with suppress(FileNotFoundError):
            self.fs.rm(path)

    def remove_tree(self, path: str) -> None:
        """Remove a file or a folder with all that is in it, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.rm(path, recursive=True)
