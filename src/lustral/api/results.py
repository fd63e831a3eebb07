"""What a scan, an erasure and an evaluation come to: to show, to save as a folder, and to read as plain data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lustral.api.model_files import PAGE_FILE, write_erased, written_files
from lustral.api.opening import Opened
from lustral.core.files import json_ready, prepare_folder, write_bytes_atomic, write_json_atomic
from lustral.core.randomness import child
from lustral.core.rates import Rate
from lustral.core.records import Cost
from lustral.report.evaluation_finding import evaluation_finding
from lustral.report.figures.pictures import PictureRow
from lustral.report.findings import Finding, erase_finding, scan_finding
from lustral.report.notebook import notebook_html
from lustral.report.page import (
    ReportData,
    trigger_pictures,
    write_erase_report,
    write_evaluation_report,
    write_scan_report,
)
from lustral.vision.evaluation import Evaluation, attack_metrics, clean_accuracy, compare_evaluations, evaluate
from lustral.vision.figures import stamp_sheet
from lustral.vision.images import as_float, as_uint8, at_most
from lustral.vision.insight import Insight, look_inside
from lustral.vision.models import Classifier, LoadedModel
from lustral.vision.models.files.safety import FileFacts, safety_record
from lustral.vision.records import ImageSet, Purified, RecoveredTrigger, Trigger, Verdict, Victim
from lustral.vision.verdict_files import RESULT_FILE, RESULT_SCHEMA, verdict_record, write_verdict
from lustral.vision.victims import library_versions

SHOWN = 2  # recovered triggers in a notebook


@dataclass(frozen=True, kw_only=True)
class ScanResult:
    """What a scan says of a model.

    Attributes:
        verdict: the answer and its evidence, with the notes of the opening.
        model: the classifier that was scanned, float32 (B, C, H, W) in [0, 1] to logits (B, K).
        clean: the images that it was scanned with.
        title: what the model is called on pages.
        about: everything needed to repeat the scan, JSON-ready.
        true_trigger: the attacker's, for pictures; None where nobody knows it.
        files: what opening the model's files would do, without opening them.
    """

    verdict: Verdict
    model: nn.Module = field(repr=False)
    clean: ImageSet = field(repr=False)
    title: str
    about: Mapping[str, Any] = field(repr=False)
    true_trigger: Trigger | None = field(default=None, repr=False)
    files: tuple[FileFacts, ...] = field(default=(), repr=False)

    @property
    def outcome(self) -> str:
        """ "backdoored", "clean" or "cannot tell"."""
        return self.verdict.outcome

    @property
    def suspects(self) -> tuple[str, ...]:
        """Names of the classes that are accused, the most suspicious first."""
        return tuple(self.page.class_names[label] for label in self.verdict.suspect_labels)

    @property
    def page(self) -> ReportData:
        """What the page is made from."""
        return ReportData(
            title=self.title,
            clean=self.clean,
            verdict=self.verdict,
            true_trigger=self.true_trigger,
            files=self.files,
            provenance=self.about,
        )

    @property
    def finding(self) -> Finding:
        """The answer in words."""
        _, height, width = self.clean.image_shape
        return scan_finding(self.verdict, self.page.class_names, height * width)

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict, and what it takes to repeat it, as plain data for JSON."""
        return plain({"schema": RESULT_SCHEMA, **self.about, "verdict": verdict_record(self.verdict)})

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the page of evidence, one HTML file that needs nothing else, and return its path."""
        write_scan_report(path, self.page)
        return Path(path)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, result.json, the recovered triggers and their pictures to a folder, and return its path.

        Raises:
            OSError: a file could not be written; each appears whole or not at all.
        """
        place = prepare_folder(folder)
        write_scan(place, self)
        return place

    def _repr_html_(self) -> str:
        """Show the answer and the trigger in a notebook."""
        return notebook_html(self.finding, notes=self.verdict.notes, rows=_trigger_rows(self.page, self.verdict))


