"""Image folders, one subfolder per class, in memory or streamed from disk."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from lustral.core.limits import MOST_CLASSES, MOST_IMAGES
from lustral.core.records import Batch
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet
from lustral.vision.sources.checks import Expansion, check_memory, check_names
from lustral.vision.sources.pixels import (
    RGB,
    SUFFIXES,
    TEST_SPLITS,
    Complaints,
    Framing,
    UnreadableError,
    build_set,
    open_picture,
    stack_pictures,
)
from lustral.vision.sources.record import DataSource, SourceError

_FEW_ENTRIES = 20_000  # files and folders looked at before it is asked how many of them are pictures
_LEAST_PICTURES = 0.01  # share of pictures among the entries of an image folder
_ORIENTATION = 0x0112  # tag of EXIF
_LOAD_BATCH = 256  # pictures a worker decodes at a time while loading
_MAX_WORKERS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pictures(Dataset[Tensor | SourceError]):
    """Decodes the pictures at a list of indices into (B, C, H, W) uint8; picklable, so that workers may be spawned.

    Errors are handed back as values: a loader would bury one raised in a worker under that worker's traceback.
    """

    paths: tuple[str, ...]
    frame: Framing
    channels: int

    def __getitem__(self, indices: list[int]) -> Tensor | SourceError:
        pictures = ((self.paths[index], Path(self.paths[index])) for index in indices)
        try:
            stacked = stack_pictures(
                pictures, len(indices), where="image folder", frame=self.frame, channels=self.channels
            )
            return torch.from_numpy(stacked)
        except SourceError as error:
            return error


@dataclass(frozen=True, kw_only=True)
class FolderStream:
    """Labelled pictures on disk, decoded when a batch asks for them; offers what ``ImageSet`` offers.

    Worker processes start anew with each pass over the data; where the platform spawns them, a script that uses them
    needs the usual ``if __name__ == "__main__":``.

    Attributes:
        paths: N picture files.
        labels: (N,) int64 on the CPU.
        num_classes: number of classes K.
        class_names: K names.
        image_shape: (C, H, W) that every picture is decoded to, resized where it differs; C is 3, or 1 for grey.
        num_workers: processes that decode; 0 decodes in the caller's process.
        resize: pixels that the shorter side is scaled to before H x W are cut out of the middle; None squeezes.
    """

    paths: tuple[str, ...]
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    num_workers: int = 0
    resize: int | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.labels.shape != (len(self.paths),) or self.labels.dtype != torch.int64:
            raise ValueError(
                f"expected one int64 label per picture, shape ({len(self.paths)},); got {tuple(self.labels.shape)} "
                f"{self.labels.dtype}"
            )
        if self.image_shape[0] not in (1, RGB):
            raise ValueError(f"expected pictures of 1 or 3 channels; got {self.image_shape[0]}")
        if self.num_workers < 0:
            raise ValueError(f"expected num_workers of at least 0; got {self.num_workers}")

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.paths)

    def subset(self, indices: Tensor) -> FolderStream:
        """Return the pictures at ``indices`` ((M,) int64, or (N,) bool mask), in that order."""
        chosen = torch.arange(len(self))[indices.cpu()]
        return replace(self, paths=tuple(self.paths[i] for i in chosen.tolist()), labels=self.labels[chosen])

    def batches(
        self, batch_size: int, *, generator: Generator | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Yield batches of float32 images (B, C, H, W) in [0, 1], on the CPU.

        Order and draws are those of ``ImageSet.batches``: equal generators give equal batches, whatever the number of
        workers.

        Args:
            batch_size: pictures per batch; the last batch may be smaller.
            generator: CPU stream that shuffles; None keeps the order.
            drop_last: leave out a last batch that is not full.

        Raises:
            SourceError: a picture cannot be decoded.
        """
        if batch_size < 1:
            raise ValueError(f"expected a batch size of at least 1; got {batch_size}")
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        if drop_last:
            order = order[: len(order) - len(order) % batch_size]
        for chunk, pixels in self._decode(order, batch_size):
            yield Batch(as_float(pixels), self.labels[chunk], chunk)

    def load(self) -> ImageSet:
        """Decode all pictures into memory, N * C * H * W bytes.

        Raises:
            SourceError: a picture cannot be decoded, or they take more memory than they may.
        """
        check_memory(len(self) * math.prod(self.image_shape), "image folder")
        images = torch.empty(len(self), *self.image_shape, dtype=torch.uint8)
        for chunk, pixels in self._decode(torch.arange(len(self)), _LOAD_BATCH):
            images[chunk] = pixels
        return build_set("image folder", images, self.labels, self.class_names, self.num_classes)

    def _decode(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices, their uint8 pictures), ``batch_size`` at a time, in the order given."""
        if not len(order):
            return
        chunks = torch.split(order, batch_size)
        loader = DataLoader(
            _Pictures(self.paths, Framing(size=self.image_shape[1:], resize=self.resize), self.image_shape[0]),
            batch_size=None,
            sampler=[chunk.tolist() for chunk in chunks],
            num_workers=self.num_workers,
            generator=Generator(),  # decoding draws nothing; keeps the loader off the global stream
        )
        for chunk, pixels in zip(chunks, loader, strict=True):
            if isinstance(pixels, SourceError):
                raise pixels
            yield chunk, pixels


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _stored_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # which opening it will tell
        return 0


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise SourceError(f"{folder}: cannot be listed ({error.strerror}); expected a folder of pictures") from error
    return status.st_dev, status.st_ino


def _check_headers(paths: list[str], where: str, frame: Framing | None) -> tuple[int, int]:
    """Read all headers; return the (height, width) that pictures are decoded to."""
    first: tuple[int, int] | None = None
    complaints = Complaints(where)
    expansion = Expansion(sum(map(_stored_bytes, paths)), where)
    oddities: dict[str, list[str]] = {"turned": [], "transparent": []}
    for path in paths:
        try:
            with open_picture(Path(path)) as picture:
                size = picture.height, picture.width
                has_alpha = picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info
                is_turned = _orientation(picture) != 1
        except UnreadableError as error:
            complaints.add(path, str(error))
            continue
        expansion.add(RGB * size[0] * size[1])
        oddities["transparent"] += [path] if has_alpha else []
        oddities["turned"] += [path] if is_turned else []
        first = first or size
        if frame is None and size != first:
            complaints.add_size(path, size, first)
    complaints.finish()
    if first is None:
        raise SourceError(f"{where}: no images; expected files {', '.join(sorted(SUFFIXES))} in one folder per class")
    _tell_oddities(where, **oddities)
    return first if frame is None else frame.size


def _orientation(picture: Image.Image) -> int:
    """Return how a picture is stored turned, as EXIF has it; 1 is upright, or not known."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1)) if "exif" in picture.info else 1
    except Exception:  # hostile bytes can raise anything; decoding does without them
        return 1


