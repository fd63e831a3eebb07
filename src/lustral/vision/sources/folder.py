"""Image folders, one subfolder per class, in memory or streamed from disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from lustral.core.limits import MOST_CLASSES, MOST_IMAGES
from lustral.vision.records import ImageSet
from lustral.vision.sources.checks import check_names
from lustral.vision.sources.folder_stream import FolderStream, Reading, open_pictures, source_pictures
from lustral.vision.sources.pixels import SUFFIXES, TEST_SPLITS
from lustral.vision.sources.record import DataSource, SourceError, UnreadablePicture

_FEW_ENTRIES = 20_000  # files and folders looked at before it is asked how many of them are pictures
_LEAST_PICTURES = 0.01  # share of pictures among the entries of an image folder

logger = logging.getLogger(__name__)


def _subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted, but for hidden ones."""
    names = []
    for entry in _entries(folder):
        if not entry.name.startswith(".") and _is_folder(entry):
            names.append(entry.name)
        if len(names) > MOST_CLASSES:
            raise SourceError(f"{folder}: expected at most {MOST_CLASSES:,} class folders; found more")
    return sorted(names)


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed ({error.strerror}); expected a folder of pictures") from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself
        return False


class _Walk:
    """Finds the pictures of class folders; gives up on folders that hold too many, or mostly other things."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._entries = self._pictures = 0

    def pictures(self, folder: Path) -> list[str]:
        """Return all pictures at any depth below a folder, sorted; each folder is entered once, whatever links to it."""
        found: list[str] = []
        entered: set[tuple[int, int]] = set()
        waiting = [str(folder)]
        while waiting:
            inside = waiting.pop()
            identity = _identity(inside)
            if identity in entered:
                continue
            entered.add(identity)
            for entry in _entries(inside):
                is_picture = os.path.splitext(entry.name)[1].lower() in SUFFIXES and not entry.name.startswith(".")
                if _is_folder(entry):
                    waiting.append(entry.path)
                elif is_picture:
                    found.append(entry.path)
                    self._pictures += 1
                self._entries += 1
                self._check()
        return sorted(found)

    def _check(self) -> None:
        if self._entries >= _FEW_ENTRIES and self._pictures < _LEAST_PICTURES * self._entries:
            raise SourceError(
                f"{self._root}: of the first {self._entries:,} files and folders in it {self._pictures:,} are pictures; "
                "this is no image folder: give one that holds a folder of pictures for each class"
            )
        if self._pictures > MOST_IMAGES:
            raise SourceError(
                f"{self._root}: expected at most {MOST_IMAGES:,} pictures; found more: give a folder with a part of them"
            )


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed ({error.strerror}); expected a folder of pictures") from error
    return status.st_dev, status.st_ino


def _stream_split(
    folder: Path, class_names: list[str], reading: Reading, unreadable: list[UnreadablePicture] | None
) -> FolderStream:
    """Return the pictures of one split; class k is the folder ``class_names[k]``."""
    if strangers := sorted(set(_subfolders(folder)) - set(class_names)):
        raise SourceError(f"{folder}: class folders that the training images lack: {', '.join(strangers)}")
    walk = _Walk(folder)
    present = [walk.pictures(folder / name) if (folder / name).exists() else [] for name in class_names]
    return open_pictures(
        [path for found in present for path in found],
        torch.arange(len(class_names)).repeat_interleave(torch.tensor([len(found) for found in present])),
        class_names,
        where=str(folder),
        frame=reading.frame,
        channels=reading.channels,
        num_workers=reading.num_workers,
        unreadable=unreadable,
    )


def open_folder(path: Path, reading: Reading, *, name: str, flip: bool = True) -> DataSource:
    """Open ``path/CLASS/*`` or ``path/{train,test}/CLASS/*`` (``val`` and the like serve as ``test``).

    The label of a class is the place of its folder's name in the sorted list of names; an empty folder holds the
    place of a class without images. Folders may be links, and may hold folders; pictures are regular files of the formats
    PNG, JPEG, BMP, PPM, TIFF or WebP, of which the first frame is taken.

    Args:
        path: the folder.
        reading: how its pictures are read.
        name: the source's name.
        flip: whether flips keep the meaning.

    Raises:
        SourceError: another layout, or pictures that are unreadable or differ in size.
    """
    if path.resolve() == Path(path.resolve().anchor):
        raise SourceError(
            f"{path}: expected an image folder, with a folder of pictures for each class; this is a whole disk"
        )
    children = _subfolders(path)
    test_folder = next((path / split for split in TEST_SPLITS if split in children), None)
    train_folder = path / "train"
    if "train" not in children:
        if children and set(children) <= set(TEST_SPLITS):
            raise SourceError(
                f"{path}: holds {', '.join(children)} but no train folder; give the folder with the classes "
                f"themselves, e.g. {path / children[0]}"
            )
        train_folder, test_folder = path, None
    class_names = list(check_names(_subfolders(train_folder), str(train_folder)))
    if len(class_names) < 2:
        raise SourceError(
            f"{train_folder}: expected one folder per class, at least 2; found {len(class_names)} folders. Lay images "
            "out as CLASS/*.png or train/CLASS/*.png and test/CLASS/*.png; an empty folder holds the place of a class "
            "without images"
        )
    if all(entry.isdecimal() for entry in class_names) and class_names != sorted(class_names, key=int):
        logger.warning(
            "%s: class folders are numbered by the sorted list of names as text (%s, ...), so folder %s is class 2; "
            "pad the numbers with zeros if the model counts otherwise",
            train_folder,
            ", ".join(class_names[:3]),
            class_names[2],
        )
    unreadable = reading.left_out()
    train = _stream_split(train_folder, class_names, reading, unreadable)
    pictures, held = source_pictures(train, unreadable, reading.stream)
    test: ImageSet | None = None
    if test_folder:
        dropped = reading.left_out()
        tested = _stream_split(test_folder, class_names, reading, dropped)
        loaded, _ = source_pictures(tested, dropped, False)
        assert isinstance(loaded, ImageSet)
        test = loaded
    return DataSource(
        name=name,
        train=pictures,
        test=test,
        flip=flip,
        files=held.paths,
        folder=str(path),
        unreadable=tuple(unreadable or ()),
    )
