"""From what a user names or holds to what a defence works on: a model, and a clean set that fits it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lustral.api.data import Constants, Data, OpenedData, open_data
from lustral.api.fitting import found_order, load_fitting, require_shape, with_classes
from lustral.api.models import as_loaded, fit_channels, own_copy, with_guessed_normalisation
from lustral.core.randomness import child
from lustral.vision.models import Classifier, LoadedModel
from lustral.vision.models.files.hub_folder import image_size_of, is_hub_folder
from lustral.vision.records import DefenderView, ImageSet, Trigger, Victim
from lustral.vision.sources import (
    DataSource,
    check_class_names,
    in_class_order,
    read_class_names,
    source_with_channels,
)
from lustral.vision.victim_files import read_record
from lustral.vision.victims import NoTrigger, VictimError, load_victim

MOST_CLEAN = 2_500  # images used when --clean is left out: 5 % of CIFAR-10, as in the papers


@dataclass(frozen=True, kw_only=True)
class GivenData:
    """What is known about clean images.

    Attributes:
        clean: how many to use, drawn by class in proportion; None takes all there are up to 2,500.
        classes: names of the classes in the model's order, or a file of them; None keeps the data's.
        image_size: pixels to resize to: the side of a square, or height and width.
        resize: scale the shorter side to this many pixels first, and cut ``image_size`` out of the middle.
    """

    clean: int | None = None
    classes: str | os.PathLike[str] | Sequence[str] | None = None
    image_size: int | Sequence[int] | None = None
    resize: int | None = None

    def names_for(self, source: DataSource) -> tuple[str, ...] | None:
        """Return the names of the classes in the model's order, which must be those of a source; None where none are given."""
        if self.classes is None:
            return None
        names = class_order(self.classes)
        if len(names) != source.train.num_classes:  # the model would be refused in other words
            check_class_names(source.train.class_names, names)
        return names


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model to examine, with what is known about it.

    Attributes:
        loaded: the model and how its file was written.
        view: the model and the clean set, on the chosen device: all that a defence sees.
        source: where the clean images come from.
        test: test images for the evaluator, with labels in the model's order, where the source has some.
        victim: the true trigger, for the evaluator and the report, when the model is a victim folder.
        notes: sentences on what was guessed or changed on the way.
    """

    loaded: LoadedModel
    view: DefenderView
    source: DataSource
    test: ImageSet | None
    victim: Victim | None
    notes: tuple[str, ...] = ()

    @property
    def true_trigger(self) -> Trigger | None:
        """The attacker's trigger, where it is known that there is one."""
        return None if self.victim is None or isinstance(self.victim.trigger, NoTrigger) else self.victim.trigger


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


def open_file(
    model: Path, data: Data, *, given: GivenData, written: Mapping[str, Any], seed: int, device: torch.device
) -> Opened:
    """Open a model file and the data, check that they fit each other, and build the defender's view.

    Args:
        model: the file, or a folder of a model hub or of ``lustral implant``.
        data: clean images in any form.
        given: what is known about them.
        written: how to read the file: ``arch``, ``mean``, ``std`` and ``weights`` of ``load_model``.
        seed: of the draw of clean images.
        device: where to work.
    """
    file = model_file(model)
    if not file.exists():
        raise FileNotFoundError(2, "no such model file", str(file))
    size = given.image_size or image_size_of(file)
    found = open_data(data, image_size=size, resize=given.resize, constants=known_constants(written))
    names = given.names_for(found.source)
    loaded, source = load_fitting(file, found.source, written)
    found = replace(found, source=source)
    victim = load_victim(model, arch=written.get("arch")) if (model / "victim.json").is_file() else None
    return view_of(loaded, found, given, names, seed=seed, device=device, victim=victim)