def _tell_oddities(where: str, *, turned: list[str], transparent: list[str]) -> None:
    """Log what decoding leaves out, as torchvision does: a model trained otherwise would see other pictures."""
    if turned:
        logger.warning(
            "%s: %d pictures are stored turned or mirrored (%s, ...) and are read as stored, as torchvision does; if the "
            "model was trained on upright ones, save them upright",
            where,
            len(turned),
            turned[0],
        )
    if transparent:
        logger.warning(
            "%s: %d pictures have transparency (%s, ...); the colours beneath it are read, as torchvision does; if the "
            "model was trained on a background, save them with it",
            where,
            len(transparent),
            transparent[0],
        )


def _stream_split(
    folder: Path, class_names: list[str], frame: Framing | None, channels: int, num_workers: int
) -> FolderStream:
    """Return the pictures of one split; class k is the folder ``class_names[k]``."""
    if strangers := sorted(set(_subfolders(folder)) - set(class_names)):
        raise SourceError(f"{folder}: class folders that the training images lack: {', '.join(strangers)}")
    walk = _Walk(folder)
    present = [walk.pictures(folder / name) if (folder / name).exists() else [] for name in class_names]
    paths = [path for found in present for path in found]
    height, width = _check_headers(paths, str(folder), frame)
    return FolderStream(
        paths=tuple(paths),
        labels=torch.arange(len(class_names)).repeat_interleave(torch.tensor([len(found) for found in present])),
        num_classes=len(class_names),
        class_names=tuple(class_names),
        image_shape=(channels, height, width),
        num_workers=num_workers,
        resize=None if frame is None else frame.resize,
    )


def open_folder(
    path: Path,
    *,
    name: str,
    flip: bool = True,
    frame: Framing | None = None,
    channels: int = RGB,
    stream: bool | None = False,
) -> DataSource:
    """Open ``path/CLASS/*`` or ``path/{train,test}/CLASS/*`` (``val`` and the like serve as ``test``).

    The label of a class is the place of its folder's name in the sorted list of names; an empty folder holds the
    place of a class without images. Folders may be links, and may hold folders; pictures are regular files of the formats
    PNG, JPEG, BMP, PPM, TIFF or WebP, of which the first frame is taken.

    Args:
        path: the folder.
        name: the source's name.
        flip: whether flips keep the meaning.
        frame: the size to bring pictures to; None asks for pictures of one size.
        channels: 3 for RGB, 1 for grey.
        stream: leave the training images on disk (test images are loaded all the same), to be decoded by several processes;
            None: by the caller's.

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
    num_workers = min(_MAX_WORKERS, _num_cores()) if stream else 0
    train = _stream_split(train_folder, class_names, frame, channels, num_workers)
    test = _stream_split(test_folder, class_names, frame, channels, num_workers).load() if test_folder else None
    return DataSource(name=name, train=train.load() if stream is False else train, test=test, flip=flip)
