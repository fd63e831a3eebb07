"""What every verb does around its method: the model and the data opened, a scan handed over, benign references to compare
with, and the call written down."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lustral.api.data import Data, named
from lustral.api.fitting import found_order
from lustral.api.models import as_loaded, own_copy
from lustral.api.opening import GivenData, Opened, model_file, open_file, open_module
from lustral.api.results import EraseResult, ScanResult, run_record
from lustral.api.set_results import TrainResult
from lustral.api.training_sets import open_training_set
from lustral.core.digests import weights_digest
from lustral.core.randomness import child
from lustral.core.records import OnProgress
from lustral.training import Trainer, default_trainer
from lustral.vision.images import require_usable
from lustral.vision.interfaces import Detector
from lustral.vision.models import Classifier, LoadedModel, load_model
from lustral.vision.models.files.contents import ONNX, SAFETENSORS, SCRIPT_SUFFIXES, TORCH_SUFFIXES
from lustral.vision.models.files.hub_folder import is_hub_folder
from lustral.vision.models.files.safety import FileFacts
from lustral.vision.records import DefenderView, ImageSet, Verdict
from lustral.vision.scanning import References, require_deadline, scan_references
from lustral.vision.sources import in_class_order
from lustral.vision.verdict_files import VerdictError, read_verdict
from lustral.vision.victims import untrained_classifier

Place: TypeAlias = str | os.PathLike[str]
Model: TypeAlias = nn.Module | LoadedModel | EraseResult | TrainResult | Place
"""Any network, from images (B, C, H, W) to logits; what ``open_model`` returned; a result that holds a model; a path."""

ReferenceModels: TypeAlias = Sequence[Model] | Place
"""Benign models in any of these forms, or a folder of them."""

MODEL_ENDINGS = (SAFETENSORS, *TORCH_SUFFIXES, *SCRIPT_SUFFIXES, ONNX)  # the last are refused, not passed over
LEAST_PER_CLASS = 100  # images in the mean, that a reference is trained on

Device: TypeAlias = torch.device | str | None
Size: TypeAlias = int | Sequence[int] | None
Names: TypeAlias = Place | Sequence[str] | None


def opened_for(
    model: Model,
    data: Data,
    given: GivenData,
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    seed: int,
    device: Device,
) -> Opened:
    """Open a model in any form with its clean images."""
    if isinstance(model, EraseResult | TrainResult):
        model = model.model
    if isinstance(model, str | os.PathLike):
        place = torch.device("cpu" if device is None else device)
        written = {"arch": None, "mean": mean, "std": std, "weights": None}
        return open_file(Path(model), data, given=given, written=written, seed=seed, device=place)
    if not isinstance(model, nn.Module | LoadedModel):
        raise TypeError(
            "expected a torch.nn.Module, what lustral.open_model returned, or the path of a model file; got "
            f"{type(model).__name__}"
        )
    return open_module(model, data, given=given, mean=mean, std=std, seed=seed, device=device)


def granted(
    view: DefenderView, verdict: ScanResult | Verdict | Place | None, untrusted: Data | None, given: GivenData
) -> DefenderView:
    """Return what a purifier may look at: a view with the scan and the training set that were handed over."""
    if isinstance(verdict, str | os.PathLike):
        view = replace(view, verdict=read_verdict(Path(verdict), view))
    elif isinstance(verdict, ScanResult):
        if weights_digest(verdict.model) != weights_digest(view.model):
            raise VerdictError("this verdict is of another model, by the digest of its weights; scan this one")
        view = replace(view, verdict=on_device(verdict.verdict, view.clean.device))
    elif verdict is not None:
        view = replace(view, verdict=on_device(verdict, view.clean.device))
    if untrusted is None:
        return view
    training_set = open_training_set(untrusted, view.clean, image_size=given.image_size, resize=given.resize)
    return replace(view, untrusted=training_set)


def compared_models(
    opened: Opened,
    detector: Detector,
    *,
    references: ReferenceModels | None,
    train_references: int | None,
    written: Mapping[str, Any],
    seed: int,
    how: Mapping[str, Any],
    max_time: float | None = None,
    on_progress: OnProgress | None = None,
) -> References | None:
    """Scan benign models, the user's or some that are trained here, before the suspect is; None where none are asked for.

    Args:
        opened: the suspect and the clean images, which every reference is scanned with.
        detector: of the suspect.
        references: the user's benign models.
        train_references: how many to train.
        written: how to read files, as those of the suspect.
        seed: of the scan; references that are trained derive from it too.
        how: how the scan is made, JSON-ready.
        max_time: of each scan.
        on_progress: called on the way.

    Raises:
        ValueError: both or none of the two kinds, a model that cannot serve (the message names it), or too few images to train.
    """
    require_deadline(detector, max_time)
    if references is None and train_references is None:
        return None
    if references is not None and train_references is not None:
        raise ValueError("expected references or train_references, not both: ranks are among models of one origin")
    if references is not None:
        given = listed_references(references)
        views, count = reference_views(given, opened, written), len(given)
    else:
        assert train_references is not None
        trainer, images = training_of_references(opened, train_references, seed=seed)
        views = trained_views(opened, trainer, images, train_references, seed=seed, on_progress=on_progress)
        count = train_references
    return scan_references(
        detector,
        views,
        count,
        suspect=weights_digest(opened.view.model),
        stream=lambda: child(seed, "scan"),
        how=how,
        max_time=max_time,
        on_progress=on_progress,
    )


def listed_references(references: ReferenceModels) -> list[tuple[str, Model]]:
    """Return the name and the model of each reference; of a folder, its model files and model folders in order.

    Raises:
        ValueError: there are none.
    """
    if not isinstance(references, str | os.PathLike):
        named = [os.fspath(each) if isinstance(each, str | os.PathLike) else None for each in references]
        found: list[tuple[str, Model]] = [
            (name or f"number {number}", each)
            for number, (name, each) in enumerate(zip(named, references, strict=True), start=1)
        ]
    else:
        folder = Path(references)
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder of benign reference models")
        found = [(str(path), path) for path in sorted(folder.iterdir()) if is_model_place(path)]
    if not found:
        where = f"in {os.fspath(references)} " if isinstance(references, str | os.PathLike) else ""
        raise ValueError(
            f"expected benign reference models {where}({SAFETENSORS}, {', '.join(TORCH_SUFFIXES)}, or model folders); got none"
        )
    return found


def is_model_place(path: Path) -> bool:
    """Say whether a path looks like a model: a file with a known ending, or a folder of a hub or of ``lustral implant``."""
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return (path / "victim.json").is_file() or is_hub_folder(path)
    return path.suffix in MODEL_ENDINGS


def reference_views(
    given: Sequence[tuple[str, Model]], opened: Opened, written: Mapping[str, Any]
) -> Iterator[tuple[str, DefenderView]]:
    """Open reference models one after the other, with the clean images of the suspect in each one's order of the classes."""
    clean = opened.view.clean
    for name, model in given:
        try:
            loaded = opened_reference(model, opened, written)
            if (loaded.num_classes, loaded.image_shape) != (clean.num_classes, clean.image_shape):
                raise ValueError(
                    f"it knows {loaded.num_classes} classes of images {loaded.image_shape}; the model to be scanned knows "
                    f"{clean.num_classes} of {clean.image_shape}"
                )
            names = found_order(loaded, clean)
            images = clean if names is None else in_class_order(clean, names)
        except (ValueError, OSError) as error:
            raise ValueError(f"reference {name}: {error}") from error
        yield name, DefenderView(model=loaded.model.to(clean.device), clean=images.to(clean.device))