@dataclass(frozen=True, kw_only=True)
class EraseResult:
    """A model after erasing, and what was found and done.

    Attributes:
        purified: the new model, its history, the scan before and after, costs and notes.
        given: the model that was given, and how it was read.
        clean: the images that were used.
        title: what the model is called on pages.
        about: everything needed to repeat the run, JSON-ready.
        accuracies: clean accuracy "before" and "after", as rates ready for JSON, of each set that a defender has.
        before: the given model, measured with the true trigger; None where nobody knows it.
        after: the new model, measured likewise.
        true_trigger: the attacker's, for pictures.
        files: what opening the given model's files would do, without opening them.
        unseen: images that the eraser did not see, for the figures of the page; None takes the clean images.
    """

    purified: Purified = field(repr=False)
    given: LoadedModel = field(repr=False)
    clean: ImageSet = field(repr=False)
    title: str
    about: Mapping[str, Any] = field(repr=False)
    accuracies: Mapping[str, Mapping[str, Any]]
    before: Evaluation | None = None
    after: Evaluation | None = None
    true_trigger: Trigger | None = field(default=None, repr=False)
    files: tuple[FileFacts, ...] = field(default=(), repr=False)
    unseen: ImageSet | None = field(default=None, repr=False)

    @property
    def model(self) -> Classifier:
        """The new classifier, float32 (B, C, H, W) in [0, 1] to logits (B, K)."""
        assert isinstance(self.purified.model, Classifier)
        return self.purified.model

    @property
    def network(self) -> nn.Module:
        """The new network without the normalisation before it, with the keys of the given one."""
        return self.model.network

    @property
    def verdict(self) -> Verdict | None:
        """The scan that the erasure started from; None where the method needs none."""
        return self.purified.verdict

    @property
    def page(self) -> ReportData:
        """What the page is made from."""
        return ReportData(
            title=self.title,
            clean=self.clean,
            purified=self.purified,
            before=self.before,
            after=self.after,
            true_trigger=self.true_trigger,
            files=self.files,
            provenance=self.about,
        )

    @cached_property
    def recovered(self) -> tuple[RecoveredRates, ...]:
        """How often each recovered trigger works on the clean images, with the given and with the new model."""
        triggers = () if self.verdict is None else self.verdict.triggers
        return tuple(recovered_rates(trigger, self.given.model, self.model, self.clean) for trigger in triggers)

    @cached_property
    def insight(self) -> Insight | None:
        """What changed inside the network, on a bounded number of images; None where nothing did."""
        trigger: Trigger | None = self.true_trigger
        target = None
        if trigger is None and self.verdict is not None and self.verdict.triggers:
            found = first_trigger(self.verdict).to(self.clean.device)
            trigger, target = found, found.target_label
        images = self.clean if self.unseen is None else self.unseen.to(self.clean.device)
        return look_inside(
            self.given.model,
            self.model,
            images,
            trigger=trigger,
            target=target,
            has_true_trigger=self.true_trigger is not None,
            are_unseen=self.unseen is not None,
        )

    @property
    def finding(self) -> Finding:
        """The answer in words."""
        return erase_finding(self.purified, self.verdict, self.before, self.after, self.page.class_names)

    def to_dict(self) -> dict[str, Any]:
        """Return what was found and done as plain data for JSON."""
        record: dict[str, Any] = {"schema": RESULT_SCHEMA, **self.about, "accuracy": dict(self.accuracies)}
        record["purified"] = purified_record(self.purified)
        names = self.page.class_names
        record["recovered"] = [
            {"class": names[rates.label], "before": rates.before.to_dict(), "after": rates.after.to_dict()}
            for rates in self.recovered
        ]
        record["weight_line"] = None if self.insight is None else line_record(self.insight)
        if self.before is not None and self.after is not None:
            record |= {"before": self.before.to_dict(), "after": self.after.to_dict(), "change": self.change}
        return plain(record)

    @property
    def change(self) -> dict[str, Any] | None:
        """What ``compare_evaluations`` says of the given and the new model."""
        both = self.before is not None and self.after is not None
        return compare_evaluations(self.before, self.after) if both else None  # type: ignore[arg-type]

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the page of evidence, one HTML file that needs nothing else, and return its path."""
        write_erase_report(path, dataclasses.replace(self.page, insight=self.insight))
        return Path(path)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the new model, result.json and report.html to a folder, and return its path.

        A model that was opened from a file comes back as that file with other weights, ``model`` and the ending of the given one.
        A folder of a model hub comes back as its files, with a section in its model card, README.md: all of them or none. The
        weights of a network that was given in memory go to ``model.pt``, a state dict under the network's own keys.

        Raises:
            OSError: a file could not be written; each appears whole or not at all.
            ValueError: the files of a model folder cannot be copied, or the folder has other files in it.
        """
        place, record = prepare_folder(folder), self.to_dict()
        file = write_erased(place, self.model, self.given, record)
        record |= {"out": str(place), "written": str(file)}
        record["written_safety"] = safety_record(written_files(file, self.given))
        write_json_atomic(place / RESULT_FILE, record)
        self.report(place / PAGE_FILE)
        return place

    def _repr_html_(self) -> str:
        """Show the answer and the trigger that was erased in a notebook."""
        rows = _trigger_rows(self.page, self.verdict) if self.verdict else []
        return notebook_html(self.finding, notes=self.purified.notes, rows=rows)


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """How well a model does on images, and with the true trigger where an evaluator knows it.

    Attributes:
        after: the model.
        before: the victim that it was made from, beside it; None where there is none.
        data: the images.
        title: what the model is called on pages.
        about: everything needed to repeat it, JSON-ready.
        cost: what it used.
        has_trigger: whether a true trigger was known; without one only clean accuracy means something.
        notes: sentences that the user should read.
    """

    after: Evaluation
    before: Evaluation | None = None
    data: ImageSet = field(repr=False)
    title: str
    about: Mapping[str, Any] = field(repr=False)
    cost: Cost = field(repr=False)
    has_trigger: bool
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Clean accuracy of the model, as a fraction."""
        return self.after.acc.value

    @property
    def finding(self) -> Finding:
        """The answer in words."""
        return evaluation_finding(self.before, self.after, has_trigger=self.has_trigger, notes=self.notes)

    def to_dict(self) -> dict[str, Any]:
        """Return all rates with their intervals as plain data for JSON."""
        record: dict[str, Any] = {"schema": RESULT_SCHEMA, **self.about, "after": self.after.to_dict()}
        if self.before is not None:
            record |= {"before": self.before.to_dict(), "change": compare_evaluations(self.before, self.after)}
        return plain({**record, "notes": list(self.notes)})

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, one HTML file that needs nothing else, and return its path."""
        page = ReportData(
            title=self.title,
            clean=self.data,
            before=self.before,
            after=self.after,
            has_trigger=self.has_trigger,
            provenance=self.about,
        )
        write_evaluation_report(path, page, self.finding, self.cost)
        return Path(path)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write result.json and report.html to a folder, and return its path."""
        place = prepare_folder(folder)
        write_json_atomic(place / RESULT_FILE, self.to_dict())
        self.report(place / PAGE_FILE)
        return place

    def _repr_html_(self) -> str:
        """Show the answer in a notebook."""
        return notebook_html(self.finding, notes=self.notes)


def first_trigger(verdict: Verdict) -> RecoveredTrigger:
    """Return the recovered trigger of the most suspicious class that has one, or else the first one."""
    by_label = {trigger.target_label: trigger for trigger in reversed(verdict.triggers)}
    return next((by_label[label] for label in verdict.suspect_labels if label in by_label), verdict.triggers[0])


def plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with None in place of numbers that JSON does not have."""
    ready: dict[str, Any] = json_ready(record)
    return ready


