"""A Parquet table read a little at a time, after the sizes that its footer and its pages declare have been checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lustral.vision.sources.checks import check_count, check_expansion, open_regular
from lustral.vision.sources.record import SourceError

_BATCH_BYTES = 2**26  # of decoded cells held at a time; each is at most as large as the largest page
_MOST_ROWS = 256  # of pictures in a batch
_LABEL_ROWS = 2**16  # of labels in a batch
_PAGE_HEADERS = (2**12, 2**16, 2**24)  # bytes read to find a page's header: about 50, more with statistics
_LONGEST_SPLIT = 64  # characters
_MOST_METADATA = 2**24  # bytes of class names
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


class Table:
    """An open table: labels, splits and pictures of its rows, each column read when asked for."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Read the footer."""
        import pyarrow.parquet as pq  # imported here: slow, and only this kind of file needs it

        self._path, self._raw = path, file
        self._file = pq.ParquetFile(file)
        self._metadata = self._file.metadata
        self._schema = self._file.schema_arrow
        self.size = file.seek(0, 2)
        self.columns: tuple[str, ...] = tuple(self._schema.names)
        self.num_rows: int = self._metadata.num_rows
        check_count(self.num_rows, str(path))

    def class_names(self) -> tuple[str, ...]:
        """Return the class names in the schema's metadata, or none."""
        stored = (self._schema.metadata or {}).get(b"class_names", b"")
        if len(stored) > _MOST_METADATA:
            raise SourceError(f"{self._path}: expected at most {_MOST_METADATA:,} bytes of class names")
        return tuple(stored.decode().split("|")) if stored else ()

    def integers(self, column: str) -> NDArray[Any]:
        """Return a column of integers."""
        import pyarrow as pa

        kind = self._schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not pa.types.is_integer(kind):
            raise SourceError(f"{self._path}: expected {self.num_rows} integer labels in {column}; got {kind}")
        parts = []
        for cells in self._cells(column, _LABEL_ROWS):
            if cells.null_count:
                raise SourceError(f"{self._path}: {column}: expected a label in every row; some are empty")
            parts.append(np.asarray(cells.cast(kind).to_numpy(zero_copy_only=False)))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def texts(self, column: str) -> list[str | None]:
        """Return a column of short texts."""
        import pyarrow as pa

        kind = self._schema.field(column).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise SourceError(f"{self._path}: expected texts in {column}, such as train; got {kind}")
        texts: list[str | None] = []
        known: dict[str | None, str | None] = {None: None}  # one object per text, however often it stands there
        for cells in self._cells(column, _LABEL_ROWS):
            for text in cells.to_pylist():
                if text is not None and len(text) > _LONGEST_SPLIT:
                    raise SourceError(f"{self._path}: {column}: expected short texts, such as train; found a long one")
                texts.append(known.setdefault(text, text))
        return texts

    def pictures(self, column: str) -> Iterator[tuple[str, bytes]]:
        """Yield ("row n", encoded picture), empty where the cell holds none."""
        import pyarrow as pa

        kind = self._schema.field(column).type
        leaf = column
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind, leaf = kind.field("bytes").type, f"{column}.bytes"
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
            raise SourceError(
                f"{self._path}: expected encoded pictures in {column}, as bytes or as records with a field bytes; got "
                f"{self._schema.field(column).type}"
            )
        row = 0
        for cells in self._cells(leaf, _MOST_ROWS):
            for cell in cells:
                content = cell.as_py()
                content = content.get("bytes") if isinstance(content, dict) else content
                yield f"row {row}", content if isinstance(content, bytes) else b""  # nothing: reported as unreadable
                row += 1

    def _cells(self, leaf: str, most_rows: int) -> Iterator[Any]:
        """Yield a column's cells in arrays of bounded size, as many as the footer says."""
        rows = max(1, min(most_rows, _BATCH_BYTES // max(self._largest_page(leaf), 1)))
        seen = 0
        for batch in self._file.iter_batches(batch_size=rows, columns=[leaf], use_threads=False):
            seen += len(batch)
            if seen > self.num_rows:
                break
            yield batch.column(0)
        if seen != self.num_rows:
            raise SourceError(f"{self._path}: declares {self.num_rows:,} rows and has others; fetch or save it again")

    def _largest_page(self, leaf: str) -> int:
        """Check what a column's pages declare; return the size of the largest one in bytes."""
        unpacked = stored = largest = 0
        schema = self._metadata.schema
        columns = [index for index in range(self._metadata.num_columns) if schema.column(index).path == leaf]
        for group in range(self._metadata.num_row_groups):
            row_group = self._metadata.row_group(group)
            for index in columns:
                chunk = row_group.column(index)
                offsets = [chunk.data_page_offset]
                if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    offsets.append(chunk.dictionary_page_offset)
                pages = declared_pages(self._raw, min(offsets), min(chunk.total_compressed_size, self.size))
                unpacked += sum(pages)
                stored += chunk.total_compressed_size
                largest = max(largest, *pages, 0)
        check_expansion(unpacked, min(stored, self.size), f"{self._path}: {leaf}")
        return largest


@contextlib.contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """Open a Parquet file.

    Raises:
        SourceError: the file is damaged, no table, or no regular file; or a column in it is, when it is read.
    """
    try:
        with open_regular(path) as file:
            yield Table(path, file)
    except SourceError:
        raise
    except Exception as error:  # hostile bytes can raise anything
        raise SourceError(f"{path}: cannot be read as a Parquet table ({error}); fetch or save it again") from error