def opened_reference(model: Model, opened: Opened, written: Mapping[str, Any]) -> LoadedModel:
    """Open one reference: a file as the suspect's is read, a network in memory behind the suspect's normalisation."""
    clean = opened.view.clean
    if isinstance(model, EraseResult | TrainResult):
        model = model.model
    if isinstance(model, str | os.PathLike):
        file = model_file(Path(model))
        if not file.exists():
            raise FileNotFoundError(2, "no such model file", str(file))
        return load_model(file, num_classes=clean.num_classes, image_shape=clean.image_shape, **written)
    if isinstance(model, LoadedModel):
        return model
    own = own_copy(model, clean.device)
    normalise = opened.loaded.model.normalise
    constants = (normalise.mean.flatten().tolist(), normalise.std.flatten().tolist())
    return as_loaded(own, clean.image_shape, (None, None) if isinstance(own, Classifier) else constants)


def training_of_references(opened: Opened, count: int, *, seed: int) -> tuple[Trainer, ImageSet]:
    """Return the recipe and the images that references are trained with: the defender's, without those of the scan.

    Raises:
        ValueError: fewer than one reference, or fewer images than ``LEAST_PER_CLASS`` for each class in the mean.
    """
    if count < 1:
        raise ValueError(f"expected at least one reference to train; got {count}")
    clean = opened.view.clean
    images = opened.source.not_drawn(len(clean), generator=child(seed, "clean"))
    least = LEAST_PER_CLASS * clean.num_classes
    if len(images) < least:
        raise ValueError(
            f"{len(images):,} clean images are left to train references on, beside the {len(clean):,} of the scan; expected at "
            f"least {least:,}, {LEAST_PER_CLASS} for each class: give more images, use fewer in the scan (clean), or give "
            "benign models (references)"
        )
    if clean.class_names and clean.class_names != images.class_names:
        images = in_class_order(images, clean.class_names)
    require_usable(images)
    return default_trainer(flip=opened.source.flip, num_images=len(images)), images.to(clean.device)


