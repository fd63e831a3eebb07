"""Image folders, one subfolder per class, in memory or streamed from disk."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from lustral.images import as_float
from lustral.protocols import ImageSet
from lustral.sources.pixels import TEST_SPLITS, UNREADABLE, Complaints, build_set, stack_pictures
from lustral.sources.record import DataSource, SourceError

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp"})
_LOAD_BATCH = 256  # pictures a worker decodes at a time while loading
_MAX_WORKERS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Pictures(Dataset[Tensor | SourceError]):
    """Decodes the pictures at a list of indices into (B, 3, H, W) uint8; picklable, so that workers may be spawned.

    Errors are handed back as values: a loader would bury one raised in a worker under that worker's traceback.
    """

    paths: tuple[str, ...]
    size: tuple[int, int]

    def __getitem__(self, indices: list[int]) -> Tensor | SourceError:
        pictures = ((self.paths[index], Path(self.paths[index])) for index in indices)
        try:
            return torch.from_numpy(stack_pictures(pictures, len(indices), where="image folder", size=self.size))
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
        image_shape: (3, H, W) that every picture is decoded to, resized where it differs.
        num_workers: processes that decode; 0 decodes in the caller's process.
    """

    paths: tuple[str, ...]
    labels: Tensor
    num_classes: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    num_workers: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        if self.labels.shape != (len(self.paths),) or self.labels.dtype != torch.int64:
            raise ValueError(
                f"expected one int64 label per picture, shape ({len(self.paths)},); got {tuple(self.labels.shape)} "
                f"{self.labels.dtype}"
            )
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
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images float32 (B, 3, H, W) in [0, 1], labels int64 (B,)) on the CPU.

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
            yield as_float(pixels), self.labels[chunk]

    def load(self) -> ImageSet:
        """Decode all pictures into memory, N * 3 * H * W bytes."""
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
            _Pictures(self.paths, self.image_shape[1:]),
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
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _picture_paths(folder: Path) -> list[str]:
    """Return all pictures at any depth below a folder, sorted."""
    return sorted(
        os.path.join(parent, file)
        for parent, _, files in os.walk(folder, followlinks=True)
        for file in files
        if Path(file).suffix.lower() in _SUFFIXES and not file.startswith(".")
    )


def _check_headers(paths: list[str], where: str, image_size: int | None) -> tuple[int, int]:
    """Read all headers; return the (height, width) that pictures are decoded to."""
    first: tuple[int, int] | None = None
    complaints = Complaints(where)
    for path in paths:
        try:
            with Image.open(path) as picture:
                size = picture.height, picture.width
        except UNREADABLE as error:
            complaints.add(path, f"unreadable image ({error})")
            continue
        first = first or size
        if image_size is None and size != first:
            complaints.add_size(path, size, first)
    complaints.finish()
    if first is None:
        raise SourceError(f"{where}: no images; expected files {', '.join(sorted(_SUFFIXES))} in one folder per class")
    return first if image_size is None else (image_size, image_size)


def _stream_split(folder: Path, class_names: list[str], image_size: int | None, num_workers: int) -> FolderStream:
    """Return the pictures of one split; class k is the folder ``class_names[k]``."""
    if strangers := sorted(set(_subfolders(folder)) - set(class_names)):
        raise SourceError(f"{folder}: class folders that the training images lack: {', '.join(strangers)}")
    per_class = [_picture_paths(folder / name) for name in class_names]
    paths = [path for found in per_class for path in found]
    height, width = _check_headers(paths, str(folder), image_size)
    return FolderStream(
        paths=tuple(paths),
        labels=torch.arange(len(class_names)).repeat_interleave(torch.tensor([len(found) for found in per_class])),
        num_classes=len(class_names),
        class_names=tuple(class_names),
        image_shape=(3, height, width),
        num_workers=num_workers,
    )


def open_folder(
    path: Path, *, name: str, flip: bool = True, image_size: int | None = None, stream: bool = False
) -> DataSource:
    """Open ``path/CLASS/*`` or ``path/{train,test}/CLASS/*`` (``val`` and the like serve as ``test``).

    The label of a class is the place of its folder's name in the sorted list of names; an empty folder holds the
    place of a class without images. Pictures become RGB.

    Args:
        path: the folder.
        name: the source's name.
        flip: whether flips keep the meaning.
        image_size: side in pixels that pictures are squeezed to; None asks for pictures of one size.
        stream: leave the training images on disk (test images are loaded all the same).

    Raises:
        SourceError: another layout, or pictures that are unreadable or differ in size.
    """
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
    class_names = _subfolders(train_folder)
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
    train = _stream_split(train_folder, class_names, image_size, num_workers)
    test = _stream_split(test_folder, class_names, image_size, num_workers).load() if test_folder else None
    return DataSource(name=name, train=train if stream else train.load(), test=test, flip=flip)
