"""A label table: a CSV file with the columns file and label, beside its pictures."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lustral.core.files import NotRegularError, read_regular
from lustral.core.limits import LARGEST_TABLE, MOST_CLASSES
from lustral.vision.records import ImageSet
from lustral.vision.sources.checks import check_count, check_names
from lustral.vision.sources.folder_stream import Reading, open_pictures, source_pictures
from lustral.vision.sources.pixels import SUFFIXES, TEST_SPLITS
from lustral.vision.sources.record import DataSource, SourceError, UnreadablePicture

_COLUMNS = "file,label, and split (train or test) if there is a test set"
_SHOWN = 80  # characters of a cell that an error quotes


def open_label_table(path: Path, reading: Reading, *, name: str, flip: bool = True) -> DataSource:
    """Open a CSV table of picture files, whose paths are relative to the table's folder and stay inside it.

    Labels that are all whole numbers are the classes 0, 1, ...; others are names of classes, numbered as sorted.

    Args:
        path: the .csv file, UTF-8, with a first row that names its columns: file, label, and optionally split.
        reading: how its pictures are read.
        name: the source's name.
        flip: whether flips keep the meaning.

    Raises:
        SourceError: no such table, a path that leaves its folder, or pictures that cannot be used.
    """
    rows = _rows(path)
    check_count(len(rows), str(path))
    labels, class_names = _labels([label for _, label, _ in rows], str(path))
    inside = _inside(path, [file for file, _, _ in rows])
    is_train = torch.tensor([split == "train" for _, _, split in rows], dtype=torch.bool)
    if not is_train.any():
        raise SourceError(f"{path}: no rows of split train")
    unreadable = reading.left_out()

    def part(
        chosen: Tensor, dropped: list[UnreadablePicture] | None, streamed: bool | None
    ) -> tuple[object, Sequence[str]]:
        opened = open_pictures(
            [inside[i] for i in chosen.nonzero().flatten().tolist()],
            labels[chosen],
            class_names,
            where=str(path),
            frame=reading.frame,
            channels=reading.channels,
            num_workers=reading.num_workers,
            unreadable=dropped,
        )
        pictures, held = source_pictures(opened, dropped, streamed)
        return pictures, held.paths

    train, files = part(is_train, unreadable, reading.stream)
    test = None if is_train.all() else part(~is_train, reading.left_out(), False)[0]
    assert test is None or isinstance(test, ImageSet)
    return DataSource(
        name=name,
        train=train,  # type: ignore[arg-type]
        test=test,
        flip=flip,
        files=tuple(files),
        folder=str(path.parent),
        unreadable=tuple(unreadable or ()),
    )


def _rows(path: Path) -> list[tuple[str, str, str]]:
    """Return (file, label, split) of each row."""
    try:
        text = read_regular(path, most=LARGEST_TABLE).decode("utf-8-sig")
    except NotRegularError as error:
        raise SourceError(f"{error}; expected a table with the columns {_COLUMNS}") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: expected a table in UTF-8; byte {error.start:,} is none") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        if any(header.count(name) != 1 for name in ("file", "label")) or header.count("split") > 1:
            found = ", ".join(ascii(cell[:_SHOWN]) for cell in header[:8]) or "nothing"
            raise SourceError(f"{path}: expected a first row with the columns {_COLUMNS}; found {found}")
        file, label = header.index("file"), header.index("label")
        split = header.index("split") if "split" in header else None
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise SourceError(f"{path}, line {reader.line_num}: expected {len(header)} cells; found {len(cells)}")
            which = "train" if split is None else cells[split].strip()
            if which not in ("train", *TEST_SPLITS):
                raise SourceError(
                    f"{path}, line {reader.line_num}: expected a split train, {', '.join(TEST_SPLITS)}; "
                    f"found {which[:_SHOWN]!a}"
                )
            rows.append((cells[file], cells[label].strip(), which))
    except csv.Error as error:
        raise SourceError(f"{path}, line {reader.line_num}: cannot be read as CSV ({error})") from error
    if not rows:
        raise SourceError(f"{path}: no rows; expected one for each picture")
    return rows


def _labels(texts: Sequence[str], where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels (N,) int64 and the names of the classes."""
    present = set(texts)
    if "" in present:
        raise SourceError(f"{where}: row {texts.index('') + 1} has no label")
    if all(text.isascii() and text.isdecimal() for text in present):
        largest = max(present, key=lambda text: (len(text.lstrip("0")), text.lstrip("0")))
        if len(largest) > len(str(MOST_CLASSES)) or int(largest) >= MOST_CLASSES:
            raise SourceError(f"{where}: expected labels below {MOST_CLASSES:,}; found {largest[:_SHOWN]}")
        names = tuple(str(number) for number in range(max(int(largest) + 1, 2)))
        return torch.tensor([int(text) for text in texts]), names
    if len(present) > MOST_CLASSES:
        raise SourceError(f"{where}: expected at most {MOST_CLASSES:,} classes; found {len(present):,}")
    if len(present) < 2:
        raise SourceError(f"{where}: expected at least two classes; all rows have the label {texts[0][:_SHOWN]!a}")
    names = check_names(sorted(present), where)
    number = {text: index for index, text in enumerate(names)}
    return torch.tensor([number[text] for text in texts]), names


def _inside(table: Path, files: Sequence[str]) -> list[str]:
    """Return the paths of the files, none of which leads out of the table's folder, by links neither."""
    folder = table.parent
    real = os.path.realpath(folder)
    found: dict[str, str] = {}
    for row, file in enumerate(files, start=1):
        where = f"{table}: row {row}, {file[:_SHOWN]!a}"
        if "\0" in file or os.path.splitext(file)[1].lower() not in SUFFIXES:
            raise SourceError(f"{where}: expected the name of a picture, {', '.join(sorted(SUFFIXES))}")
        path = os.path.join(folder, file)
        target = os.path.realpath(path)
        if os.path.isabs(file) or not target.startswith(real.rstrip(os.sep) + os.sep):
            raise SourceError(
                f"{where}: leads out of the table's folder; expected a path relative to it, and inside it"
            )
        if target in found:
            raise SourceError(f"{where}: is there twice; expected one row for each picture")
        found[target] = path
    return list(found.values())
