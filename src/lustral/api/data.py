"""Images in whatever form a user has them, as a ``DataSource``: sets, arrays, data sets of torch and others, loaders, paths.

Sets at rest are uint8, so floats are rounded to 8 bits. What had to be done to the pixels beyond that is said in a note.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from lustral.core.characters import visible
from lustral.vision.images import as_uint8
from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, FolderStream, SourceError, load_source, source_with_channels
from lustral.vision.sources.arrays import axes_in_order, count_classes, integer_labels
from lustral.vision.sources.checks import check_memory
from lustral.vision.sources.pixels import RGB, Framing, build_set, frame_tensor, framing, stack_pictures

Data: TypeAlias = object
"""An ``ImageSet``; (images, labels) as arrays or tensors; a data set of torch, torchvision or Hugging Face; a ``DataLoader``;
a ``DataSource``; or what ``load_source`` opens: the path of a folder or file, or a known name."""

Constants: TypeAlias = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation per channel, on the [0, 1] scale."""

IMAGE_KEYS = ("image", "images", "img", "picture", "pixel_values", "x")
LABEL_KEYS = ("label", "labels", "fine_label", "target", "targets", "y")
SLACK = 0.02  # beyond [0, 1], of images whose normalisation is undone: constants are written with few digits
WHAT = (
    "an ImageSet, (images, labels) as arrays or tensors, a data set or DataLoader of torch, a Hugging Face data set, or the "
    "path of an image folder or file"
)


@dataclass(frozen=True, kw_only=True)
class OpenedData:
    """Images as a source, and what was done to them.

    Attributes:
        source: the images.
        notes: sentences that the user should read.
    """

    source: DataSource
    notes: tuple[str, ...] = ()


def open_data(
    data: Data,
    *,
    image_size: int | Sequence[int] | None = None,
    resize: int | None = None,
    channels: int | None = None,
    constants: Constants | None = None,
    skip_unreadable: bool = False,
) -> OpenedData:
    """Open images in any of the forms of ``Data``.

    Args:
        data: the images and their labels: uint8, or floats in [0, 1]; labels are integers from 0.
        image_size: side in pixels that images are resized to, or (height, width); None keeps their size.
        resize: scale the shorter side to this many pixels, then cut ``image_size`` out of the middle; None squeezes.
        channels: 1 makes all images grey, 3 makes them RGB; None leaves tensors as they are and makes pictures RGB.
        constants: of a normalisation that the images may have gone through already, which is then undone.
        skip_unreadable: leave out pictures of a folder that cannot be decoded.

    Raises:
        TypeError: it is none of these.
        SourceError: the images cannot be read, differ in size, are out of range, or have no integer labels.
    """
    if isinstance(data, str | os.PathLike):
        source = load_source(
            os.fspath(data),
            image_size=image_size,
            resize=resize,
            channels=channels,
            stream=None,
            skip_unreadable=skip_unreadable,
        )
        return OpenedData(source=source)
    frame = framing(image_size, resize)
    opened = _in_memory(data, frame, channels, constants)
    if channels is not None:
        opened = replace(opened, source=source_with_channels(opened.source, channels))
    return opened


def _in_memory(data: Data, frame: Framing | None, channels: int | None, constants: Constants | None) -> OpenedData:
    """Open anything but paths and names."""
    if isinstance(data, DataSource):
        return OpenedData(source=_framed(data, frame))
    if isinstance(data, ImageSet | FolderStream):
        return OpenedData(source=_framed(_source("images", data), frame))
    if isinstance(data, Mapping):
        pair = [_first(data, IMAGE_KEYS), _first(data, LABEL_KEYS)]
        if pair[0] is None or pair[1] is None:
            raise SourceError(
                f"a mapping with {_listed(data)}; expected images under {IMAGE_KEYS[0]!r} and labels under {LABEL_KEYS[0]!r}; of "
                f"a data set in several splits give one: data[{next(iter(data), 'train')!r}]"
            )
        return _from_arrays(pair[0], pair[1], frame, constants)
    if isinstance(data, tuple | list) and len(data) == 2 and all(map(_is_array, data)):
        return _from_arrays(data[0], data[1], frame, constants)
    if isinstance(data, DataLoader):
        return _from_loader(data, frame, constants)
    if (hasattr(data, "__getitem__") and hasattr(data, "__len__")) or isinstance(data, Iterable):
        return _from_items(data, frame, channels or RGB, constants)
    raise TypeError(f"expected {WHAT}; got {type(data).__name__}")


def _from_arrays(
    images: Any, labels: Any, frame: Framing | None, constants: Constants | None, names: tuple[str, ...] = ()
) -> OpenedData:
    pixels, notes = to_pixels(_array(images), constants)
    numbers = integer_labels(_array(labels), len(pixels), "the labels")
    if not len(pixels):
        raise SourceError("the data hold no images; expected some of at least two classes")
    pixels = pixels if frame is None else frame_tensor(pixels, frame)
    return OpenedData(source=_source("images", _image_set(pixels, numbers, names)), notes=notes)


