"""Whether a model and images fit each other: their channels, size, number of classes, and the order of these."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lustral.vision.models import LoadedModel, load_model
from lustral.vision.records import ImageSet
from lustral.vision.sources import ClassNamesError, DataSource, check_class_names, names_nothing, source_with_channels

logger = logging.getLogger(__name__)

READABLE_CHANNELS = (1, 3)  # grey and RGB
OTHER_CHANNELS = (2, 4)  # with transparency: tried only to say so


def found_order(loaded: LoadedModel, clean: ImageSet) -> tuple[str, ...] | None:
    """Return the names of the classes that a model's file tells, if they are those of the data; None where it tells none."""
    names: tuple[str, ...] = tuple(loaded.class_names or ())
    if not names or names_nothing(names) or not clean.class_names or names_nothing(clean.class_names):
        return None
    try:
        check_class_names(clean.class_names, names)
    except ClassNamesError as error:
        logger.warning("%s; labels are taken in the data's order: --classes FILE tells the model's", error)
        return None
    return names


def load_fitting(file: Path, source: DataSource, written: Mapping[str, Any]) -> tuple[LoadedModel, DataSource]:
    """Open a model file for a source's images, and return the source with the channels that the network takes.

    Args:
        file: the model file.
        source: where the images come from.
        written: how to read the file: arguments of ``load_model``.

    Raises:
        ValueError: the model does not fit the images, whether they are grey or RGB.
    """
    channels, height, width = source.train.image_shape

    def load(channels: int) -> LoadedModel:
        return load_model(file, num_classes=source.train.num_classes, image_shape=(channels, height, width), **written)

    try:
        return load(channels), source
    except ValueError as error:
        for other in sorted({*READABLE_CHANNELS, *OTHER_CHANNELS} - {channels}):
            with _unheard("lustral.vision.models.checkpoint"):  # it has been said once
                try:
                    loaded = load(other)
                except ValueError:
                    continue
            if other in READABLE_CHANNELS:
                return loaded, source_with_channels(source, other)
            raise ValueError(
                f"{file}: its network takes images of {other} channels; expected 1 (grey) or 3 (RGB), which is how images "
                "are read: put a layer in front of it that makes its channels of these"
            ) from error
        raise


@contextlib.contextmanager
def _unheard(name: str) -> Iterator[None]:
    """Drop what a module logs."""
    logger = logging.getLogger(name)

    def drop(_: logging.LogRecord) -> bool:
        return False

    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


def require_shape(loaded: LoadedModel, source: DataSource) -> None:
    """Raise ``ValueError`` where images have another size than a model was opened for."""
    wanted, got = loaded.image_shape, source.train.image_shape
    if wanted != got:
        raise ValueError(
            f"the model was opened for images of shape {wanted}; the data have {got}: give image_size={wanted[1:]} here, or "
            f"image_shape={got} to lustral.open_model"
        )


def with_classes(source: DataSource, num_classes: int) -> DataSource:
    """Return a source with the classes of a model: data that do not name their classes may show only some of them.

    Raises:
        ValueError: the data have other classes than the model has logits.
    """
    own = source.train.num_classes
    if own == num_classes:
        return source
    if source.train.class_names or own > num_classes or not isinstance(source.train, ImageSet):
        raise ValueError(
            f"the model gives {num_classes} logits, one per class; the data have {own} classes: give images of the classes that "
            "it knows, with an empty folder for each class without images"
        )
    test = None if source.test is None else replace(source.test, num_classes=num_classes)
    return replace(source, train=replace(source.train, num_classes=num_classes), test=test)
