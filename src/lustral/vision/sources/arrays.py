"""Data sets in one file: NumPy archives (.npz) and Parquet tables of encoded pictures (.parquet)."""

from __future__ import annotations

import contextlib
import math
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lustral.core.limits import MOST_CLASSES
from lustral.vision.records import ImageSet
from lustral.vision.sources.checks import Expansion, check_expansion, check_memory, open_regular
from lustral.vision.sources.parquet import open_table
from lustral.vision.sources.pixels import RGB, TEST_SPLITS, Framing, build_set, stack_pictures
from lustral.vision.sources.record import DataSource, SourceError

_LAYOUTS = (
    "train_res/train_labels with test_res/test_labels, train_images/train_labels with optional "
    "test_images/test_labels, or images/labels"
)
_PICTURE_COLUMNS = ("jpeg", "image", "png", "bytes")
_UNREADABLE = "it may be truncated or corrupt: fetch or save it again"
_TRACKS_PER_CLASS = 1000  # group id = label * 1000 + track


def undo_residuals(residuals: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decode pictures stored as differences between neighbouring pixels.

    The channels are (G, R - G, B - G), each differenced along columns and then along rows, modulo 256; running sums
    undo it without loss.

    Args:
        residuals: (3, N, H, W) uint8.

    Returns:
        (N, 3, H, W) uint8, RGB.
    """
    planes = np.cumsum(residuals, 2, dtype=np.uint8)
    np.cumsum(planes, 3, dtype=np.uint8, out=planes)
    planes[1:] += planes[0]
    return planes[[1, 0, 2]].swapaxes(0, 1)


def channels_first(images: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Bring (N, H, W), (N, H, W, C) or (N, C, H, W) uint8 with C of 1 or 3 to (N, C, H, W).

    Raises:
        SourceError: another dtype or shape.
    """
    if images.dtype != np.uint8:
        raise SourceError(
            f"{where}: expected uint8 images in 0 .. 255; got {images.dtype}; store floats in [0, 1] as "
            "(255 * images).round().astype('uint8')"
        )
    return axes_in_order(images, where)


def axes_in_order(images: NDArray[Any], where: str) -> NDArray[Any]:
    """Bring images of any dtype to (N, C, H, W), as ``channels_first``."""
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3):
        return images.transpose(0, 3, 1, 2)
    if images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    raise SourceError(
        f"{where}: expected images of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels; "
        f"got {images.shape}"
    )


def integer_labels(labels: NDArray[Any], count: int, where: str, most: int | None = MOST_CLASSES) -> Tensor:
    """Return one non-negative int64 label per image, below ``most`` (None: whatever fits).

    Raises:
        SourceError: the labels are no integers, too many or few, or out of range.
    """
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise SourceError(f"{where}: expected {count} integer labels; got {labels.dtype} of shape {labels.shape}")
    if count and int(labels.min()) < 0:
        raise SourceError(f"{where}: labels must start at 0; found {int(labels.min())}")
    limit = np.iinfo(np.int64).max if most is None else most
    if count and int(labels.max()) >= limit:
        raise SourceError(
            f"{where}: expected at most {limit:,} classes, so labels below that; found {int(labels.max())}: number the "
            "classes from 0 on"
        )
    return torch.from_numpy(labels.astype(np.int64))


def count_classes(class_names: tuple[str, ...], *labels: Tensor | None) -> int:
    """Return the number of class names or, without names, one more than the largest label."""
    return len(class_names) or 1 + max(int(part.max()) for part in labels if part is not None and len(part))


