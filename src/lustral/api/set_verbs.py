"""The verbs of the library for training sets of unknown origin: sift, train. Each does what the command of that name does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from lustral.api.data import Data, named
from lustral.api.methods import DEFAULT_SAFE_TRAINER, DEFAULT_SIFTER, chosen, reporting
from lustral.api.set_results import SiftResult, TrainResult, set_record
from lustral.api.training_sets import (
    Architecture,
    GivenSet,
    named_overlap,
    open_test,
    open_untrusted,
)
from lustral.core.randomness import child
from lustral.core.records import OnProgress
from lustral.vision import untrusted
from lustral.vision.evaluation import clean_accuracy
from lustral.vision.interfaces import SafeTrainer, Sifter


def sift(
    data: Data,
    *,
    clean: Data | int | None = None,
    method: str | Sifter = DEFAULT_SIFTER,
    arch: Architecture | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    image_size: int | Sequence[int] | None = None,
    resize: int | None = None,
    flip: bool | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    on_progress: OnProgress | None = None,
) -> SiftResult:
    """Find the suspicious images of a training set of unknown origin.

    Args:
        data: the set, see ``lustral.api.data.Data``.
        clean: images that nobody could have poisoned, in any of these forms; or, of a known name, how many of its reserve.
        method: a name, or a sifter with its settings.
        arch: network to train for it: a name, or a function that returns a new network; None goes by the size of the images.
        classes: names of the classes in the order of their numbers, or a file of them; None keeps the data's.
        image_size: pixels to resize the images to: the side of a square, or height and width.
        resize: scale the shorter side to this many pixels first, and cut ``image_size`` out of the middle.
        flip: whether a mirrored image keeps its meaning; None: as known of the data, else yes.
        seed: every random draw derives from it.
        device: where to work; None is the CPU.
        progress: show progress on standard error.
        on_progress: called on the way.

    Returns:
        A score and a flag for each image: to show and to save.

    Raises:
        OverlapError: images of the clean set are in the set.
        ValueError: the set cannot be read or sifted.
    """
    name, sifter = chosen("sifter", method)
    given = GivenSet(
        data=data, clean=clean, classes=classes, image_size=image_size, resize=resize, flip=flip, arch=arch
    )
    place = torch.device("cpu" if device is None else device)
    opened = open_untrusted(given, seed=seed, device=place)
    with reporting(on_progress, progress) as report, named_overlap(opened):
        found = untrusted.sift(sifter, opened.view, generator=child(seed, "sift"), on_progress=report)
    return SiftResult(
        sifted=replace(found, notes=(*opened.opening_notes, *found.notes)),
        opened=opened,
        title=named(data),
        method=name,
        about=set_record(
            opened,
            command="lustral.sift",
            data=named(data),
            clean=None if clean is None else named(clean),
            method=name,
            settings=sifter,
            seed=seed,
            device=str(place),
        ),
    )


def train(
    data: Data,
    *,
    clean: Data | int | None = None,
    test: Data | None = None,
    method: str | SafeTrainer = DEFAULT_SAFE_TRAINER,
    arch: Architecture | None = None,
    classes: str | os.PathLike[str] | Sequence[str] | None = None,
    image_size: int | Sequence[int] | None = None,
    resize: int | None = None,
    flip: bool | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train a model on a set of unknown origin without learning its backdoor.

    Args:
        data: the set, see ``lustral.api.data.Data``.
        clean: images that nobody could have poisoned, in any of these forms; or, of a known name, how many of its reserve.
        test: images to measure the model on, which the method never sees; None is the test split of the data, if there is one.
        method: a name, or a safe trainer with its settings.
        arch: network to train: a name, or a function that returns a new network; None goes by the size of the images.
        classes: as for ``sift``, and so are ``image_size``, ``resize``, ``flip``, ``seed``, ``device``, ``progress`` and
            ``on_progress``.

    Returns:
        The model, and how it came about: to show and to save.

    Raises:
        OverlapError: images of the clean set are in the set.
        ValueError: the set cannot be read or learnt from.
        ArithmeticError: training came to nothing.
    """
    name, trainer = chosen("safe trainer", method)
    given = GivenSet(
        data=data, clean=clean, classes=classes, image_size=image_size, resize=resize, flip=flip, arch=arch
    )
    place = torch.device("cpu" if device is None else device)
    opened = open_untrusted(given, seed=seed, device=place)
    unseen = opened.test if test is None else open_test(test, opened, given)
    with reporting(on_progress, progress) as report, named_overlap(opened):
        trained = untrusted.train(trainer, opened.view, generator=child(seed, "train"), on_progress=report)
    result = TrainResult(
        trained=replace(trained, notes=(*opened.opening_notes, *trained.notes)),
        opened=opened,
        title=named(data),
        method=name,
        about=set_record(
            opened,
            command="lustral.train",
            data=named(data),
            clean=None if clean is None else named(clean),
            method=name,
            settings=trainer,
            seed=seed,
            device=str(place),
        ),
        is_named=arch is None or isinstance(arch, str),
    )
    if unseen is None:
        return result
    return replace(result, accuracy=clean_accuracy(result.model, unseen.to(place)))
