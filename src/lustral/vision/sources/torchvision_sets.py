"""Data sets that torchvision downloads."""

from __future__ import annotations

import difflib
import inspect
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lustral.vision.sources.arrays import count_classes, integer_labels
from lustral.vision.sources.pixels import RGB, Framing, build_set, guarded_pillow, stack_pictures
from lustral.vision.sources.record import DataSource, SourceError

_SPLITS = {"Imagenette": ("train", "val"), "OxfordIIITPet": ("trainval", "test")}  # all others: train, test
_NO_FLIP = frozenset({"EMNIST", "GTSRB", "KMNIST", "MNIST", "QMNIST", "SVHN", "USPS"})


def _find_class(set_name: str) -> tuple[type[Any], frozenset[str]]:
    """Return a torchvision data set class and the names of its arguments."""
    from torchvision import datasets  # imported here: slow, and only this source needs it

    classes = {
        name: entry
        for name, entry in vars(datasets).items()
        if isinstance(entry, type) and issubclass(entry, datasets.VisionDataset)
    }
    arguments = {name: frozenset(inspect.signature(entry).parameters) for name, entry in classes.items()}
    usable = [name for name in classes if arguments[name] & {"train", "split"}]
    if set_name not in usable:
        spellings = {name.lower(): name for name in usable}
        close = difflib.get_close_matches(set_name.lower(), spellings, n=1)
        raise SourceError(
            f"torchvision has no data set {set_name!r} with a train and a test split"
            + (f"; did you mean {spellings[close[0]]!r}?" if close else f"; it has {', '.join(sorted(usable))}")
        )
    return classes[set_name], arguments[set_name]


def _read(dataset: Any, where: str, frame: Framing | None, channels: int) -> tuple[Tensor, Tensor]:
    """Return all (images uint8 (N, C, H, W), labels int64 (N,))."""
    labels: list[int] = []

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for row in range(len(dataset)):
            picture, label = dataset[row]
            try:
                labels.append(operator.index(label))
            except TypeError as error:
                raise SourceError(f"{where}: expected one integer label per image; got {label!r}") from error
            yield f"image {row}", picture

    stacked = stack_pictures(pictures(), len(dataset), where=where, frame=frame, channels=channels)
    images = torch.from_numpy(stacked)
    return images, integer_labels(torch.tensor(labels).numpy(), len(images), where)


def _gtsrb_tracks(dataset: Any, labels: Tensor) -> Tensor:
    """Return label * 1000 + track; files are named TRACK_FRAME.ppm and frames of a track are near-duplicates."""
    tracks = [int(Path(path).name.split("_")[0]) for path, _ in dataset._samples]
    return labels * 1000 + torch.tensor(tracks)


def open_torchvision(set_name: str, *, root: Path, frame: Framing | None = None, channels: int = RGB) -> DataSource:
    """Open a class of ``torchvision.datasets`` that has a ``train`` or ``split`` argument, downloading it if need be.

    Args:
        set_name: the class, e.g. "CIFAR100".
        root: folder that torchvision downloads to.
        frame: the size to bring pictures to; None asks for pictures of one size.
        channels: 3 for RGB, 1 for grey.

    Raises:
        SourceError: no such set, the download failed, or it is not a set of labelled pictures of one size.
    """
    make, arguments = _find_class(set_name)
    name = f"torchvision:{set_name}"
    values = (True, False) if "train" in arguments else _SPLITS.get(set_name, ("train", "test"))
    download = {"download": True} if "download" in arguments else {}
    groups: Tensor | None = None
    class_names: tuple[str, ...] = ()
    parts: list[tuple[Tensor, Tensor]] = []
    for is_train, value in zip((True, False), values, strict=True):
        split = {"train" if "train" in arguments else "split": value}
        try:
            with guarded_pillow():  # the pictures in the folder may be anybody's
                dataset = make(root=str(root), **split, **download)
                parts.append(_read(dataset, name, frame, channels))
        except SourceError:
            raise
        except Exception as error:  # of code and files of others
            raise SourceError(f"{name}: torchvision cannot open it in {root} ({error})") from error
        if is_train:
            class_names = tuple(str(entry) for entry in getattr(dataset, "classes", ()))
            groups = _gtsrb_tracks(dataset, parts[0][1]) if set_name == "GTSRB" else None
    num_classes = count_classes(class_names, *(labels for _, labels in parts))
    train, test = (build_set(name, *part, class_names, num_classes) for part in parts)
    return DataSource(name=name, train=train, test=test, flip=set_name not in _NO_FLIP, groups=groups)
