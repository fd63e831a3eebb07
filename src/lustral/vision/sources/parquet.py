"""A Parquet table read a little at a time, after the sizes that its footer and its pages declare have been checked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from lustral.core.parquet_pages import declared_pages
from lustral.vision.sources.checks import check_count, check_expansion, open_regular
from lustral.vision.sources.record import SourceError

_BATCH_BYTES = 2**26  # of decoded cells held at a time; each is at most as large as the largest page
_MOST_ROWS = 256  # of pictures in a batch
_LABEL_ROWS = 2**16  # of labels in a batch
_LONGEST_SPLIT = 64  # characters
_MOST_METADATA = 2**24  # bytes of class names


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
