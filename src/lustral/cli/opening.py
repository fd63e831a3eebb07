"""From the names on a command line to what a defence works on: a device, a model, and a clean set that fits it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from lustral.cli.arguments import FileFormat, Suspect
from lustral.core.randomness import child
from lustral.vision.models import LoadedModel, load_model
from lustral.vision.models.files.hub_folder import image_size_of, is_hub_folder
from lustral.vision.records import DefenderView, ImageSet, Trigger, Victim
from lustral.vision.sources import (
    ClassNamesError,
    DataSource,
    check_class_names,
    in_class_order,
    load_source,
    names_nothing,
    read_class_names,
    source_with_channels,
)
from lustral.vision.victim_files import read_record
from lustral.vision.victims import NoTrigger, VictimError, load_victim

logger = logging.getLogger(__name__)

READABLE_CHANNELS = (1, 3)  # grey and RGB
OTHER_CHANNELS = (2, 4)  # with transparency: tried only to say so
MOST_CLEAN = 2_500  # images used when --clean is left out: 5 % of CIFAR-10, as in the papers


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to examine, with what is known about it.

    Attributes:
        loaded: the model and how its file was written.
        view: the model and the clean set, on the chosen device: all that a defence sees.
        source: where the clean images come from.
        test: test images for the evaluator, with labels in the model's order, where the source has some.
        victim: the true trigger, for the evaluator and the report, when the model is a victim folder.
    """

    loaded: LoadedModel
    view: DefenderView
    source: DataSource
    test: ImageSet | None
    victim: Victim | None

    @property
    def true_trigger(self) -> Trigger | None:
        """The attacker's trigger, where it is known that there is one."""
        return None if self.victim is None or isinstance(self.victim.trigger, NoTrigger) else self.victim.trigger


def pick_device(name: str) -> torch.device:
    """Return the device a user named; "auto" is a GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's own ways of saying no
        reason = str(error).partition("\n")[0]
        raise ValueError(f"the device {name!r} cannot be used: {reason}; try --device cpu") from error
    return device


def model_file(path: Path) -> Path:
    """Return what a path stands for: itself, a file or a folder of a model hub, or the model file inside a victim folder."""
    if not path.is_dir():
        return path
    if (path / "victim.json").is_file():
        read_record(path)  # the model is the one that the record was written with
        return path / "model.safetensors"
    if is_hub_folder(path):
        return path
    raise VictimError(
        f"{path} is a folder without victim.json: name a model file, a folder of `lustral implant`, or one with config.json "
        "and weights, as model hubs have them"
    )


def draw_clean(source: DataSource, count: int | None, *, seed: int) -> ImageSet:
    """Draw the defender's images, classes in proportion.

    Args:
        source: its images for defenders are drawn from.
        count: number of images; None takes all there are up to 2,500.
        seed: of the draw.

    Raises:
        ValueError: there are not so many, or they show fewer than two classes.
    """
    available = len(source.defender_indices())
    wanted = min(MOST_CLEAN, available) if count is None else count
    if not 1 <= wanted <= available:
        raise ValueError(
            f"expected between 1 and {available} clean images, which is what {source.name} has for the defender; "
            f"got {wanted}: change --clean"
        )
    clean = source.draw_clean(wanted, generator=child(seed, "clean"))
    if int(torch.bincount(clean.labels).count_nonzero()) < 2:
        raise ValueError(
            f"the {len(clean)} clean images all show class {int(clean.labels[0])}; expected at least 2 classes: "
            "give more of them, or raise --clean"
        )
    return clean


def open_suspect(suspect: Suspect, *, seed: int, device: torch.device) -> Opened:
    """Open the model and the data, check that they fit each other, and build the defender's view."""
    file = model_file(suspect.model)
    if not file.exists():
        raise FileNotFoundError(2, "no such model file", str(file))
    size = suspect.image_size or image_size_of(file)
    source = load_source(suspect.data, image_size=size, resize=suspect.resize, stream=None)
    names = None if suspect.classes is None else read_class_names(suspect.classes)
    if names is not None and len(names) != source.train.num_classes:  # the model would be refused in other words
        check_class_names(source.train.class_names, names)
    loaded, source = load_fitting(file, source, suspect.format)
    clean = draw_clean(source, suspect.clean, seed=seed)
    test = source.test
    names = names or found_order(loaded, clean)
    if names is not None:
        clean, test = in_class_order(clean, names), None if test is None else in_class_order(test, names)
    victim = load_victim(suspect.model, arch=suspect.format.arch) if (suspect.model / "victim.json").is_file() else None
    view = DefenderView(model=loaded.model.to(device), clean=clean.to(device))
    return Opened(loaded=loaded, view=view, source=source, test=test, victim=victim)


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


def load_fitting(file: Path, source: DataSource, written: FileFormat) -> tuple[LoadedModel, DataSource]:
    """Open a model file for a source's images, and return the source with the channels that the network takes.

    Args:
        file: the model file.
        source: where the images come from.
        written: how to read the file.

    Raises:
        ValueError: the model does not fit the images, whether they are grey or RGB.
    """
    channels, height, width = source.train.image_shape

    def load(channels: int) -> LoadedModel:
        return load_model(
            file, num_classes=source.train.num_classes, image_shape=(channels, height, width), **vars(written)
        )

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


def require_test_set(source: DataSource) -> ImageSet:
    """Return the test set, which no defence sees."""
    if source.test is None:
        raise ValueError(
            f"{source.name} has no test set; expected one, which no defence sees: test_images and test_labels in an "
            ".npz file, or folders train/ and test/"
        )
    return source.test


def prepare_folder(folder: Path) -> Path:
    """Make the folder for results before the work starts, so that a bad path fails at once."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder
