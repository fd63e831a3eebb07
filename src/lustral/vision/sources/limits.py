"""What a data set may cost: declared sizes are checked against these limits before anything is allocated.

Files and folders come from outside, so they may be made to exhaust memory, disk or patience. Nothing but regular files is
opened: a pipe or a device would hang.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from lustral.vision.sources.record import SourceError

MEMORY_VARIABLE = "LUSTRAL_MEMORY"  # environment variable with the GiB that the images of a data set may take
GIB = 2**30
DEFAULT_MEMORY = 4.0  # GiB; 27,000 pictures of 224 x 224 pixels
MOST_IMAGES = 2_000_000  # of a data set; ImageNet has 1.3 million
MOST_CLASSES = 100_000  # counts, masks and tables are made for each class
MOST_PIXELS = 64_000_000  # of one picture, as stored or resized; cameras reach 60 million
MOST_EXPANSION = 200  # packed arrays and tables may hold this many times their size; zeros reach 230 to 1,030 (deflate)
MOST_PICTURE_EXPANSION = 500  # the same for pictures, as RGB: photographs reach 30, drawings of one bit per pixel 200
FREE_EXPANSION = 2**28  # bytes that need no such proof
MOST_NAME_LENGTH = 1000  # characters of a class name


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
    _require_regular(path, os.stat(path).st_mode)  # before opening: that alone can act on a device
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(path, os.fstat(descriptor).st_mode)  # it may have been exchanged
        return os.fdopen(descriptor, "rb")
    except SourceError:
        os.close(descriptor)
        raise


def _require_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise SourceError(f"{path}: expected a regular file; this is a folder, pipe, device or socket")
