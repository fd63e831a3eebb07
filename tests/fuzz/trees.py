"""Files and folders as values: what a specimen is before and after it is damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Pipe:
    """A named pipe, which nobody writes to."""


@dataclass(frozen=True)
class Folder:
    """An empty folder."""


Entry = bytes | Link | Pipe | Folder
Tree = Mapping[str, Entry]  # by the path inside of the specimen's folder
SPECIALS: tuple[Entry, ...] = (
    Link("/dev/zero"),
    Link("/etc/passwd"),
    Link("."),
    Link("/"),
    Link("gone"),
    Pipe(),
    Folder(),
)


def write_tree(folder: Path, tree: Tree) -> None:
    """Write a tree in place of whatever is there; entries that no file system takes are left out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, entry in tree.items():
        path = folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(entry, bytes):
                path.write_bytes(entry)
            elif isinstance(entry, Link):
                path.symlink_to(entry.target)
            elif isinstance(entry, Pipe):
                os.mkfifo(path)
            else:
                path.mkdir()
        except (OSError, ValueError):  # a name that is too long, holds a zero byte, or is taken
            continue


def read_tree(folder: Path) -> dict[str, Entry]:
    """Return the files of a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
