"""From what a user names or holds to a training set of unknown origin."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Generator, nn

from lustral.api.data import Data, open_data
from lustral.api.fitting import with_classes
from lustral.api.models import module_name
from lustral.api.opening import class_order, draw_clean
from lustral.core.randomness import child
from lustral.vision.images import at_most, channel_statistics, stratified_indices
from lustral.vision.models import Classifier, build_classifier
from lustral.vision.models.build import count_logits, with_normalisation
from lustral.vision.records import ImageSet, LabelledImages, TrainingView
from lustral.vision.sources import (
    DataSource,
    FolderStream,
    SourceError,
    check_class_names,
    source_names,
)
from lustral.vision.sources.checks import memory_limit
from lustral.vision.untrusted import OverlapError, file_names, find_overlap

Images = TypeVar("Images", bound=ImageSet | FolderStream)
SMALL_SIDE = 20  # pixels below which the default network is the small one
STATISTICS_SAMPLE = 2_000  # images whose mean and spread the network's normalisation takes

Architecture: TypeAlias = str | Callable[[], nn.Module]
"""The name of an architecture, or a function that returns a new network."""


@dataclass(frozen=True, kw_only=True)
class GivenSet:
    """A training set of unknown origin as a user names or holds it, and what is known about it.

    Attributes:
        data: the training set, in any form.
        clean: images that nobody could have poisoned, in any form; or, of a known name, how many of its reserve.
        classes: names of the classes in the order of their numbers, or a file of them; None keeps the data's.
        image_size: pixels to resize to: the side of a square, or height and width.
        resize: scale the shorter side to this many pixels first, and cut ``image_size`` out of the middle.
        flip: whether a mirrored image keeps its meaning; None: as known of the data.
        arch: network to train; None: small_cnn for images below 20 pixels and preact_resnet18:width=16 for the rest.
    """

    data: Data
    clean: Data | int | None = None
    classes: str | os.PathLike[str] | Sequence[str] | None = None
    image_size: int | Sequence[int] | None = None
    resize: int | None = None
    flip: bool | None = None
    arch: Architecture | None = None


@dataclass(frozen=True, kw_only=True)
class OpenedSet:
    """A training set of unknown origin, opened.

    Attributes:
        source: where it comes from.
        view: all that a method sees.
        names: N names of the images: their files, relative to the set's folder, or their positions.
        files: N paths of the images, where each is a file; else empty.
        arch: name of the architecture to train, or of a network's class that the user's code builds.
        test: images to measure a trained model on, which no method sees.
        dropped_clean: clean images left out because the untrusted part of the same set has them too.
        notes: sentences on what was changed on the way.
    """

    source: DataSource
    view: TrainingView
    names: tuple[str, ...]
    files: tuple[str, ...]
    arch: str
    test: ImageSet | None
    dropped_clean: int = 0
    notes: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes; their numbers where they have none."""
        data = self.view.untrusted
        return data.class_names or tuple(str(label) for label in range(data.num_classes))

    @property
    def opening_notes(self) -> tuple[str, ...]:
        """What the user should know of how the set was opened."""
        if not self.dropped_clean:
            return self.notes
        return (
            *self.notes,
            f"{self.dropped_clean} of the clean images are in the rest of the set too, pixel for pixel, and were left out.",
        )

    @property
    def unreadable_names(self) -> tuple[str, ...]:
        """Names of the pictures that were left out."""
        return tuple(os.path.relpath(entry.file, self.source.folder) for entry in self.source.unreadable)