def write_scan(folder: Path, result: ScanResult) -> dict[str, Any]:
    """Write all files of a scan to a folder that exists; return what ``result.json`` says."""
    record = write_verdict(folder, result.verdict, model=result.model, clean=result.clean, about=result.about)
    write_trigger_pictures(folder, result.verdict, result.clean)
    result.report(folder / PAGE_FILE)
    return record


def write_trigger_pictures(folder: Path, verdict: Verdict, clean: ImageSet) -> None:
    """Write a picture sheet per recovered trigger."""
    for trigger in verdict.triggers:
        label = trigger.target_label
        originals = at_most(clean.subset(clean.labels != label), 8).images.cpu()
        triggered = as_uint8(trigger.to("cpu")(as_float(originals)))
        write_bytes_atomic(folder / f"trigger-class-{label}.png", stamp_sheet(originals, triggered))


def run_record(
    opened: Opened,
    *,
    command: str,
    model: str,
    data: str,
    method: str,
    settings: Any,
    seed: int,
    files: Sequence[FileFacts] = (),
    **more: Any,
) -> dict[str, Any]:
    """Return everything needed to repeat a run on a model, ready for JSON.

    Args:
        opened: the model and the images.
        command: the line that started it.
        model: path or name of the model.
        data: path or name of the images.
        method: its name.
        settings: of the method, a dataclass.
        seed: of the run.
        files: facts about the files that the model was read from.
        more: what else there is to say.
    """
    return {
        "command": command,
        "model": model,
        "weights": opened.loaded.weights,
        "other_weights": list(opened.loaded.other_weights),
        "sha256": opened.loaded.sha256,
        "arch": opened.loaded.arch,
        "data": data,
        "classes": list(opened.view.clean.class_names)
        or [str(label) for label in range(opened.view.clean.num_classes)],
        "image_shape": list(opened.view.clean.image_shape),
        "clean_images": len(opened.view.clean),
        "seed": seed,
        "device": str(opened.view.clean.device),
        "method": method,
        "settings": settings_record(settings),
        **more,
        "versions": library_versions(),
        "file_safety": safety_record(files),
    }


