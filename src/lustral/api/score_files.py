"""What ``lustral sift`` writes: the scores as tables, and what is left of a set when the listed images are taken away."""

from __future__ import annotations

import csv
import io
import os
import secrets
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lustral.api.training_sets import OpenedSet
from lustral.core.characters import visible
from lustral.core.files import atomic_write, open_regular, write_text_atomic
from lustral.vision.records import ImageSet, Sifted
from lustral.vision.sources import SourceError

COLUMNS = ("file", "label", "score", "flagged")
FORMULA = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")  # what a spreadsheet would compute
LIST_FILE, ARRAYS_FILE = "clean.txt", "clean.npz"


def csv_text(text: str) -> str:
    r"""Return text that a spreadsheet shows and does not obey, on one line.

    >>> csv_text("a.png"), csv_text("=HYPERLINK(1)"), csv_text("a\nb")
    ('a.png', "'=HYPERLINK(1)", 'a\\nb')
    """
    shown = visible(text)
    return f"'{shown}" if text.lstrip().startswith(FORMULA) or shown.startswith("'") else shown


def score_rows(opened: OpenedSet, sifted: Sifted) -> list[tuple[str, str, float | None, bool | None]]:
    """Return (name, class, score, listed) of each image, the most suspicious first; those that could not be read last."""
    labels, classes = opened.view.untrusted.labels.tolist(), opened.class_names
    scores, flagged = sifted.scores.tolist(), sifted.flagged.tolist()
    order = sorted(range(len(scores)), key=lambda i: (not flagged[i], -scores[i], i))
    rows: list[tuple[str, str, float | None, bool | None]] = [
        (opened.names[i], classes[labels[i]], scores[i], flagged[i]) for i in order
    ]
    left_out = zip(opened.unreadable_names, opened.source.unreadable, strict=True)
    return rows + [(name, classes[entry.label], None, None) for name, entry in left_out]


def write_scores(folder: Path, opened: OpenedSet, sifted: Sifted) -> None:
    """Write scores.csv, made safe for spreadsheets, and scores.parquet, with every name as it is."""
    rows = score_rows(opened, sifted)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for name, label, score, flagged in rows:
        writer.writerow((csv_text(name), csv_text(label), "" if score is None else f"{score:.6g}", shown_flag(flagged)))
    write_text_atomic(folder / "scores.csv", text.getvalue())
    names, labels, scores, flags = zip(*rows, strict=True)
    table = pa.table(
        {
            "file": pa.array([encodable(name) for name in names], pa.string()),
            "label": pa.array([encodable(label) for label in labels], pa.string()),
            "score": pa.array(scores, pa.float32()),
            "flagged": pa.array(flags, pa.bool_()),
        }
    )
    with atomic_write(folder / "scores.parquet") as file:
        pq.write_table(table, file)


def shown_flag(flagged: bool | None) -> str:
    """Return a flag as text; nothing where there is none.

    >>> shown_flag(True), shown_flag(None)
    ('true', '')
    """
    return "" if flagged is None else str(flagged).lower()


def encodable(text: str) -> str:
    """Return text that UTF-8 can hold: bytes of a file name that are none become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def require_free(place: Path, opened_from: str | None, flag: str, *, empty: bool) -> None:
    """Raise ``ValueError`` where results would go into the data, or, if ``empty``, to a folder that holds something.

    Args:
        place: the folder for results.
        opened_from: what the data were opened from; None: from no file.
        flag: the flag that named the folder.
        empty: whether the folder must be new or empty.
    """
    data = Path(opened_from).expanduser() if opened_from else None
    inside = os.path.realpath(place)
    if (
        data is not None
        and data.is_dir()
        and (inside + os.sep).startswith(os.path.realpath(data).rstrip(os.sep) + os.sep)
    ):
        raise ValueError(
            f"{place} is inside the data folder {data}, where it would be taken for data: choose another {flag}"
        )
    if place.exists() and not place.is_dir():
        raise ValueError(f"{place}: expected a folder; this is a file: choose another {flag}")
    if empty and place.is_dir() and any(place.iterdir()):
        raise ValueError(f"{place} is not empty; nothing is ever overwritten or deleted there: choose another {flag}")


def write_clean(place: Path, opened: OpenedSet, flagged: Tensor, *, as_list: bool) -> int:
    """Write what is left of a set without the listed images: whole, or nothing.

    Args:
        place: the folder, new or empty.
        opened: the set.
        flagged: (N,) bool: the images to leave out.
        as_list: a list of files, or of positions, in place of copies.

    Returns:
        How many images were written or listed.
    """
    kept = (~flagged).nonzero().flatten().tolist()
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.parent / f".{secrets.token_hex(8)}.tmp"
    unfinished.mkdir()
    try:
        if as_list:
            lines = [visible(opened.names[i]) + "\n" for i in kept]
            write_text_atomic(unfinished / LIST_FILE, "".join(lines))
        elif opened.files:
            _copy_pictures(unfinished, opened, kept)
        else:
            _write_arrays(unfinished / ARRAYS_FILE, opened, ~flagged)
        os.rename(unfinished, place)  # onto an empty folder at most
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return len(kept)


def _copy_pictures(place: Path, opened: OpenedSet, kept: list[int]) -> None:
    """Copy pictures to CLASS/FILE; a class of which none is left keeps its empty folder, and so its number."""
    folders = class_folders(opened.class_names)
    for name in folders:
        (place / name).mkdir()
    labels = opened.view.untrusted.labels.tolist()
    for index in kept:
        parts = [part for part in Path(os.path.normpath(opened.names[index])).parts if part not in ("..", os.sep)]
        own = opened.class_names[labels[index]]
        if own in parts[:-1]:  # CLASS/... or train/CLASS/...
            parts = parts[parts.index(own) + 1 :]
        target = place.joinpath(folders[labels[index]], *parts)
        target.parent.mkdir(parents=True, exist_ok=True)
        while target.exists():
            target = target.with_name(f"again-{target.name}")
        with open_regular(opened.files[index]) as picture, target.open("xb") as copy:
            shutil.copyfileobj(picture, copy)


def class_folders(names: tuple[str, ...]) -> list[str]:
    """Return a folder's name for each class, sorted as the classes are: their own names, or numbers where these will not do.

    >>> class_folders(("ant", "bee")), class_folders(("a/b", "c"))
    (['ant', 'bee'], ['class-0', 'class-1'])
    """
    usable = all(n and n not in (".", "..") and not n.startswith(".") and not set(n) & {"/", "\\", "\0"} for n in names)
    short = all(len(os.fsencode(name)) <= 200 for name in names)
    if (
        usable
        and short
        and list(names) == sorted(set(names))
        and len({name.casefold() for name in names}) == len(names)
    ):
        return list(names)
    width = len(str(len(names) - 1))
    return [f"class-{label:0{width}}" for label in range(len(names))]


def _write_arrays(path: Path, opened: OpenedSet, kept: Tensor) -> None:
    data = opened.view.untrusted
    if not isinstance(data, ImageSet):
        raise SourceError("a streamed set without files cannot be written")  # no source gives one
    part = data.subset(kept)
    arrays = {
        "train_images": part.images.permute(0, 2, 3, 1).cpu().numpy(),
        "train_labels": part.labels.cpu().numpy(),
    }
    if data.class_names:
        arrays["class_names"] = np.array(data.class_names)
    if opened.test is not None:
        arrays["test_images"] = opened.test.images.permute(0, 2, 3, 1).cpu().numpy()
        arrays["test_labels"] = opened.test.labels.cpu().numpy()
    with path.open("xb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