def _from_loader(loader: DataLoader[Any], frame: Framing | None, constants: Constants | None) -> OpenedData:
    """Read a loader to its end; its shuffling draws from a stream of its own, and the process's stays where it is."""
    images, labels, held = [], [], 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in loader:
            inputs, targets = _parts(batch, "a batch")
            images.append(torch.as_tensor(inputs).cpu())
            labels.append(torch.as_tensor(targets).cpu())
            held += images[-1].numel()
            check_memory(held, "the loader")
    if not images:
        raise SourceError("the loader gave no batch; expected images of at least two classes")
    everything = torch.cat(labels)
    names = class_names_of(loader.dataset, int(everything.max()))
    return _from_arrays(torch.cat(images), everything, frame, constants, names)


def _from_items(data: Any, frame: Framing | None, channels: int, constants: Constants | None) -> OpenedData:
    """Read a data set item by item: pictures are decoded as those of folders, arrays and tensors are stacked."""
    labels: list[int] = []
    with torch.random.fork_rng(devices=[]):  # for augmentations
        torch.manual_seed(0)
        items = _labelled(data, labels)
        first = next(items, None)
        if first is None:
            raise SourceError("the data set is empty; expected images of at least two classes")
        if not isinstance(first, Image.Image):
            arrays = _stacked(itertools.chain([first], items))
            return _from_arrays(arrays, np.array(labels), frame, constants, class_names_of(data, max(labels)))
        pictures: Iterable[Any] = itertools.chain([first], items)
        if not hasattr(data, "__len__"):
            pictures = list(pictures)
        count = len(data) if hasattr(data, "__len__") else len(labels)
        named = ((f"item {row}", _picture(picture, row)) for row, picture in enumerate(pictures))
        images = torch.from_numpy(stack_pictures(named, count, where="the data set", frame=frame, channels=channels))
    names = class_names_of(data, max(labels))
    numbers = integer_labels(np.array(labels), len(images), "the labels")
    return OpenedData(source=_source("images", _image_set(images, numbers, names)))


def _labelled(data: Any, labels: list[int]) -> Iterator[Any]:
    """Yield what each item shows, and put its label into ``labels``."""
    by_index = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    for row, item in enumerate((data[row] for row in range(len(data))) if by_index else data):
        picture, label = _parts(item, f"item {row}")
        try:
            labels.append(operator.index(label))
        except TypeError:
            try:
                labels.append(operator.index(label.item()))  # of an array or tensor
            except (AttributeError, TypeError, ValueError, RuntimeError) as error:
                raise SourceError(f"item {row}: expected one integer label; got {label!r:.100}") from error
        yield picture


def _parts(item: Any, where: str) -> tuple[Any, Any]:
    """Return (images, labels) of an item or batch: the first two of a tuple, or what a mapping names so."""
    if isinstance(item, Mapping):
        picture, label = _first(item, IMAGE_KEYS), _first(item, LABEL_KEYS)
        if picture is not None and label is not None:
            return picture, label
        raise SourceError(
            f"{where} has {_listed(item)}; expected an image under one of {', '.join(IMAGE_KEYS)} and a label under one of "
            f"{', '.join(LABEL_KEYS)}: rename its columns"
        )
    if isinstance(item, tuple | list) and len(item) >= 2:
        return item[0], item[1]
    raise SourceError(f"{where}: expected (image, label), or a mapping with both; got {type(item).__name__}")


def _picture(picture: Any, row: int) -> Image.Image:
    if not isinstance(picture, Image.Image):
        raise SourceError(f"item {row}: expected a picture, as the items before it; got {type(picture).__name__}")
    return picture


def _stacked(arrays: Iterable[Any]) -> NDArray[Any]:
    rows: list[NDArray[Any]] = []
    for row, array in enumerate(arrays):
        rows.append(_array(array))
        if rows[-1].shape != rows[0].shape:
            raise SourceError(
                f"item {row} has shape {rows[-1].shape}, the first {rows[0].shape}; expected images of one size: resize them in "
                "the data set's transform, or let it give pictures and pass image_size"
            )
        check_memory(len(rows) * rows[0].size, "the data set")
    return np.stack(rows)


