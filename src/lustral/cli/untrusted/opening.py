"""From the names on a command line to a training set of unknown origin, and to how long work on it takes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Generator, nn
from torch.nn import functional as F

from lustral.cli.opening import draw_clean
from lustral.cli.parsing import UsageError
from lustral.cli.untrusted.arguments import UntrustedData
from lustral.core.randomness import child
from lustral.report.words import count, duration
from lustral.training.modes import autocast
from lustral.vision.images import at_most, channel_statistics, stratified_indices
from lustral.vision.models import build_classifier
from lustral.vision.records import ImageSet, LabelledImages, TrainingView
from lustral.vision.sources import (
    DataSource,
    FolderStream,
    SourceError,
    check_class_names,
    load_source,
    read_class_names,
    source_names,
)
from lustral.vision.sources.checks import memory_limit
from lustral.vision.untrusted import OverlapError, file_names, find_overlap

Images = TypeVar("Images", bound=ImageSet | FolderStream)
SMALL_SIDE = 20  # pixels below which the default network is the small one
STATISTICS_SAMPLE = 2_000  # images whose mean and spread the network's normalisation takes
TIMED_BATCH = 128
TIMED_SECONDS = 1.0  # of steps behind an estimate
LONG_SECONDS = 60.0  # from which it is said beforehand how long something takes
SHORT_WORK = 1e7  # numbers of images passed through a network that never take a minute: nothing is measured for them
LARGE_SIDE = 64  # pixels from which a smaller --image-size is suggested


@dataclass(frozen=True, kw_only=True)
class OpenedSet:
    """A training set of unknown origin, opened.

    Attributes:
        source: where it comes from.
        view: all that a method sees.
        names: N names of the images: their files, relative to the set's folder, or their positions.
        files: N paths of the images, where each is a file; else empty.
        arch: architecture to train.
        test: images to measure a trained model on, which no method sees.
        dropped_clean: clean images left out because the untrusted part of the same set has them too.
    """

    source: DataSource
    view: TrainingView
    names: tuple[str, ...]
    files: tuple[str, ...]
    arch: str
    test: ImageSet | None
    dropped_clean: int = 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of all classes; their numbers where they have none."""
        data = self.view.untrusted
        return data.class_names or tuple(str(label) for label in range(data.num_classes))

    @property
    def unreadable_names(self) -> tuple[str, ...]:
        """Names of the pictures that were left out."""
        return tuple(os.path.relpath(entry.file, self.source.folder) for entry in self.source.unreadable)


def open_untrusted(given: UntrustedData, *, seed: int, device: torch.device) -> OpenedSet:
    """Open a training set, and the clean images beside it."""
    source = load_source(
        given.data, image_size=given.image_size, resize=given.resize, stream=None, skip_unreadable=True
    )
    order = None if given.classes is None else read_class_names(given.classes)
    train, files, clean, dropped = source.train, source.files, None, 0
    if given.clean is not None and given.clean.isdecimal() and not Path(given.clean).exists():
        train, clean, dropped = _reserve(given, source, seed=seed)
        files = ()
    elif given.clean is not None:
        clean = _clean_set(given, source, seed=seed)
    untrusted = _in_order(train, order)
    clean = None if clean is None else _in_order(_like(clean, train), order).to(device)
    names = tuple(os.path.relpath(file, source.folder) for file in files) or tuple(map(str, range(len(train))))
    arch = given.arch or ("small_cnn" if max(train.image_shape[1:]) < SMALL_SIDE else "preact_resnet18:width=16")
    flip = source.flip if given.flip is None else given.flip
    view = TrainingView(
        untrusted=untrusted.to(device) if isinstance(untrusted, ImageSet) else untrusted,
        build_model=model_builder(arch, untrusted, device),
        clean=clean,
        flip=flip,
    )
    view.build_model(child(seed, "trial"))  # so that a wrong --arch fails now
    test = None if source.test is None else _in_order(source.test, order)
    return OpenedSet(source=source, view=view, names=names, files=files, arch=arch, test=test, dropped_clean=dropped)


def open_training_set(spec: str, clean: ImageSet, *, image_size: Any, resize: int | None) -> LabelledImages:
    """Open the set that a model was trained on, for a purifier that looks at it: with the classes and the shape of clean images.

    Raises:
        ValueError: it has other classes or another shape, or holds some of the clean images (``OverlapError``).
    """
    channels, height, width = clean.image_shape
    size = image_size or (height, width)
    source = load_source(spec, image_size=size, resize=resize, channels=channels, stream=None, skip_unreadable=True)
    train = source.train
    if spec in source_names():  # what the clean images were drawn from is no part of it
        train = source.training_split()[0]
    names = tuple(clean.class_names)
    if names and train.class_names and set(names) == set(train.class_names):
        train = _in_order(train, names)
    if (train.num_classes, train.image_shape) != (clean.num_classes, clean.image_shape):
        raise SourceError(
            f"expected a training set like the clean images, {clean.image_shape} in {clean.num_classes} classes; {spec} has "
            f"{train.image_shape} in {train.num_classes}"
        )
    if overlap := find_overlap(train, clean):
        if spec not in source_names():
            raise OverlapError(overlap, file_names(train))
        is_other = torch.ones(len(train), dtype=torch.bool)  # a known set may hold an image twice
        is_other[overlap] = False
        train = train.subset(is_other)
    return train.to(clean.device) if isinstance(train, ImageSet) else train


