"""What a data set may cost: declared sizes are checked against ``core.limits`` before anything is allocated.

Files and folders come from outside, so they may be made to exhaust memory, disk or patience. Nothing but regular files is
opened: a pipe or a device would hang.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from lustral.core import files
from lustral.core.limits import (
    DEFAULT_MEMORY,
    FREE_EXPANSION,
    GIB,
    MEMORY_VARIABLE,
    MOST_EXPANSION,
    MOST_IMAGES,
    MOST_NAME_LENGTH,
    MOST_PICTURE_EXPANSION,
)
from lustral.vision.sources.record import SourceError


def memory_limit() -> int:
    """Return the bytes that the images of one data set may take: 4 GiB, or what LUSTRAL_MEMORY says.

    Raises:
        SourceError: LUSTRAL_MEMORY is no positive number.
    """
    text = os.environ.get(MEMORY_VARIABLE) or str(DEFAULT_MEMORY)
    try:
        limit = int(float(text) * GIB)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise SourceError(f"{MEMORY_VARIABLE}: expected a positive number of GiB, such as 16; got {text!r}")
    return limit


def check_memory(needed: int, where: str) -> None:
    """Raise ``SourceError`` where images would take more bytes than ``memory_limit()``."""
    if needed > (limit := memory_limit()):
        raise SourceError(
            f"{where}: its images take {needed / GIB:,.2f} GiB in memory, more than the {limit / GIB:.3g} GiB allowed: use "
            f"fewer or smaller images (--image-size), open an image folder with stream=True, or set {MEMORY_VARIABLE} to "
            "the GiB that you allow"
        )


def check_expansion(declared: int, stored: int, where: str, most: int | None = None) -> None:
    """Raise ``SourceError`` where a file of ``stored`` bytes declares far more than real data of that size hold."""
    most = MOST_EXPANSION if most is None else most
    if declared > max(most * stored, FREE_EXPANSION):
        raise SourceError(
            f"{where}: {stored:,} bytes that unpack to {declared:,}; expected at most {most} times as many: "
            "this is no plausible data set. If it is, save it without compression, or with smaller images"
        )


class Expansion:
    """Adds up what pictures unpack to, as ``check_expansion`` allows for a file or folder."""

    def __init__(self, stored: int, where: str) -> None:
        """Start with nothing unpacked of ``stored`` bytes."""
        self._stored, self._where, self._unpacked = stored, where, 0

    def add(self, unpacked: int) -> None:
        """Add the bytes of one picture; raises ``SourceError`` when it is too much."""
        self._unpacked += unpacked
        check_expansion(self._unpacked, self._stored, self._where, MOST_PICTURE_EXPANSION)


def check_count(count: int, where: str) -> None:
    """Raise ``SourceError`` unless a data set can have so many images."""
    if not 0 <= count <= MOST_IMAGES:
        raise SourceError(f"{where}: expected at most {MOST_IMAGES:,} images; found {count:,}: use a part of them")


def check_names(names: Iterable[str], where: str) -> tuple[str, ...]:
    """Return class names as they are (whoever shows them escapes them); raises ``SourceError`` for endless ones."""
    checked = tuple(names)
    if (longest := max(map(len, checked), default=0)) > MOST_NAME_LENGTH:
        raise SourceError(
            f"{where}: expected class names of at most {MOST_NAME_LENGTH} characters; found one of {longest:,}"
        )
    return checked


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read; a link to one will do.

    Raises:
        SourceError: it is a pipe, device, socket or folder.
        OSError: it cannot be opened.
    """
    try:
        return files.open_regular(path)
    except ValueError as error:
        raise SourceError(f"{path}: expected a regular file; this is a folder, pipe, device or socket") from error
