"""What the pages of a Parquet file declare about their sizes, read before the library that would believe them.

Reference:
    Apache Thrift, "Thrift compact protocol encoding"; Apache Parquet, parquet.thrift, ``PageHeader``.
"""

from __future__ import annotations

import contextlib
from typing import BinaryIO

_PAGE_HEADERS = (2**12, 2**16, 2**24)  # bytes read to find a page's header: about 50, more with statistics
_TRUTHS, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _STRUCT = (1, 2), 3, 4, 5, 6, 7, 8, 12  # of the compact protocol
_MOST_SHIFT = 63
_DEEPEST = 8


class _Thrift:
    """Reads Thrift's compact protocol, as far as a page's header needs it.

    Reference: Apache Thrift, "Thrift compact protocol encoding"; Apache Parquet, parquet.thrift, ``PageHeader``.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def byte(self) -> int:
        value = self._content[self.position]  # IndexError at the end, as of any damaged page
        self.position += 1
        return value

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value
            if shift > _MOST_SHIFT:
                raise ValueError("damaged page header")

    def integers(self, depth: int = 0) -> dict[int, int]:
        """Read a struct and return its 32-bit fields by their numbers; others go unread, as pyarrow leaves them too."""
        if depth > _DEEPEST:
            raise ValueError("damaged page header")
        fields: dict[int, int] = {}
        number = 0
        while kind := self.byte():
            number = number + (kind >> 4) if kind >> 4 else self._zigzag()
            if kind & 15 == _I32:
                fields[number] = self._zigzag()
            else:
                self._skip(kind & 15, depth)
        return fields

    def _zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, kind: int, depth: int) -> None:
        if kind in _TRUTHS:  # which the type itself holds
            return
        if kind == _BYTE:
            self.position += 1
        elif kind in (_I16, _I64):
            self.varint()
        elif kind == _DOUBLE:
            self.position += 8
        elif kind == _BINARY:
            length = self.varint()
            self.position += length
        elif kind == _STRUCT:
            self.integers(depth + 1)
        else:
            raise ValueError("damaged page header")


def declared_pages(file: BinaryIO, start: int, size: int) -> list[int]:
    """Return the unpacked sizes in bytes that the pages of a column chunk declare.

    Args:
        file: the Parquet file.
        start: offset of the chunk's first page.
        size: bytes of the chunk in the file.

    Raises:
        ValueError: the pages are damaged.
    """
    pages = []
    end = start + size
    while start < end:
        fields, length = _page_header(file, start, end - start)
        unpacked, packed = fields.get(2, -1), fields.get(3, -1)
        if unpacked < 0 or packed < 0:
            raise ValueError("a page without its size")
        pages.append(unpacked)
        start += length + packed
    return pages


def _page_header(file: BinaryIO, start: int, left: int) -> tuple[dict[int, int], int]:
    """Return the integer fields of the page header at an offset, and the header's length in bytes."""
    for most in _PAGE_HEADERS:
        file.seek(start)
        header = _Thrift(file.read(min(most, left)))
        with contextlib.suppress(IndexError):  # a longer one
            return header.integers(), header.position
    raise ValueError("damaged page header")
