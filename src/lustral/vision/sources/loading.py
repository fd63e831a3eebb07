"""Opens a source from the text a user types: a known name, a path, or a torchvision data set."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from lustral.vision.records import ImageSet
from lustral.vision.sources.arrays import open_npz, open_parquet
from lustral.vision.sources.digits import open_digits
from lustral.vision.sources.folder import open_folder
from lustral.vision.sources.folder_stream import Reading
from lustral.vision.sources.label_table import open_label_table
from lustral.vision.sources.pixels import RGB, Framing, frame_tensor, framing, with_channels
from lustral.vision.sources.record import DataSource, SourceError
from lustral.vision.sources.torchvision_sets import open_torchvision

DATA_VARIABLE = "LUSTRAL_DATA"  # environment variable with the folder of the named sets
_TORCHVISION = "torchvision:"
_FILES = {  # name: (file in the data folder, whether flips keep the meaning)
    "cifar10": ("cifar10.npz", True),
    "gtsrb": ("gtsrb32.npz", False),
    "mnist": ("mnist.npz", False),
    "tinyimagenet10": ("tinyimagenet10_64.parquet", True),
}
_OWN_DATA = (
    "the path of an image folder (CLASS/*.png, or train/CLASS/*.png and test/CLASS/*.png), an .npz or a .parquet file, "
    "or a .csv table with the columns file and label"
)


def source_names() -> tuple[str, ...]:
    """Return the names that ``load_source`` knows, sorted.

    >>> source_names()
    ('cifar10', 'digits', 'gtsrb', 'mnist', 'tinyimagenet10')
    """
    return tuple(sorted([*_FILES, "digits"]))


def load_source(
    spec: str,
    *,
    root: Path | None = None,
    image_size: int | Sequence[int] | None = None,
    resize: int | None = None,
    channels: int | None = None,
    stream: bool | None = False,
    skip_unreadable: bool = False,
) -> DataSource:
    """Open a data set.

    Args:
        spec: "digits" (needs no file); a name of ``source_names()``, found in ``root``; a path to an image folder,
            an .npz or a .parquet file, a .csv table of files and labels; or "torchvision:CLASS", downloaded to ``root``.
        root: folder of the named sets; None takes the environment variable LUSTRAL_DATA.
        image_size: side in pixels that images are resized to, or (height, width); None keeps their size.
        resize: scale the shorter side to this many pixels, then cut ``image_size`` out of the middle; None squeezes.
        channels: 1 makes all images grey (luma), 3 makes them RGB (a grey image three times); None leaves those of an
            .npz file as they are and makes all others RGB.
        stream: leave the training images of an image folder or table on disk; None does so there, and opens others too.
        skip_unreadable: leave out, and list in ``DataSource.unreadable``, pictures of an image folder or table that cannot be
            decoded. With ``stream=None`` the others are then held in memory where they fit.

    Raises:
        SourceError: the source cannot be found, read or understood; the message says what to do.
    """
    if channels not in (None, 1, RGB):
        raise SourceError(f"expected 1 channel (grey) or 3 (RGB); got {channels}: images of others cannot be read")
    frame = framing(image_size, resize)
    source = _open(spec, root, frame, channels or RGB, stream, skip_unreadable)
    return source if channels is None else source_with_channels(source, channels)


def source_with_channels(source: DataSource, channels: int) -> DataSource:
    """Return a source whose images are grey (1 channel) or RGB (3), streamed ones too."""
    if source.train.image_shape[0] == channels:
        return source
    train = source.train
    if isinstance(train, ImageSet):
        train = replace(train, images=with_channels(train.images, channels))
    else:
        train = replace(train, image_shape=(channels, *train.image_shape[1:]))
    test = None if source.test is None else replace(source.test, images=with_channels(source.test.images, channels))
    return replace(source, train=train, test=test)


def _open(
    spec: str, root: Path | None, frame: Framing | None, channels: int, stream: bool | None, skip_unreadable: bool
) -> DataSource:
    """Open a source, with ``channels`` where pictures are decoded."""
    path = Path(spec).expanduser()
    is_folder = spec not in source_names() and path.is_dir()
    is_table = spec not in source_names() and path.suffix.lower() == ".csv" and path.is_file()
    if stream and not (is_folder or is_table):
        raise SourceError(f"only an image folder or a label table can be streamed; {spec!r} is none: leave out stream")
    if is_folder or is_table:
        opener, name = (open_folder, path.resolve().name) if is_folder else (open_label_table, path.stem)
        reading = Reading(frame=frame, channels=channels, stream=stream, skip_unreadable=skip_unreadable)
        return opener(path, reading, name=name)
    if spec == "digits":
        return open_digits(frame)
    if spec.startswith(_TORCHVISION):
        return open_torchvision(
            spec.removeprefix(_TORCHVISION), root=_data_folder(spec, root), frame=frame, channels=channels
        )
    if spec in _FILES:
        return _open_known(spec, _data_folder(spec, root), frame, channels)
    if path.is_file():
        return _open_file(path, path.stem, True, frame, channels)
    close = difflib.get_close_matches(spec, source_names(), n=1)
    raise SourceError(
        f"no data set {spec!r}: neither a known name nor an existing path"
        + (f"; did you mean {close[0]!r}?" if close else "")
        + f"\nknown names: {', '.join(source_names())}, {_TORCHVISION}CIFAR10 and the like; or give {_OWN_DATA}"
    )


def _data_folder(spec: str, root: Path | None) -> Path:
    """Return the folder of the named sets, given or from the environment."""
    if root is not None:
        return root
    if folder := os.environ.get(DATA_VARIABLE):
        return Path(folder)
    raise SourceError(
        f"{spec!r} needs a data folder: set the environment variable {DATA_VARIABLE}"
        + (f" to the folder that holds {_FILES[spec][0]}" if spec in _FILES else " to the folder to download to")
        + f", or give {_OWN_DATA} (--data PATH); 'digits' needs no file"
    )


def _open_known(spec: str, folder: Path, frame: Framing | None, channels: int) -> DataSource:
    """Open a named file in the data folder."""
    file, flip = _FILES[spec]
    path = folder / file
    if not path.is_file():
        raise SourceError(
            f"{spec!r}: {path} does not exist; put the file there, set {DATA_VARIABLE} to the folder that holds it, or "
            f"give {_OWN_DATA} (--data PATH); 'digits' needs no file"
        )
    if spec == "mnist":
        return _resized(_map_images(open_npz(path, name=spec, flip=flip), _pad_grey), frame)
    return _open_file(path, spec, flip, frame, channels)


def _open_file(path: Path, name: str, flip: bool, frame: Framing | None, channels: int) -> DataSource:
    """Open a single file by its suffix."""
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return _resized(open_npz(path, name=name, flip=flip), frame)
    if suffix == ".parquet":
        return open_parquet(path, name=name, flip=flip, frame=frame, channels=channels)
    raise SourceError(f"{path}: expected an .npz, a .parquet or a .csv file; got {suffix or 'no suffix'}")


def _resized(source: DataSource, frame: Framing | None) -> DataSource:
    """Return the source with framed images."""
    return source if frame is None else _map_images(source, lambda images: frame_tensor(images, frame))


def _map_images(source: DataSource, change: Callable[[Tensor], Tensor]) -> DataSource:
    """Return a source whose sets are in memory with ``change`` applied to the images of both."""
    assert isinstance(source.train, ImageSet)
    train = replace(source.train, images=change(source.train.images))
    test = None if source.test is None else replace(source.test, images=change(source.test.images))
    return replace(source, train=train, test=test)


def _pad_grey(images: Tensor) -> Tensor:
    """Bring (N, 1, 28, 28) grey images to the usual (N, 3, 32, 32): a black margin, three equal channels."""
    return F.pad(images, (2, 2, 2, 2)).repeat(1, 3, 1, 1)
