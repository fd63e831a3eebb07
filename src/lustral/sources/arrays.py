"""Data sets in one file: NumPy archives (.npz) and Parquet tables of encoded pictures (.parquet)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lustral.protocols import ImageSet
from lustral.sources.pixels import TEST_SPLITS, build_set, stack_pictures
from lustral.sources.record import DataSource, SourceError

_LAYOUTS = (
    "train_res/train_labels with test_res/test_labels, train_images/train_labels with optional "
    "test_images/test_labels, or images/labels"
)
_PICTURE_COLUMNS = ("jpeg", "image", "png", "bytes")
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


def integer_labels(labels: NDArray[Any], count: int, where: str) -> Tensor:
    """Return one non-negative int64 label per image.

    Raises:
        SourceError: the labels are no integers, too many or few, or negative.
    """
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise SourceError(f"{where}: expected {count} integer labels; got {labels.dtype} of shape {labels.shape}")
    if count and int(labels.min()) < 0:
        raise SourceError(f"{where}: labels must start at 0; found {int(labels.min())}")
    return torch.from_numpy(labels.astype(np.int64))


def count_classes(class_names: tuple[str, ...], *labels: Tensor | None) -> int:
    """Return the number of class names or, without names, one more than the largest label."""
    return len(class_names) or 1 + max(int(part.max()) for part in labels if part is not None and len(part))


def read_archive(path: Path) -> dict[str, NDArray[Any]]:
    """Read all arrays of an .npz file; nothing is ever unpickled.

    Raises:
        SourceError: the file is truncated, corrupt, no archive, or holds pickled objects.
    """
    try:
        with path.open("rb") as file:  # np.load would leave a broken file open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise SourceError(f"{path}: expected an .npz archive with {_LAYOUTS}; got a single array")
            with archive:
                return {key: archive[key] for key in archive.files}
    except SourceError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise SourceError(
            f"{path}: cannot be read as an .npz archive of plain arrays ({error}); it may be truncated or corrupt: "
            "fetch or save it again"
        ) from error


def _split_from_archive(arrays: Mapping[str, NDArray[Any]], prefix: str, where: str) -> tuple[Tensor, Tensor] | None:
    """Return (images, labels) of one split, or None where the archive has none of its keys."""
    res, plain, label_key = f"{prefix}res", f"{prefix}images", f"{prefix}labels"
    if not any(key in arrays for key in (res, plain, label_key)):
        return None
    key = res if res in arrays else plain
    if missing := [name for name in (key, label_key) if name not in arrays]:
        raise SourceError(f"{where}: lacks {', '.join(missing)}; found {', '.join(arrays)}; expected {_LAYOUTS}")
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
    arrays = read_archive(path)
    train = _split_from_archive(arrays, "train_", str(path))
    test = _split_from_archive(arrays, "test_", str(path))
    if train is None:
        train = _split_from_archive(arrays, "", str(path))
    if train is None:
        raise SourceError(f"{path}: no training images; found {', '.join(arrays) or 'nothing'}; expected {_LAYOUTS}")
    class_names = tuple(str(entry) for entry in arrays.get("class_names", np.empty(0)).tolist())
    num_classes = count_classes(class_names, train[1], test[1] if test else None)
    groups = None
    if "train_track" in arrays:
        tracks = integer_labels(arrays["train_track"], len(train[1]), f"{path}: train_track")
        groups = train[1] * max(_TRACKS_PER_CLASS, int(tracks.max()) + 1) + tracks
    return DataSource(
        name=name,
        train=build_set(str(path), *train, class_names, num_classes),
        test=build_set(str(path), *test, class_names, num_classes) if test else None,
        flip=flip,
        groups=groups,
    )


def _picture_bytes(cell: Any) -> bytes:
    """Return the encoded picture in a table cell: plain bytes, or a record whose "bytes" field holds them."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    return content if isinstance(content, bytes) else b""  # nothing to decode: reported as unreadable


def open_parquet(path: Path, *, name: str, flip: bool, image_size: int | None = None) -> DataSource:
    """Open a Parquet table with one encoded picture a row.

    Columns: ``label`` (integers from 0); ``jpeg``, ``png``, ``image`` or ``bytes`` (an encoded picture, or a record
    with a ``bytes`` field); optional ``split`` ("train"; "test" or "val" and the like). Class names may stand in the
    schema's metadata under ``class_names``, joined by "|". Pictures become RGB.

    Args:
        path: the .parquet file.
        name: the source's name.
        flip: whether flips keep the meaning.
        image_size: side in pixels to resize to; None asks for pictures of one size.

    Raises:
        SourceError: the file cannot be read, lacks a column, or holds unreadable or differently sized pictures.
    """
    import pyarrow as pa  # imported here: slow, and only this kind of file needs it
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{path}: cannot be read as a Parquet table ({error}); fetch or save it again") from error
    columns = table.column_names
    column = next((entry for entry in _PICTURE_COLUMNS if entry in columns), None)
    if column is None or "label" not in columns:
        raise SourceError(
            f"{path}: expected a column label and one of {', '.join(_PICTURE_COLUMNS)}; found {', '.join(columns)}"
        )
    if not len(table):
        raise SourceError(f"{path}: no images")
    labels = integer_labels(table["label"].to_numpy(), len(table), f"{path}: label")
    splits = np.array(table["split"].to_pylist() if "split" in columns else ["train"] * len(table), dtype=object)
    if unknown := sorted({str(entry) for entry in splits} - {"train", *TEST_SPLITS}):
        raise SourceError(f"{path}: expected splits train, {', '.join(TEST_SPLITS)}; found {', '.join(unknown)}")
    is_train = torch.from_numpy(splits == "train")
    if not is_train.any():
        raise SourceError(f"{path}: no rows of split train")
    pictures = ((f"row {row}", _picture_bytes(cell.as_py())) for row, cell in enumerate(table[column]))
    size = None if image_size is None else (image_size, image_size)
    images = torch.from_numpy(stack_pictures(pictures, len(table), where=str(path), size=size))
    metadata = table.schema.metadata or {}
    class_names = tuple(metadata[b"class_names"].decode().split("|")) if b"class_names" in metadata else ()
    num_classes = count_classes(class_names, labels)

    def rows(chosen: Tensor) -> ImageSet:
        return build_set(str(path), images[chosen], labels[chosen], class_names, num_classes)

    return DataSource(name=name, train=rows(is_train), test=None if is_train.all() else rows(~is_train), flip=flip)