def settings_record(method: Any) -> dict[str, Any]:
    """Return the settings of a method; nothing of one that is no dataclass."""
    is_record = dataclasses.is_dataclass(method) and not isinstance(method, type)
    return dataclasses.asdict(method) if is_record else {}


@dataclass(frozen=True, kw_only=True)
class RecoveredRates:
    """How often a recovered trigger works.

    Attributes:
        label: the class that it leads to.
        before: of clean images of other classes, those that the given model takes for that class.
        after: likewise, of the new model.
    """

    label: int
    before: Rate
    after: Rate


def recovered_rates(trigger: RecoveredTrigger, given: nn.Module, model: nn.Module, clean: ImageSet) -> RecoveredRates:
    """Stamp clean images of other classes with a recovered trigger, and count what two models take for its class."""
    label = trigger.target_label
    before, after = (
        attack_metrics(
            each,
            clean,
            trigger.to(clean.device),
            lambda labels, _: torch.full_like(labels, label),
            generator=child(0, "recovered"),
        ).attack_success_rate
        for each in (given, model)
    )
    return RecoveredRates(label=label, before=before, after=after)


def defender_accuracies(opened: Opened, model: nn.Module) -> dict[str, Any]:
    """Return the clean accuracy of the given and the new model on what a defender has, as JSON-ready rates."""
    sets = {"clean images": opened.view.clean}
    if opened.test is not None:
        sets["test set, unseen"] = opened.test.to(opened.view.clean.device)
    models = {"before": opened.view.model, "after": model}
    return {
        name: {when: clean_accuracy(m, images).to_dict() for when, m in models.items()} for name, images in sets.items()
    }


def true_evaluation(victim: Victim, model: nn.Module, test: ImageSet, *, seed: int) -> Evaluation:
    """Measure a model with a victim's true trigger; equal seeds stamp equal images."""
    return evaluate(victim, model, test, generator=child(seed, "evaluation"))


def true_evaluations(
    opened: Opened, model: nn.Module, *, seed: int
) -> tuple[Evaluation, Evaluation] | tuple[None, None]:
    """Measure the given and the new model with the true trigger, where an evaluator knows it and has a test set."""
    if opened.victim is None or opened.test is None:
        return None, None
    test = opened.test.to(opened.view.clean.device)
    given, new = (true_evaluation(opened.victim, m, test, seed=seed) for m in (opened.view.model, model))
    return given, new


def line_record(insight: Insight) -> dict[str, Any] | None:
    """Return the losses between two models, ready for JSON; None where there is no line."""
    if insight.line is None:
        return None
    about = {
        "images": insight.num_images,
        "are_unseen": insight.are_unseen,
        "has_true_trigger": insight.has_true_trigger,
    }
    return about | {name: list(losses) for name, losses in vars(insight.line).items()}


def purified_record(purified: Purified) -> dict[str, Any]:
    """Return how a purified model came about, ready for JSON."""
    return {
        "history": [entry.to_dict() for entry in purified.history],
        "selected": purified.selected,
        "cost": dataclasses.asdict(purified.cost),
        "verdict": None if purified.verdict is None else verdict_record(purified.verdict),
        "audit": None if purified.audit is None else verdict_record(purified.audit),
        "notes": list(purified.notes),
    }


def _trigger_rows(page: ReportData, verdict: Verdict) -> list[PictureRow]:
    """Return the close-up, or else the trigger, and the stamped images of the first recovered triggers."""
    rows = []
    for trigger in verdict.triggers[:SHOWN]:
        shown = trigger_pictures(trigger, page, verdict.suspect_labels)
        stamped = next(i for i, row in enumerate(shown.rows) if row.caption.startswith("the same images"))
        for row in (shown.rows[0], shown.rows[stamped]):
            rows.append(dataclasses.replace(row, caption=f"{shown.heading}: {row.caption}"))
    return rows