def trained_views(
    opened: Opened, trainer: Trainer, images: ImageSet, count: int, *, seed: int, on_progress: OnProgress | None
) -> Iterator[tuple[str, DefenderView]]:
    """Train benign models of the suspect's architecture one after the other, each from weights of its own.

    Raises:
        ValueError: the architecture has no name that a network can be built by.
    """
    for number in range(1, count + 1):
        try:
            fresh = untrained_classifier(
                opened.loaded.arch, images, generator=child(seed, "reference", number, "weights")
            )
        except ValueError as error:
            raise ValueError(
                f"no reference can be trained: {error}; give benign models instead (references)"
            ) from error
        model = trainer.fit(
            fresh,
            images,
            generator=child(seed, "reference", number),
            on_progress=on_progress,
            stage=f"training reference {number} of {count}",
        )
        yield f"trained {number}", DefenderView(model=model, clean=opened.view.clean)


def on_device(verdict: Verdict, device: torch.device) -> Verdict:
    """Return a verdict with its triggers on a device."""
    return replace(verdict, triggers=tuple(trigger.to(device) for trigger in verdict.triggers))


def constants_of(verdict: Any) -> tuple[list[float], list[float]] | tuple[None, None]:
    """Return mean and standard deviation of the classifier that a scan looked at; None where that is not known."""
    if not (isinstance(verdict, ScanResult) and isinstance(verdict.model, Classifier)):
        return None, None
    normalise = verdict.model.normalise
    return normalise.mean.flatten().tolist(), normalise.std.flatten().tolist()


def about(
    opened: Opened,
    command: str,
    model: Model,
    data: Data,
    name: str,
    method: Any,
    seed: int,
    files: Sequence[FileFacts] = (),
) -> dict[str, Any]:
    """Return everything needed to repeat a call, ready for JSON."""
    normalise = opened.loaded.model.normalise
    more: Mapping[str, Any] = {
        "mean": normalise.mean.flatten().tolist(),
        "std": normalise.std.flatten().tolist(),
        "notes": list(opened.notes),
    }
    return run_record(
        opened,
        command=command,
        model=title_of(model, opened),
        data=named(data),
        method=name,
        settings=method,
        seed=seed,
        files=files,
        **more,
    )


def title_of(model: Model, opened: Opened) -> str:
    """Return what a model is called: its path, or the name of its class."""
    if isinstance(model, str | os.PathLike):
        return os.fspath(model)
    if opened.loaded.origin is not None:
        return str(opened.loaded.origin.folder or next(iter(opened.loaded.origin.files)))
    return type(opened.loaded.model.network).__name__


def scan_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a run's record what the scans of its references share with its own."""
    return {name: record.get(name) for name in ("method", "settings", "seed", "data", "clean_images", "max_time")}