def open_untrusted(given: GivenSet, *, seed: int, device: torch.device) -> OpenedSet:
    """Open a training set, and the clean images beside it."""
    found = open_data(given.data, image_size=given.image_size, resize=given.resize, skip_unreadable=True)
    source = found.source
    order = None if given.classes is None else class_order(given.classes)
    train, files, clean, dropped = source.train, source.files, None, 0
    if (count := _count(given.clean)) is not None:
        train, clean, dropped = _reserve(given, source, count, seed=seed)
        files = ()
    elif given.clean is not None:
        clean = draw_clean(_load_like(given.clean, source, given), None, seed=seed)
    untrusted = _in_order(train, order)
    clean = None if clean is None else _in_order(_like(clean, train), order).to(device)
    names = tuple(os.path.relpath(file, source.folder) for file in files) or tuple(map(str, range(len(train))))
    arch: Architecture = given.arch or (
        "small_cnn" if max(train.image_shape[1:]) < SMALL_SIDE else "preact_resnet18:width=16"
    )
    flip = source.flip if given.flip is None else given.flip
    view = TrainingView(
        untrusted=untrusted.to(device) if isinstance(untrusted, ImageSet) else untrusted,
        build_model=model_builder(arch, untrusted, device),
        clean=clean,
        flip=flip,
    )
    trial = view.build_model(child(seed, "trial"))  # so that a wrong --arch fails now
    test = None if source.test is None else _in_order(source.test, order)
    if not isinstance(arch, str):
        assert isinstance(trial, Classifier)
        arch = module_name(trial.network)
    return OpenedSet(
        source=source,
        view=view,
        names=names,
        files=files,
        arch=arch,
        test=test,
        dropped_clean=dropped,
        notes=found.notes,
    )


@contextmanager
def named_overlap(opened: OpenedSet) -> Iterator[None]:
    """Tell an overlap of the clean and the untrusted set, within the block, by the names of files."""
    try:
        yield
    except OverlapError as error:
        raise OverlapError(error.indices, opened.names if opened.files else ()) from None


def open_training_set(
    spec: Data, clean: ImageSet, *, image_size: int | Sequence[int] | None = None, resize: int | None = None
) -> LabelledImages:
    """Open the set that a model was trained on, for a purifier that looks at it: with the classes and the shape of clean images.

    Raises:
        ValueError: it has other classes or another shape, or holds some of the clean images (``OverlapError``).
    """
    channels, height, width = clean.image_shape
    size = image_size or (height, width)
    source = open_data(spec, image_size=size, resize=resize, channels=channels, skip_unreadable=True).source
    if not isinstance(spec, str | os.PathLike):
        source = with_classes(source, clean.num_classes)
    train = source.train
    if is_known(spec):  # what the clean images were drawn from is no part of it
        train = source.training_split()[0]
    names = tuple(clean.class_names)
    if names and train.class_names and set(names) == set(train.class_names):
        train = _in_order(train, names)
    if (train.num_classes, train.image_shape) != (clean.num_classes, clean.image_shape):
        name = spec if isinstance(spec, str) else source.name
        raise SourceError(
            f"expected a training set like the clean images, {clean.image_shape} in {clean.num_classes} classes; {name} has "
            f"{train.image_shape} in {train.num_classes}"
        )
    if overlap := find_overlap(train, clean):
        if not is_known(spec):
            raise OverlapError(overlap, file_names(train))
        is_other = torch.ones(len(train), dtype=torch.bool)  # a known set may hold an image twice
        is_other[overlap] = False
        train = train.subset(is_other)
    return train.to(clean.device) if isinstance(train, ImageSet) else train


def open_test(spec: Data, opened: OpenedSet, given: GivenSet) -> ImageSet:
    """Open images to measure a trained model on: a set's test split, or all of a set without one."""
    source = _load_like(spec, opened.source, given)
    if source.test is not None:
        return _like(source.test, opened.view.untrusted)
    loaded = source.train if isinstance(source.train, ImageSet) else source.train.load()
    return _like(loaded, opened.view.untrusted)


def is_known(data: Data) -> bool:
    """Say whether data are named by a known name, whose reserve is kept for defenders."""
    return isinstance(data, str) and data in source_names()


