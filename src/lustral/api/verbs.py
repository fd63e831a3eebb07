"""The verbs of the library for models: open, scan, erase, evaluate. Each does what the command of that name does.

Equal seeds give equal results on one device, and the same as the command line's. A model that is given is never changed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lustral.api.calls import (
    Device,
    Model,
    Names,
    Place,
    ReferenceModels,
    Size,
    about,
    compared_models,
    constants_of,
    granted,
    opened_for,
    scan_settings,
    title_of,
)
from lustral.api.data import Data, named
from lustral.api.methods import DEFAULT_DETECTOR, DEFAULT_PURIFIER, chosen, default_detector, reporting
from lustral.api.model_files import given_files, require_copyable
from lustral.api.opening import GivenData, Opened, model_file, require_victims_images
from lustral.api.results import (
    EraseResult,
    EvaluationResult,
    ScanResult,
    defender_accuracies,
    settings_record,
    true_evaluation,
    true_evaluations,
)
from lustral.core.cost import CostMeter
from lustral.core.randomness import child
from lustral.core.rates import Rate
from lustral.core.records import OnProgress
from lustral.vision.erasing import erase as run_eraser
from lustral.vision.erasing import takes_verdict
from lustral.vision.evaluation import Evaluation, check_task
from lustral.vision.evaluation.metrics import NOT_FINITE, accuracy, per_class_accuracy, predict
from lustral.vision.interfaces import Detector, Purifier
from lustral.vision.models import Classifier, LoadedModel, load_model
from lustral.vision.records import ImageSet, Verdict, Victim
from lustral.vision.scanning import against_references, inspect_within
from lustral.vision.sources import in_class_order
from lustral.vision.victims import load_victim

HANDED_OVER = "handed over"  # in the record, of a scan that is in no file


def open_model(
    path: Place,
    *,
    arch: str | None = None,
    num_classes: int | None = None,
    image_shape: tuple[int, int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights: str | None = None,
    device: Device = None,
) -> LoadedModel:
    """Open a model file without running anything that is in it.

    Args:
        path: .safetensors, .pt, .pth and the like; a folder with config.json, as model hubs have them; or one of ``lustral
            implant``.
        arch: architecture, e.g. "torchvision:resnet18", where the file does not say it. FILE.py:function runs that file.
        num_classes: expected number of classes; None: as the weights have.
        image_shape: (C, H, W) of the images in pixels, where the file does not tell.
        mean: per channel on the [0, 1] scale, that the network expects to be subtracted; None: as recorded, else 0.
        std: likewise, that it expects to be divided by; None: as recorded, else 1.
        weights: which set of weights, of a file with several.
        device: where to put it; None is the CPU.

    Returns:
        The classifier, as ``.model``, and what is needed to write its like.

    Raises:
        ValueError: the file is damaged, would need to run code, or does not fit what was asked for.
        OSError: there is no such file.
    """
    loaded = load_model(
        model_file(Path(path)),
        arch=arch,
        num_classes=num_classes,
        image_shape=image_shape,
        mean=mean,
        std=std,
        weights=weights,
    )
    return loaded if device is None else replace(loaded, model=loaded.model.to(device))


def scan(
    model: Model,
    data: Data,
    *,
    method: str | Detector = DEFAULT_DETECTOR,
    max_time: float | None = None,
    references: ReferenceModels | None = None,
    train_references: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    clean: int | None = None,
    classes: Names = None,
    image_size: Size = None,
    resize: int | None = None,
    seed: int = 0,
    device: Device = None,
    progress: bool = False,
    on_progress: OnProgress | None = None,
) -> ScanResult:
    """Look for a backdoor in a model.

    Args:
        model: see ``Model``.
        data: clean images and their labels, see ``lustral.api.data.Data``; of a set with a test split, its reserve.
        method: a name, or a detector with its settings, e.g. ``MaskArea(false_alarm_rate=0.01)``.
        max_time: seconds after which ``cascade`` stops searching; equal seeds need not give equal results then. Labels that were
            not searched are named, and the answer is then never "clean".
        references: benign models of the same classes, or a folder of them: an accusation stands only if it is more than theirs;
            see ``lustral.vision.scanning``. Files are read as the model's; networks in memory get its normalisation.
        train_references: train so many benign models of the same architecture instead, on the images that the scan leaves.
        mean: per channel on the [0, 1] scale, that a network without normalisation expects to be subtracted. Where it is None,
            usual ones are tried on the images, and the result's notes say which was taken.
        std: likewise, that it expects to be divided by.
        clean: how many images to use, drawn by class in proportion; None takes all there are up to 2,500.
        classes: names of the classes in the model's order, or a file of them; None: they are numbered as in the data.
        image_size: pixels to resize the images to: the side of a square, or height and width.
        resize: scale the shorter side to this many pixels first, and cut ``image_size`` out of the middle.
        seed: every random draw derives from it.
        device: where to work; None is where the model is.
        progress: show progress on standard error.
        on_progress: called on the way.

    Returns:
        The verdict, which is "cannot tell" for a model that does not do its task on the images: to show and to save.

    Raises:
        ValueError: the data cannot be read, are out of range, or do not fit the model.
    """
    name, detector = chosen("detector", method)
    given = GivenData(clean=clean, classes=classes, image_size=image_size, resize=resize)
    opened = opened_for(model, data, given, mean=mean, std=std, seed=seed, device=device)
    files = given_files(opened.loaded)
    record = about(opened, "lustral.scan", model, data, name, detector, seed, files)
    if max_time is not None:
        record["max_time"] = max_time
    with reporting(on_progress, progress) as report:
        compared = compared_models(
            opened,
            detector,
            references=references,
            train_references=train_references,
            written={"mean": mean, "std": std},
            seed=seed,
            how=scan_settings(record),
            max_time=max_time,
            on_progress=report,
        )
        verdict = inspect_within(
            detector, opened.view, max_time=max_time, generator=child(seed, "scan"), on_progress=report
        )
    if compared is not None:
        record["references"] = compared.to_dict()
        verdict = against_references(verdict, compared)
    return ScanResult(
        verdict=replace(verdict, notes=(*opened.notes, *verdict.notes)),
        model=opened.view.model,
        clean=opened.view.clean,
        title=title_of(model, opened),
        about=record,
        true_trigger=opened.true_trigger,
        files=files,
    )


def erase(
    model: Model,
    data: Data,
    *,
    verdict: ScanResult | Verdict | Place | None = None,
    method: str | Purifier = DEFAULT_PURIFIER,
    detector: Detector | None = None,
    audit: bool = True,
    max_time: float | None = None,
    untrusted: Data | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    clean: int | None = None,
    classes: Names = None,
    image_size: Size = None,
    resize: int | None = None,
    seed: int = 0,
    device: Device = None,
    progress: bool = False,
    on_progress: OnProgress | None = None,
) -> EraseResult:
    """Erase a backdoor; the model given stays as it is.

    Args:
        model: see ``Model``.
        data: clean images and their labels, as for ``scan``.
        verdict: what ``scan`` returned for this model, or the folder or result.json that it was saved to; None scans first,
            where the method starts from a scan.
        method: a name, or a purifier with its settings, e.g. ``SAU(epochs=20)``.
        detector: scans and audits; None is ``Cascade`` for ``Auto``, and ``MaskArea`` with the method's own search for others.
        audit: scan the new model too, where the method starts from a scan.
        max_time: of the scan, and of the audit again, as for ``scan``.
        untrusted: the set that the model was trained on, for a method that looks at it.
        mean: as for ``scan``; None takes over what ``verdict`` was made with.
        std: likewise.
        clean: as for ``scan``, and so are ``classes``, ``image_size``, ``resize``, ``seed``, ``device``, ``progress`` and
            ``on_progress``.

    Returns:
        The new model with the evidence: to show and to save.

    Raises:
        UnfitModel: the model does not do its task on the clean images; nothing was changed.
        ValueError: the data cannot be read or do not fit the model; the verdict is of another model; the model folder has links.
    """
    name, purifier = chosen("purifier", method)
    if verdict is not None and not takes_verdict(purifier):
        raise ValueError(f"{name} starts from no scan; expected no verdict: leave it out, or choose method='auto'")
    if mean is None and std is None and isinstance(model, nn.Module) and not isinstance(model, Classifier):
        mean, std = constants_of(verdict)
    given = GivenData(clean=clean, classes=classes, image_size=image_size, resize=resize)
    opened = opened_for(model, data, given, mean=mean, std=std, seed=seed, device=device)
    require_copyable(opened.loaded)
    view, files = granted(opened.view, verdict, untrusted, given), given_files(opened.loaded)
    if detector is None and takes_verdict(purifier):
        detector = default_detector(purifier)
    with reporting(on_progress, progress) as report:
        purified = run_eraser(
            purifier,
            view,
            detector=detector,
            audit=audit,
            max_time=max_time,
            generator=child(seed, "erase"),
            on_progress=report,
        )
    before, after = true_evaluations(opened, purified.model, seed=seed)
    record = about(opened, "lustral.erase", model, data, name, purifier, seed, files)
    if takes_verdict(purifier):
        record["scanning"] = how_scanned(verdict, detector, audit=audit, max_time=max_time)
    record |= {} if untrusted is None else {"untrusted": named(untrusted)}
    return EraseResult(
        purified=replace(purified, notes=(*opened.notes, *purified.notes)),
        given=opened.loaded,
        clean=opened.view.clean,
        title=title_of(model, opened),
        about=record,
        accuracies=defender_accuracies(opened, purified.model),
        before=before,
        after=after,
        true_trigger=opened.true_trigger,
        files=files,
        unseen=opened.test,
    )


def how_scanned(
    verdict: ScanResult | Verdict | Place | None, detector: Detector | None, *, audit: bool, max_time: float | None
) -> dict[str, Any]:
    """Return how an eraser got its scan and made its audit, ready for JSON."""
    in_memory = None if verdict is None else HANDED_OVER
    taken = os.fspath(verdict) if isinstance(verdict, str | os.PathLike) else in_memory
    limit = {} if max_time is None else {"max_time": max_time}
    return {"verdict": taken, "detector": settings_record(detector), "audit": audit, **limit}


def evaluate(
    model: Model,
    data: Data,
    *,
    victim: Victim | Place | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Names = None,
    image_size: Size = None,
    resize: int | None = None,
    seed: int = 0,
    device: Device = None,
) -> EvaluationResult:
    """Measure a model on images: its clean accuracy, and what the true trigger does where an evaluator knows it.

    Args:
        model: see ``Model``.
        data: labelled images, see ``lustral.api.data.Data``; of a set with a test split, that.
        victim: folder of ``lustral implant``, or the victim, whose true trigger is tried on the model; None: no trigger is.
        mean: as for ``scan``, and so are ``std``, ``classes``, ``image_size``, ``resize``, ``seed`` and ``device``.

    Returns:
        The rates with their intervals, of the victim beside the model where one is given.

    Raises:
        ValueError: the data cannot be read, or do not fit the model or the victim.
    """
    given = GivenData(classes=classes, image_size=image_size, resize=resize)
    opened = opened_for(model, data, given, mean=mean, std=std, seed=seed, device=device)
    images = all_images(opened).to(opened.view.clean.device)
    known = load_victim(victim) if isinstance(victim, str | os.PathLike) else victim
    before, notes = None, opened.notes
    with CostMeter(opened.view.model, clean_images=len(images)) as meter:
        if known is None:
            after, notes = clean_evaluation(opened.view.model, images), (*notes, *task_notes(opened, images))
        else:
            require_victims_images(known, images, named(data))
            before = true_evaluation(known, known.model.to(images.device), images, seed=seed)
            after = true_evaluation(known, opened.view.model, images, seed=seed)
    return EvaluationResult(
        after=after,
        before=before,
        data=images,
        title=title_of(model, opened),
        about=about(opened, "lustral.evaluate", model, data, "evaluate", None, seed),
        cost=meter.cost,
        has_trigger=known is not None,
        notes=notes,
    )


def all_images(opened: Opened) -> ImageSet:
    """Return the test split of the data, or all of them where they have none, with labels in the model's order."""
    if opened.test is not None:
        return opened.test
    train = opened.source.train
    images = train if isinstance(train, ImageSet) else train.load()
    names = opened.view.clean.class_names
    return in_class_order(images, names) if names and names != images.class_names else images


def clean_evaluation(model: nn.Module, images: ImageSet) -> Evaluation:
    """Measure a model on clean images; the rates of an attack are of nothing."""
    predictions, nothing = predict(model, images), Rate(0, 0)
    return Evaluation(
        acc=accuracy(predictions, images.labels),
        asr=nothing,
        ra=nothing,
        natural_rate=nothing,
        per_class=per_class_accuracy(predictions, images.labels, images.num_classes),
        num_non_finite=int((predictions == NOT_FINITE).sum()),
    )


def task_notes(opened: Opened, images: ImageSet) -> tuple[str, ...]:
    """Return what looks wrong with a model or its images, where the model does its task badly."""
    check = check_task(opened.view.model, images)
    return (check.complaint(images.class_names),) if check.is_weak else ()
