"""What every verb does around its method: the model and the data opened, a scan handed over, and the call written down."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from lustral.api.data import Data, named
from lustral.api.opening import GivenData, Opened, open_file, open_module
from lustral.api.results import EraseResult, ScanResult, run_record
from lustral.api.set_results import TrainResult
from lustral.api.training_sets import open_training_set
from lustral.core.digests import weights_digest
from lustral.vision.models import Classifier, LoadedModel
from lustral.vision.models.files.safety import FileFacts
from lustral.vision.records import DefenderView, Verdict
from lustral.vision.verdict_files import VerdictError, read_verdict

Place: TypeAlias = str | os.PathLike[str]
Model: TypeAlias = nn.Module | LoadedModel | EraseResult | TrainResult | Place
"""Any network, from images (B, C, H, W) to logits; what ``open_model`` returned; a result that holds a model; a path."""

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