def view_of(
    loaded: LoadedModel,
    found: OpenedData,
    given: GivenData,
    names: tuple[str, ...] | None,
    *,
    seed: int,
    device: torch.device,
    victim: Victim | None = None,
) -> Opened:
    """Draw the clean images, bring their labels into the model's order, and build the defender's view."""
    clean, test = draw_clean(found.source, given.clean, seed=seed), found.source.test
    names = names or found_order(loaded, clean)
    if names is not None:
        clean, test = in_class_order(clean, names), None if test is None else in_class_order(test, names)
    view = DefenderView(model=loaded.model.to(device), clean=clean.to(device))
    return Opened(loaded=loaded, view=view, source=found.source, test=test, victim=victim, notes=found.notes)


def open_module(
    model: nn.Module | LoadedModel,
    data: Data,
    *,
    given: GivenData,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int,
    device: torch.device | str | None = None,
) -> Opened:
    """Open the data for a model that is in memory, check that they fit each other, and build the defender's view.

    Args:
        model: any network, which is copied, or what ``load_model`` returned.
        data: clean images in any form.
        given: what is known about them.
        mean: per channel on the [0, 1] scale, that the network expects to be subtracted; None is guessed, and said.
        std: likewise, that it expects to be divided by.
        seed: of the draw of clean images.
        device: where to work; None is where the model is.

    Raises:
        ValueError: model and images do not fit each other.
    """
    if (mean is None) != (std is None):
        raise ValueError("expected mean and std together, one number per channel each; got one of the two")
    opened = isinstance(model, LoadedModel)
    size = given.image_size
    if size is None and isinstance(model, LoadedModel) and model.origin and model.origin.folder:
        size = model.image_shape[1:]  # as for a folder that is given by its path
    own = model.model if isinstance(model, LoadedModel) else own_copy(model, device)
    found = open_data(
        data,
        image_size=size,
        resize=given.resize,
        constants=known_constants({"mean": mean, "std": std}, own),
    )
    names = given.names_for(found.source)
    if isinstance(model, LoadedModel):
        if mean is not None:
            raise ValueError("an opened model has its normalisation: give mean and std to lustral.open_model")
        loaded, source = model, source_with_channels(found.source, model.image_shape[0])
        require_shape(loaded, source)
    else:
        source = fit_channels(own.network if isinstance(own, Classifier) else own, found.source)
        loaded = as_loaded(own, source.train.image_shape, (mean, std))
    source = with_classes(source, loaded.num_classes)
    place = next((part.device for part in own.parameters()), torch.device("cpu")) if device is None else device
    found = replace(found, source=source)
    result = view_of(loaded, found, given, names, seed=seed, device=torch.device(place))
    if mean is not None or opened or isinstance(own, Classifier):
        return result
    loaded, note = with_guessed_normalisation(loaded, result.view.clean)
    view = replace(result.view, model=loaded.model)
    return replace(result, loaded=loaded, view=view, notes=(*result.notes, note))


def known_constants(given: Mapping[str, Any], model: nn.Module | None = None) -> Constants | None:
    """Return the mean and standard deviation that images may have gone through: those given, or else a classifier's own."""
    if given.get("mean") is not None and given.get("std") is not None:
        return given["mean"], given["std"]
    if isinstance(model, Classifier):
        mean, std = (part.flatten().tolist() for part in (model.normalise.mean, model.normalise.std))
        return mean, std
    return None


def class_order(classes: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes in a file, or those given."""
    if isinstance(classes, str | os.PathLike):
        return read_class_names(Path(classes))
    return tuple(classes)


def require_victims_images(victim: Victim, images: ImageSet, name: str) -> None:
    """Raise ``ValueError`` unless images are like those that a victim was made from."""
    expected = victim.provenance["num_classes"], tuple(victim.provenance["image_shape"])
    if expected != (images.num_classes, images.image_shape):
        raise ValueError(
            f"the victim knows {expected[0]} classes of images {expected[1]}; {name} has {images.num_classes} of "
            f"{images.image_shape}: choose the --data it was made from, with the same --image-size and --resize"
        )


def require_test_set(source: DataSource) -> ImageSet:
    """Return the test set, which no defence sees."""
    if source.test is None:
        raise ValueError(
            f"{source.name} has no test set; expected one, which no defence sees: test_images and test_labels in an "
            ".npz file, or folders train/ and test/"
        )
    return source.test