class _Archive:
    """The arrays of an .npz file, read one by one when asked for; nothing is ever unpickled.

    What a header declares is compared with the size of its member before anything is allocated, and with the limits.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._zip = zipfile.ZipFile(file)
        self._members = {info.filename.removesuffix(".npy"): info for info in self._zip.infolist()}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all arrays, in the file's order."""
        return tuple(self._members)

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Read one array.

        Raises:
            SourceError: it is damaged, too large or too well compressed, or of Python objects.
        """
        info, where = self._members[name], f"{self._path}: {name}"
        with self._zip.open(info) as member:
            version = np.lib.format.read_magic(member)
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }.get(version)
            if read_header is None:
                raise SourceError(f"{where}: expected an array of format 1.0 or 2.0; got {version}")
            shape, is_fortran, dtype = read_header(member)
            if dtype.hasobject:
                raise SourceError(f"{where}: holds Python objects, which are not read; expected plain numbers or text")
            size = math.prod(shape) * dtype.itemsize
            left = info.file_size - member.tell()
            if min(shape, default=0) < 0 or size != left:
                raise SourceError(f"{where}: declares {size:,} bytes and has {left:,}: {_UNREADABLE}")
            check_memory(size, where)
            check_expansion(info.file_size, info.compress_size, where)
            content = bytearray(member.read(size))
        if len(content) != size:
            raise SourceError(f"{where}: declares {size:,} bytes and has {len(content):,}: {_UNREADABLE}")
        flat = np.frombuffer(content, dtype=dtype) if size else np.empty(0, dtype=dtype)
        return flat.reshape(shape, order="F" if is_fortran else "C")

    def get(self, name: str) -> NDArray[Any] | None:
        """Read one array, or return None where there is none of that name."""
        if name not in self:
            return None
        return self[name]


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[_Archive]:
    """Open an .npz file.

    Raises:
        SourceError: the file is truncated, corrupt, no archive, or no regular file; or an array in it is, when it is read.
    """
    try:
        with open_regular(path) as file:
            if file.read(6) == np.lib.format.MAGIC_PREFIX:
                raise SourceError(f"{path}: expected an .npz archive with {_LAYOUTS}; got a single array")
            file.seek(0)
            yield _Archive(path, file)
    except SourceError:
        raise
    except Exception as error:  # hostile bytes can raise anything
        raise SourceError(
            f"{path}: cannot be read as an .npz archive of plain arrays ({error}); {_UNREADABLE}"
        ) from error


def _split_from_archive(arrays: _Archive, prefix: str, where: str) -> tuple[Tensor, Tensor] | None:
    """Return (images, labels) of one split, or None where the archive has none of its keys."""
    res, plain, label_key = f"{prefix}res", f"{prefix}images", f"{prefix}labels"
    if not any(key in arrays for key in (res, plain, label_key)):
        return None
    key = res if res in arrays else plain
    if missing := [name for name in (key, label_key) if name not in arrays]:
        raise SourceError(f"{where}: lacks {', '.join(missing)}; found {_some(arrays.names)}; expected {_LAYOUTS}")
    stored = arrays[key]
    if key == res:
        if stored.ndim != 4 or len(stored) != 3 or stored.dtype != np.uint8:
            raise SourceError(f"{where}: expected {res} of shape (3, N, H, W) uint8; got {stored.shape} {stored.dtype}")
        images = undo_residuals(stored)
    else:
        images = channels_first(stored, f"{where}: {plain}")
    labels = integer_labels(arrays[label_key], len(images), f"{where}: {label_key}")
    if not len(images):
        raise SourceError(f"{where}: {key} holds no images")
    return torch.from_numpy(np.ascontiguousarray(images)), labels


def _some(names: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(name[:40] for name in names[:most])
    return (shown + (", ..." if len(names) > most else "")) or "nothing"


def open_npz(path: Path, *, name: str, flip: bool) -> DataSource:
    """Open a NumPy archive.

    Keys are ``train_res``/``test_res`` (residual-coded, see ``undo_residuals``) or ``train_images``/``test_images``
    with ``train_labels``/``test_labels``, or plain ``images``/``labels``. Optional: ``class_names`` (K,) and
    ``train_track`` (N,), the number of a physical object within its class: images of one are near-duplicates.

    Args:
        path: the .npz file.
        name: the source's name.
        flip: whether flips keep the meaning.

    Raises:
        SourceError: the file cannot be read, or its arrays do not fit together.
    """
    with open_archive(path) as arrays:
        train = _split_from_archive(arrays, "train_", str(path))
        test = _split_from_archive(arrays, "test_", str(path))
        if train is None:
            train = _split_from_archive(arrays, "", str(path))
        if train is None:
            raise SourceError(f"{path}: no training images; found {_some(arrays.names)}; expected {_LAYOUTS}")
        stored_names, stored_tracks = arrays.get("class_names"), arrays.get("train_track")
    if stored_names is None:
        stored_names = np.empty(0)
    if stored_names.ndim != 1 or len(stored_names) > MOST_CLASSES:
        raise SourceError(
            f"{path}: expected class_names of shape (K,), at most {MOST_CLASSES:,}; got {stored_names.shape}"
        )
    class_names = tuple(str(entry) for entry in stored_names.tolist())
    num_classes = count_classes(class_names, train[1], test[1] if test else None)
    groups = None
    if stored_tracks is not None:
        tracks = integer_labels(stored_tracks, len(train[1]), f"{path}: train_track", most=None)
        if int(tracks.max()) >= _TRACKS_PER_CLASS:
            tracks = torch.unique(tracks, return_inverse=True)[1]
        groups = train[1] * max(_TRACKS_PER_CLASS, int(tracks.max()) + 1) + tracks
    return DataSource(
        name=name,
        train=build_set(str(path), *train, class_names, num_classes),
        test=build_set(str(path), *test, class_names, num_classes) if test else None,
        flip=flip,
        groups=groups,
    )


def open_parquet(path: Path, *, name: str, flip: bool, frame: Framing | None = None, channels: int = RGB) -> DataSource:
    """Open a Parquet table with one encoded picture a row.

    Columns: ``label`` (integers from 0); ``jpeg``, ``png``, ``image`` or ``bytes`` (an encoded picture, or a record
    with a ``bytes`` field); optional ``split`` ("train"; "test" or "val" and the like). Class names may stand in the
    schema's metadata under ``class_names``, joined by "|".

    Args:
        path: the .parquet file.
        name: the source's name.
        flip: whether flips keep the meaning.
        frame: the size to bring pictures to; None asks for pictures of one size.
        channels: 3 for RGB, 1 for grey.

    Raises:
        SourceError: the file cannot be read, lacks a column, or holds unreadable or differently sized pictures.
    """
    with open_table(path) as table:
        column = next((entry for entry in _PICTURE_COLUMNS if entry in table.columns), None)
        if column is None or "label" not in table.columns:
            raise SourceError(
                f"{path}: expected a column label and one of {', '.join(_PICTURE_COLUMNS)}; found {_some(table.columns)}"
            )
        if not table.num_rows:
            raise SourceError(f"{path}: no images")
        labels = integer_labels(table.integers("label"), table.num_rows, f"{path}: label")
        splits = table.texts("split") if "split" in table.columns else ["train"] * table.num_rows
        if unknown := sorted({str(entry) for entry in splits} - {"train", *TEST_SPLITS}):
            raise SourceError(
                f"{path}: expected splits train, {', '.join(TEST_SPLITS)}; found {_some([ascii(u) for u in unknown])}"
            )
        is_train = torch.tensor([entry == "train" for entry in splits])
        if not is_train.any():
            raise SourceError(f"{path}: no rows of split train")
        class_names = table.class_names()
        num_classes = count_classes(class_names, labels)
        images = torch.from_numpy(
            stack_pictures(
                table.pictures(column),
                table.num_rows,
                where=str(path),
                frame=frame,
                channels=channels,
                expansion=Expansion(table.size, str(path)),
            )
        )

    def rows(chosen: Tensor) -> ImageSet:
        return build_set(str(path), images[chosen], labels[chosen], class_names, num_classes)

    return DataSource(name=name, train=rows(is_train), test=None if is_train.all() else rows(~is_train), flip=flip)
