"""Atomic writing: a killed process or a full disk leaves the old file intact, never half of a new one; and canonical JSON."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import mmap
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK)  # of file systems without hard links


def open_regular(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Open a regular file for reading its bytes; symbolic links are followed.

    A pipe would wait for a writer for ever, and a device may never end.

    Raises:
        ValueError: it is a folder, a pipe, a device or a socket.
        OSError: there is no such file, its links lead in a circle, it may not be read, ...
    """
    _require_regular(os.stat(path), path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # another file may have taken its place
    try:
        _require_regular(os.fstat(descriptor), path)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def map_regular(path: str | os.PathLike[str], *, most: int) -> mmap.mmap | bytearray:
    """Return the content of a regular file as memory that may be written to without changing the file.

    Pages come from the disk when they are looked at, so a long file costs nothing until then.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        ValueError: it is longer; and see ``open_regular``.
        OSError: see ``open_regular``.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{os.fspath(path)}: {size} bytes; expected at most {most}")
        if not size:
            return bytearray()  # an empty file cannot be mapped
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal digits.

    Raises:
        ValueError, OSError: see ``open_regular``.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise ValueError(f"{os.fspath(path)}: expected a regular file; got {kind}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the place of ``path`` when the block ends without an error.

    The bytes go to a temporary file in the same folder, reach the disk, and only then get the name; readers see the old
    file or the new one. After an error the temporary file is gone and ``path`` is as it was. A symbolic link is
    followed.

    Args:
        path: the file to write; its folder must exist.

    Raises:
        OSError: the disk is full, the folder is missing or not writable, ...; names ``path``.
    """
    target = Path(os.path.realpath(path))
    temporary = _beside(target)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise  # about something else that the block was doing
        raise OSError(error.errno, f"{error.strerror}; nothing was written to", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes | bytearray | mmap.mmap) -> None:
    """Write a whole file, or leave the old one; see ``atomic_write``."""
    with atomic_write(path) as file:
        file.write(content)


def write_bytes_once(path: str | os.PathLike[str], content: bytes) -> bool:
    """Make a file appear whole, in one step, unless there is one already.

    Returns:
        Whether this call made it; of several at once, one does.

    Raises:
        OSError: the disk is full, ...; nothing was written.
    """
    target = Path(path)
    temporary = _beside(target)
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
            raise OSError(error.errno, f"{error.strerror}; nothing was written to", str(path)) from error
        if target.exists():
            return False
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return True


class NotRegularError(ValueError):
    """What should be read is no regular file, or larger than allowed."""


def read_regular(path: str | os.PathLike[str], *, most: int, follow: bool = True) -> bytes:
    """Read a whole regular file: never a device or a pipe, which may have no end, and never more than ``most`` bytes.

    Args:
        path: the file.
        most: its largest size, bytes.
        follow: whether it may be a symbolic link.

    Raises:
        NotRegularError: it is something else, or larger.
        OSError: it is not there, may not be read, ...
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        number = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link where none may be; a socket, a pipe nobody reads
            raise NotRegularError(f"{os.fspath(path)} is a link or no regular file") from error
        raise
    status = os.fstat(number)
    if not stat.S_ISREG(status.st_mode):
        os.close(number)
        raise NotRegularError(f"{os.fspath(path)} is no regular file")
    with open(number, "rb") as file:
        content = file.read(status.st_size + 1) if status.st_size <= most else b""  # a buffer of the size that is there
        while status.st_size < len(content) <= most and (
            more := file.read(2**20)
        ):  # it grows, or does not tell its size
            content += more
        if status.st_size > most or len(content) > most:
            raise NotRegularError(f"{os.fspath(path)} is larger than the {most:,} bytes that it may have")
        return content


def is_deep(value: Any, most: int) -> bool:
    """Say whether mappings and lists are inside each other more than ``most`` times.

    >>> is_deep([[1], [2]], 2), is_deep([[1], [[2]]], 2)
    (False, True)
    """
    level = [value]
    for _ in range(most + 1):
        inner = [item for item in level if isinstance(item, Mapping | list | tuple)]
        level = [each for item in inner for each in (item.values() if isinstance(item, Mapping) else item)]
        if not inner:
            return False
    return True


def prepare_folder(folder: str | os.PathLike[str]) -> Path:
    """Make the folder for results before the work starts, so that a bad path fails at once."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    return place


def _beside(target: Path) -> Path:
    """Return a new temporary name in the folder of a file."""
    return target.with_name(f".{secrets.token_hex(8)}.tmp")


def write_text_atomic(path: str | os.PathLike[str], content: str) -> None:
    """Write a whole file as UTF-8, or leave the old one; see ``atomic_write``."""
    write_bytes_atomic(path, content.encode())


def write_json_atomic(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON object, or leave the old file; see ``atomic_write``.

    JSON has neither NaN nor infinity: such numbers become ``null``.
    """
    write_text_atomic(path, json.dumps(json_ready(content), indent=2, allow_nan=False) + "\n")


def json_ready(value: Any) -> Any:
    """Return nested mappings and sequences with None in place of numbers that JSON does not have.

    >>> json_ready({"area": float("inf"), "labels": (1, 2)})
    {'area': None, 'labels': [1, 2]}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    return value


def canonical(content: Any) -> bytes:
    """Return plain data as the one JSON text that stands for it: sorted keys, no blanks."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return text.encode()
