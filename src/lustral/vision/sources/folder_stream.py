"""Labelled pictures on disk that are decoded when a batch asks for them, and what their headers and pixels give away."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset

from lustral.core.records import Batch
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet
from lustral.vision.sources.checks import Expansion, check_memory, memory_limit
from lustral.vision.sources.pixels import (
    RGB,
    SUFFIXES,
    Complaints,
    Framing,
    UnreadableError,
    build_set,
    decode_picture,
    open_picture,
    stack_pictures,
)
from lustral.vision.sources.record import SourceError, UnreadablePicture

_ORIENTATION = 0x0112  # tag of EXIF
_LOAD_BATCH = 256  # pictures a worker decodes at a time while loading
MAX_WORKERS = 8

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


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a source reads its picture files.

    Attributes:
        frame: the size to bring pictures to; None asks for pictures of one size.
        channels: 3 for RGB, 1 for grey.
        stream: leave the training images on disk (test images are loaded all the same), to be decoded by several processes;
            None: by the caller's.
        skip_unreadable: leave out training pictures that cannot be decoded, and say which they are; each is decoded once to see.
            With ``stream=None`` those that are left are held in memory where they fit. Test pictures are left out unsaid.
    """

    frame: Framing | None = None
    channels: int = RGB
    stream: bool | None = False
    skip_unreadable: bool = False

    @property
    def num_workers(self) -> int:
        """Processes that decode."""
        return min(MAX_WORKERS, num_cores()) if self.stream or self.skip_unreadable else 0

    def left_out(self) -> list[UnreadablePicture] | None:
        """Return an empty list that takes the pictures of one split that cannot be decoded; None: they are an error."""
        return [] if self.skip_unreadable else None


@dataclass(frozen=True)
class _Attempts(Dataset[tuple[list[int], Tensor, list[tuple[int, str]]]]):
    """Decodes what can be decoded of the pictures at a list of indices; picklable.

    An item is (the indices of those that can, their (B, C, H, W) uint8 pixels, (index, problem) of the others).
    """

    paths: tuple[str, ...]
    frame: Framing
    channels: int

    def __getitem__(self, indices: list[int]) -> tuple[list[int], Tensor, list[tuple[int, str]]]:
        good, pixels, problems = list[int](), list[Tensor](), list[tuple[int, str]]()
        for index in indices:
            try:
                decoded = decode_picture(Path(self.paths[index]), self.frame, self.channels)
            except UnreadableError as error:
                problems.append((index, str(error)))
                continue
            good.append(index)
            pixels.append(torch.from_numpy(decoded.copy()))
        empty = torch.empty(0, self.channels, *self.frame.size, dtype=torch.uint8)
        return good, torch.stack(pixels) if pixels else empty, problems


def open_pictures(
    paths: Sequence[str],
    labels: Tensor,
    class_names: Sequence[str],
    *,
    where: str,
    frame: Framing | None,
    channels: int,
    num_workers: int,
    unreadable: list[UnreadablePicture] | None = None,
) -> FolderStream:
    """Return a stream of picture files whose headers are sound.

    Args:
        paths: N picture files.
        labels: (N,) int64.
        class_names: K names.
        where: what they belong to, for messages.
        frame: the size to bring all to; None asks that all have the first one's size.
        channels: 3 for RGB, 1 for grey.
        num_workers: processes that decode.
        unreadable: takes the pictures that cannot be opened, which are left out; None: they are an error.

    Raises:
        SourceError: see ``check_headers``.
    """
    broken: dict[int, str] | None = None if unreadable is None else {}
    height, width = check_headers(paths, where, frame, broken)
    kept = [position for position in range(len(paths)) if not broken or position not in broken]
    if broken and unreadable is not None:
        unreadable += [UnreadablePicture(paths[i], int(labels[i]), problem) for i, problem in broken.items()]
    return FolderStream(
        paths=tuple(paths[position] for position in kept),
        labels=labels[torch.tensor(kept, dtype=torch.int64)],
        num_classes=len(class_names),
        class_names=tuple(class_names),
        image_shape=(channels, height, width),
        num_workers=num_workers,
        resize=None if frame is None else frame.resize,
    )