def to_pixels(images: NDArray[Any], constants: Constants | None = None) -> tuple[Tensor, tuple[str, ...]]:
    """Return images as (N, C, H, W) uint8, with notes on what had to be done.

    Args:
        images: (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 channels: whole numbers in 0 .. 255, or floats in [0, 1].
        constants: mean and standard deviation of a normalisation; where floats outside of [0, 1] went through it, it is undone.

    Raises:
        SourceError: another shape or range, or numbers that are not finite.

    >>> to_pixels(np.array([[[0.0, 1.0]]]))[0].tolist()
    [[[[0, 255]]]]
    """
    ordered = np.ascontiguousarray(axes_in_order(images, "the images"))
    if ordered.dtype == np.uint8 or not ordered.size:
        return torch.from_numpy(ordered.astype(np.uint8, copy=False)), ()
    if ordered.dtype == np.bool_ or not np.issubdtype(ordered.dtype, np.number) or np.iscomplexobj(ordered):
        raise SourceError(f"expected images of uint8 or floats; got {ordered.dtype}")
    values = torch.from_numpy(ordered.astype(np.float32, copy=False))
    if not bool(values.isfinite().all()):
        raise SourceError("the images hold NaN or infinite numbers; expected finite ones: look at how they are read")
    low, high = float(values.min()), float(values.max())
    is_whole = bool((values == values.round()).all())
    if np.issubdtype(ordered.dtype, np.integer) or (is_whole and 1 < high <= 255 and low >= 0):
        if low < 0 or high > 255:
            raise SourceError(f"expected whole numbers in 0 .. 255; found {low:.0f} .. {high:.0f}")
        return values.to(torch.uint8), () if ordered.dtype.kind in "iu" else ("The images were read as 0 .. 255.",)
    if low >= 0 and high <= 1:
        dark = (f"The brightest pixel is {high:.2g} on a scale to 1: were the images divided by 255 twice?",)
        return as_uint8(values), dark if high < 2 / 255 else ()
    restored = None if constants is None else _without_normalisation(values, constants)
    if restored is None:
        raise SourceError(
            f"expected images as floats in [0, 1] or whole numbers in 0 .. 255; found {low:.3g} .. {high:.3g}: if they are "
            "normalised, take Normalize out of their transform, or give its mean= and std=, and it is undone"
        )
    return as_uint8(restored), ("The images came normalised; that was undone with the mean and std that were given.",)


def _without_normalisation(values: Tensor, constants: Constants) -> Tensor | None:
    """Return normalised images in [0, 1], or None where these constants do not lead there."""
    mean, std = (torch.tensor(tuple(part), dtype=torch.float32).view(1, -1, 1, 1) for part in constants)
    if mean.shape != std.shape or mean.shape[1] != values.shape[1]:
        return None
    restored = values * std + mean
    fits = float(restored.min()) >= -SLACK and float(restored.max()) <= 1 + SLACK
    return restored.clamp(0, 1) if fits else None


def class_names_of(data: Any, largest: int) -> tuple[str, ...]:
    """Return the names of the classes that a data set tells, or nothing.

    Args:
        data: ``classes`` of torchvision's sets, ``features`` of Hugging Face's; subsets are looked into.
        largest: label that there must be a name for.
    """
    for _ in range(8):  # subsets of subsets
        features = getattr(data, "features", None)
        label = _first(features, LABEL_KEYS) if isinstance(features, Mapping) else None
        names = getattr(label, "names", None) or getattr(data, "classes", None)
        if isinstance(names, list | tuple) and len(names) > largest and all(isinstance(name, str) for name in names):
            return tuple(names)
        data = getattr(data, "dataset", None)
    return ()


def named(data: Data) -> str:
    """Return what data are called: their path or name, the number that was given, or the name of their class.

    >>> named("digits"), named((1, 2)), named(40)
    ('digits', 'tuple', '40')
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    return str(data) if isinstance(data, int) else type(data).__name__


def _image_set(images: Tensor, labels: Tensor, names: tuple[str, ...]) -> ImageSet:
    return build_set("the data", images, labels, names, max(count_classes(names, labels), 2))


def _source(name: str, images: ImageSet | FolderStream) -> DataSource:
    return DataSource(name=name, train=images, test=None, flip=True)


def _framed(source: DataSource, frame: Framing | None) -> DataSource:
    """Return a source with its images resized; streamed ones have their size."""
    if frame is None:
        return source
    if not isinstance(source.train, ImageSet):
        raise SourceError("a FolderStream has its image size; give the path of the folder, with image_size")
    train = replace(source.train, images=frame_tensor(source.train.images.cpu(), frame))
    test = None if source.test is None else replace(source.test, images=frame_tensor(source.test.images.cpu(), frame))
    return replace(source, train=train, test=test)


def _first(content: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((content[key] for key in keys if key in content), None)


def _listed(content: Mapping[Any, Any]) -> str:
    return ", ".join(visible(str(key)[:40]) for key in list(content)[:8]) or "nothing"


def _is_array(value: Any) -> bool:
    """Say whether a value holds a whole set's images or labels: an array, a tensor, or a list of numbers."""
    return hasattr(value, "__array__") or (isinstance(value, list) and bool(value) and not isinstance(value[0], tuple))


def _array(values: Any) -> NDArray[Any]:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
