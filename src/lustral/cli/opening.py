"""From the flags of a command line to what the library opens: a device, a model with its clean images, what is beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lustral.api.calls import compared_models, scan_settings, training_of_references
from lustral.api.opening import GivenData, Opened, open_file
from lustral.api.training_sets import open_training_set
from lustral.cli.arguments import Erase, Scan, Suspect
from lustral.cli.console import Screen
from lustral.cli.untrusted.durations import seconds_per_pass
from lustral.core.files import write_json_atomic
from lustral.report.words import count, duration
from lustral.vision.records import DefenderView, TrainingView
from lustral.vision.scanning import References
from lustral.vision.verdict_files import read_verdict
from lustral.vision.victims import untrained_classifier

REFERENCES_FILE = "references.json"


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


def open_suspect(suspect: Suspect, *, seed: int, device: torch.device) -> Opened:
    """Open the model and the data, check that they fit each other, and build the defender's view."""
    given = GivenData(
        clean=suspect.clean, classes=suspect.classes, image_size=suspect.image_size, resize=suspect.resize
    )
    return open_file(suspect.model, suspect.data, given=given, written=vars(suspect.format), seed=seed, device=device)


def granted_view(command: Erase[Any, Any], opened: Opened, taken: Path | None) -> DefenderView:
    """Return what a purifier may look at: the opened view, with the scan and the training set that a line hands over."""
    view = opened.view if taken is None else dataclasses.replace(opened.view, verdict=read_verdict(taken, opened.view))
    if command.untrusted is None:
        return view
    size, resize = command.suspect.image_size, command.suspect.resize
    training_set = open_training_set(command.untrusted, view.clean, image_size=size, resize=resize)
    return dataclasses.replace(view, untrusted=training_set)


def compare_first(command: Scan[Any], opened: Opened, about: Mapping[str, Any], screen: Screen) -> References | None:
    """Scan the benign references that a line asks for, and write down what they say before the model itself is scanned."""
    seed = command.common.seed
    if command.train_references is not None and command.references is None and not screen.is_quiet:
        screen.aside.print(training_estimate(opened, command.train_references, seed=seed), soft_wrap=True)
    with screen.progress() as on_progress:
        compared = compared_models(
            opened,
            command.settings,
            references=command.references,
            train_references=command.train_references,
            written=vars(command.suspect.format),
            seed=seed,
            how=scan_settings(about),
            max_time=command.max_time,
            on_progress=on_progress,
        )
    if compared is not None and command.out is not None:
        write_json_atomic(command.out / REFERENCES_FILE, compared.to_dict())
    return compared


def training_estimate(opened: Opened, number: int, *, seed: int) -> str:
    """Measure a few steps, and say how long it takes to train references."""
    trainer, images = training_of_references(opened, number, seed=seed)
    view = TrainingView(
        untrusted=images, build_model=lambda stream: untrained_classifier(opened.loaded.arch, images, generator=stream)
    )
    passes = number * trainer.epochs * len(images)
    return (
        f"Training {number} benign references on {count(len(images))} images takes about "
        f"{duration(passes * seconds_per_pass(view, seed=seed))}; then each is scanned as the model will be."
    )