def readable(
    stream: FolderStream, unreadable: list[UnreadablePicture], *, in_memory: bool | None
) -> tuple[FolderStream | ImageSet, FolderStream]:
    """Decode every picture once, and leave out those that cannot be.

    Args:
        stream: pictures whose headers are sound.
        unreadable: takes the pictures that are left out.
        in_memory: keep the pixels; None: where they fit into what a data set may take.

    Returns:
        (the pictures, held in memory or not; the stream of their files).

    Raises:
        SourceError: no picture can be decoded, or they take more memory than they may.
    """
    needed = len(stream) * math.prod(stream.image_shape)
    if in_memory:
        check_memory(needed, "image folder")
    keeps = needed <= memory_limit() if in_memory is None else in_memory
    images = torch.empty(len(stream) if keeps else 0, *stream.image_shape, dtype=torch.uint8)
    is_good = torch.zeros(len(stream), dtype=torch.bool)
    frame = Framing(size=stream.image_shape[1:], resize=stream.resize)
    loader = DataLoader(
        _Attempts(stream.paths, frame, stream.image_shape[0]),
        batch_size=None,
        sampler=[chunk.tolist() for chunk in torch.split(torch.arange(len(stream)), _LOAD_BATCH)],
        num_workers=stream.num_workers if len(stream) > _LOAD_BATCH else 0,
        generator=Generator(),
    )
    for good, pixels, problems in loader:
        is_good[good] = True
        if keeps:
            images[good] = pixels
        unreadable += [UnreadablePicture(stream.paths[i], int(stream.labels[i]), text) for i, text in problems]
    if not is_good.any():
        last = unreadable[-1]
        raise SourceError(f"none of the {len(stream)} images can be read, the last one: {last.file}: {last.problem}")
    left = stream if bool(is_good.all()) else stream.subset(is_good)
    if not keeps:
        return left, left
    pixels = images if bool(is_good.all()) else images[is_good]
    return build_set("image folder", pixels, left.labels, left.class_names, left.num_classes), left


def source_pictures(
    stream: FolderStream, unreadable: list[UnreadablePicture] | None, streamed: bool | None
) -> tuple[FolderStream | ImageSet, FolderStream]:
    """Return (a stream's pictures as a source holds them, the stream of their files).

    Args:
        stream: pictures whose headers are sound.
        unreadable: takes pictures that cannot be decoded; None: they are an error, when they are decoded.
        streamed: leave them on disk; False: load them; None: leave them there, or load them if they were decoded and fit.
    """
    if unreadable is not None:
        return readable(stream, unreadable, in_memory=None if streamed is None else not streamed)
    return stream.load() if streamed is False else stream, stream


def _stored_bytes(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # which opening it will tell
        return 0


def check_headers(
    paths: Sequence[str], where: str, frame: Framing | None, unreadable: dict[int, str] | None = None
) -> tuple[int, int]:
    """Read all headers; return the (height, width) that pictures are decoded to.

    Args:
        paths: picture files.
        where: what they belong to, for messages.
        frame: the size to bring all to; None asks that all have the first one's size.
        unreadable: takes the positions of pictures that cannot be opened, and why; None: they are an error.

    Raises:
        SourceError: there are none, they are unreadable, differ in size, or unpack to far more than they hold.
    """
    first: tuple[int, int] | None = None
    complaints = Complaints(where)
    expansion = Expansion(sum(map(_stored_bytes, paths)), where)
    oddities: dict[str, list[str]] = {"turned": [], "transparent": []}
    for position, path in enumerate(paths):
        try:
            with open_picture(Path(path)) as picture:
                size = picture.height, picture.width
                has_alpha = picture.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in picture.info
                is_turned = _orientation(picture) != 1
        except UnreadableError as error:
            if unreadable is None:
                complaints.add(path, str(error))
            else:
                unreadable[position] = str(error)
            continue
        expansion.add(RGB * size[0] * size[1])
        oddities["transparent"] += [path] if has_alpha else []
        oddities["turned"] += [path] if is_turned else []
        first = first or size
        if frame is None and size != first:
            complaints.add_size(path, size, first)
    complaints.finish()
    if first is None and unreadable:
        position, problem = next(iter(unreadable.items()))
        raise SourceError(
            f"{where}: none of the {len(paths)} images can be read, the first one: {paths[position]}: {problem}"
        )
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