def open_test(spec: str, opened: OpenedSet, given: UntrustedData) -> ImageSet:
    """Open images to measure a trained model on: a set's test split, or all of a set without one."""
    source = _load_like(spec, opened.source, given)
    if source.test is not None:
        return _like(source.test, opened.view.untrusted)
    loaded = source.train if isinstance(source.train, ImageSet) else source.train.load()
    return _like(loaded, opened.view.untrusted)


def model_builder(arch: str, data: LabelledImages, device: torch.device) -> Any:
    """Return what makes an untrained classifier on a device, its weights drawn from a stream."""
    mean, std = channel_statistics(_sample(data))

    def build(generator: Generator) -> nn.Module:
        return build_classifier(
            arch,
            num_classes=data.num_classes,
            image_shape=data.image_shape,
            mean=mean,
            std=std,
            generator=generator,
        ).to(device)

    return build


def _sample(data: LabelledImages) -> ImageSet:
    if isinstance(data, ImageSet):
        return at_most(data, STATISTICS_SAMPLE)
    fitting = memory_limit() // (2 * math.prod(data.image_shape))
    wanted = max(min(STATISTICS_SAMPLE, len(data), fitting), 1)
    chosen, _ = stratified_indices(data.labels, data.num_classes, wanted, generator=child(0, "statistics"))
    part = data.subset(chosen)
    assert isinstance(part, FolderStream)
    return part.load()


def _reserve(given: UntrustedData, source: DataSource, *, seed: int) -> tuple[ImageSet, ImageSet, int]:
    """Divide a known set into (the untrusted rest, clean images of its reserve, how many of these the rest has too)."""
    if given.data not in source_names():
        raise UsageError(
            f"--clean {given.clean} takes clean images from the reserve of a known set ({', '.join(source_names())}); "
            "nobody knows which of your own images are clean: give a folder or file of images that you trust"
        )
    rest, _ = source.training_split()
    clean = draw_clean(source, int(given.clean or 0), seed=seed)
    twice = find_overlap(clean, rest)
    is_new = torch.ones(len(clean), dtype=torch.bool)
    is_new[twice] = False
    return rest, clean.subset(is_new), len(twice)


def _clean_set(given: UntrustedData, source: DataSource, *, seed: int) -> ImageSet:
    assert given.clean is not None
    return draw_clean(_load_like(given.clean, source, given), None, seed=seed)


def _load_like(spec: str, source: DataSource, given: UntrustedData) -> DataSource:
    """Open another set at the size and with the channels of the untrusted one."""
    channels, height, width = source.train.image_shape
    size = given.image_size or ((height, width) if spec in source_names() else None)
    return load_source(spec, image_size=size, resize=given.resize, channels=channels, stream=None)


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


def expected_passes(method: Any, num_images: int) -> float:
    """Return about how many image passes a method takes, by its own account."""
    own = getattr(method, "estimated_passes", None)
    return float(own(num_images)) if callable(own) else float(method.cost_passes) * num_images


def seconds_per_pass(view: TrainingView, *, seed: int) -> float:
    """Measure a training step of the view's network on a few of its images, forward and back; seconds per image."""
    model = view.build_model(child(seed, "trial"))
    device = next(model.parameters()).device
    batch = next(iter(view.untrusted.batches(TIMED_BATCH))).to(device)
    inputs = batch.inputs.contiguous(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last).train()
    started, steps = time.perf_counter(), -1  # the first step warms up
    while steps < 1 or time.perf_counter() - started < TIMED_SECONDS / 2:
        if steps == 0:
            started = time.perf_counter()
        with autocast(device):
            loss = F.cross_entropy(model(inputs).float(), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())  # waits for the device
        steps += 1
    return (time.perf_counter() - started) / (max(steps, 1) * len(batch.labels))


def estimate_sentence(seconds: float, passes: float, view: TrainingView) -> str | None:
    """Say how long work takes, where that is more than a minute; None where it is not worth a line."""
    if seconds < LONG_SECONDS:
        return None
    said = f"This takes about {duration(seconds)}: {count(passes)} image passes at {count(passes / seconds)} a second."
    side = max(view.untrusted.image_shape[1:])
    hint = (
        f" The images are {side} pixels wide: --image-size {LARGE_SIDE // 2} is much faster."
        if side >= LARGE_SIDE
        else ""
    )
    return said + hint