def model_builder(arch: Architecture, data: LabelledImages, device: torch.device) -> Callable[[Generator], nn.Module]:
    """Return what makes an untrained classifier on a device, its weights drawn from a stream."""
    mean, std = channel_statistics(_sample(data))

    def build(generator: Generator) -> nn.Module:
        if not isinstance(arch, str):
            network = built_by(arch, generator)
            built = with_normalisation(network, data.image_shape, mean, std, num_classes=data.num_classes)
            if (found := count_logits(built, data.image_shape)) != data.num_classes:
                raise ValueError(
                    f"{module_name(network)} gives {found} logits; expected {data.num_classes}, one per class of the data"
                )
            return built.to(device)
        return build_classifier(
            arch,
            num_classes=data.num_classes,
            image_shape=data.image_shape,
            mean=mean,
            std=std,
            generator=generator,
        ).to(device)

    return build


def built_by(build: Callable[[], nn.Module], generator: Generator) -> nn.Module:
    """Return a network that a user's function builds, its weights drawn from a stream; the process's streams stay."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return copy.deepcopy(build())  # should it return the same one again


def _sample(data: LabelledImages) -> ImageSet:
    if isinstance(data, ImageSet):
        return at_most(data, STATISTICS_SAMPLE)
    fitting = memory_limit() // (2 * math.prod(data.image_shape))
    wanted = max(min(STATISTICS_SAMPLE, len(data), fitting), 1)
    chosen, _ = stratified_indices(data.labels, data.num_classes, wanted, generator=child(0, "statistics"))
    part = data.subset(chosen)
    assert isinstance(part, FolderStream)
    return part.load()


def _count(clean: Data | int | None) -> int | None:
    """Return how many images of a known set's reserve are asked for; None where clean images are given, or none."""
    if isinstance(clean, int):
        return clean
    return int(clean) if isinstance(clean, str) and clean.isdecimal() and not Path(clean).exists() else None


def _reserve(given: GivenSet, source: DataSource, count: int, *, seed: int) -> tuple[ImageSet, ImageSet, int]:
    """Divide a known set into (the untrusted rest, clean images of its reserve, how many of these the rest has too)."""
    if not is_known(given.data):
        raise SourceError(
            f"--clean {count} takes clean images from the reserve of a known set ({', '.join(source_names())}); "
            "nobody knows which of your own images are clean: give a folder or file of images that you trust"
        )
    rest, _ = source.training_split()
    clean = draw_clean(source, count, seed=seed)
    twice = find_overlap(clean, rest)
    is_new = torch.ones(len(clean), dtype=torch.bool)
    is_new[twice] = False
    return rest, clean.subset(is_new), len(twice)


def _load_like(spec: Data, source: DataSource, given: GivenSet) -> DataSource:
    """Open another set at the size and with the channels of the untrusted one."""
    channels, height, width = source.train.image_shape
    size = given.image_size or ((height, width) if is_known(spec) else None)
    found = open_data(spec, image_size=size, resize=given.resize, channels=channels).source
    return found if isinstance(spec, str | os.PathLike) else with_classes(found, source.train.num_classes)


def _like(images: ImageSet, train: LabelledImages) -> ImageSet:
    """Return images with the labels of the untrusted set's classes, by their names, where it has more of them.

    Raises:
        SourceError: a class that the untrusted set does not have.
    """
    names = tuple(train.class_names)
    if not names or not images.class_names or images.class_names == names:
        return images
    if strangers := [name for name in images.class_names if name not in names]:
        raise SourceError(
            f"{len(strangers)} classes that the untrusted set does not have ({strangers[0]!a}, ...); expected some of "
            f"{', '.join(map(ascii, names[:8]))}"
        )
    places = torch.tensor([names.index(name) for name in images.class_names], device=images.device)
    return replace(images, labels=places[images.labels], num_classes=len(names), class_names=names)


def _in_order(images: Images, names: Sequence[str] | None) -> Images:
    """Return a set with its labels in the order of these names."""
    if names is None:
        return images
    moved = torch.tensor(check_class_names(images.class_names, names), device=images.labels.device)
    return replace(images, labels=moved[images.labels], class_names=tuple(names))
