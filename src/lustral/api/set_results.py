"""What sifting a training set, and training on it all the same, come to: to show, to save, and to read as plain data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lustral.api.model_files import PAGE_FILE, write_state
from lustral.api.results import plain, settings_record
from lustral.api.score_files import require_free, write_clean, write_scores
from lustral.api.training_sets import OpenedSet
from lustral.core.characters import visible
from lustral.core.files import prepare_folder, write_bytes_atomic, write_json_atomic
from lustral.core.rates import Rate
from lustral.report.figures.pictures import picture_row
from lustral.report.findings import Finding
from lustral.report.notebook import notebook_html
from lustral.report.sift_page import SiftReport, write_sift_report, write_train_report
from lustral.report.untrusted_findings import sift_finding, train_finding
from lustral.vision.figures import contact_sheet
from lustral.vision.images import as_uint8
from lustral.vision.models import Classifier, arch_of, save_model
from lustral.vision.records import Sifted, Trained
from lustral.vision.suspicion.shared_traits import fetch
from lustral.vision.verdict_files import RESULT_FILE, RESULT_SCHEMA
from lustral.vision.victims import library_versions

ON_SHEET = 64  # images on the contact sheet
IN_NOTEBOOK = 12
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class SiftResult:
    """Which images of a training set are suspicious.

    Attributes:
        sifted: scores and flags, one per image in the set's order, with the notes of the opening.
        opened: the set.
        title: what the set is called on pages.
        method: name of the sifter.
        about: everything needed to repeat it, JSON-ready.
        written: where the images that are left were written to, or empty.
    """

    sifted: Sifted = field(repr=False)
    opened: OpenedSet = field(repr=False)
    title: str
    method: str
    about: Mapping[str, Any] = field(repr=False)
    written: str = ""

    @property
    def scores(self) -> Tensor:
        """(N,) float32 on the CPU; higher is more suspicious."""
        return self.sifted.scores

    @property
    def flagged(self) -> Tensor:
        """(N,) bool on the CPU: the images that should be left out."""
        return self.sifted.flagged

    @property
    def kept(self) -> Tensor:
        """(M,) int64 positions of the images that are left."""
        return (~self.sifted.flagged).nonzero().flatten()

    @property
    def finding(self) -> Finding:
        """The answer in words."""
        return sift_finding(
            self.sifted,
            self.opened.view.untrusted.labels.tolist(),
            [visible(name) for name in self.opened.class_names],
            num_unreadable=len(self.opened.source.unreadable),
            written=visible(self.written),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what was listed, and what it takes to repeat it, as plain data for JSON."""
        record = {"sifted": sifted_record(self.sifted, self.opened), "unreadable": unreadable_record(self.opened)}
        return plain({"schema": RESULT_SCHEMA, **self.about, **record})

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the page of evidence, one HTML file that needs nothing else, and return its path."""
        page = set_page(self.opened, self.title, self.method, self.to_dict(), written=self.written)
        write_sift_report(path, page, self.sifted)
        return Path(path)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write scores.csv, scores.parquet, sheet.png, result.json and report.html to a folder, and return its path.

        Raises:
            ValueError: the folder is inside of the data.
            OSError: a file could not be written; each appears whole or not at all.
        """
        require_free(Path(folder), self.opened.source.folder or None, "folder", empty=False)
        place = prepare_folder(folder)
        self.save_scores(place)
        self.save_page(place)
        return place

    def save_scores(self, folder: Path) -> None:
        """Write the tables and the contact sheet to a folder that exists."""
        write_scores(folder, self.opened, self.sifted)
        write_sheet(folder / "sheet.png", self.opened, self.sifted)

    def save_page(self, folder: Path) -> None:
        """Write result.json and report.html to a folder that exists."""
        write_json_atomic(folder / RESULT_FILE, self.to_dict())
        self.report(folder / PAGE_FILE)

    def write_clean(self, folder: str | os.PathLike[str], *, as_list: bool = False) -> int:
        """Write the images that are left to a new or empty folder, whole or not at all, and return how many there are.

        Args:
            folder: gets a folder for each class, or clean.npz for images that are no files.
            as_list: write clean.txt, a list of files or positions, in place of copies.

        Raises:
            ValueError: the folder holds something, or is inside of the data.
        """
        place = Path(folder)
        require_free(place, self.opened.source.folder or None, "folder", empty=True)
        return write_clean(place, self.opened, self.sifted.flagged, as_list=as_list)

    def _repr_html_(self) -> str:
        """Show the answer and the most suspicious images in a notebook."""
        top = most_suspicious(self.sifted, IN_NOTEBOOK)
        caption = "the most suspicious of the listed images" if self.flagged.any() else "the highest scores"
        images = as_uint8(fetch(self.opened.view.untrusted, top))
        return notebook_html(self.finding, notes=self.sifted.notes, rows=[picture_row(caption, images)])


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A model that was trained on a set of unknown origin.

    Attributes:
        trained: the model, its history, what was found suspicious, with the notes of the opening.
        opened: the set.
        title: what the set is called on pages.
        method: name of the safe trainer.
        about: everything needed to repeat it, JSON-ready.
        accuracy: on images that the method never saw; None where there are none.
        is_named: whether the architecture has a name that opens the model again; else only its state dict is kept.
    """

    trained: Trained = field(repr=False)
    opened: OpenedSet = field(repr=False)
    title: str
    method: str
    about: Mapping[str, Any] = field(repr=False)
    accuracy: Rate | None = None
    is_named: bool = True

    @property
    def model(self) -> Classifier:
        """The classifier in evaluation mode, float32 (B, C, H, W) in [0, 1] to logits (B, K)."""
        assert isinstance(self.trained.model, Classifier)
        return self.trained.model

    @property
    def network(self) -> nn.Module:
        """The network without the normalisation before it."""
        return self.model.network

    @property
    def finding(self) -> Finding:
        """The answer in words."""
        value = None if self.accuracy is None else self.accuracy.value
        return train_finding(self.trained, value, method=self.method, num_images=len(self.opened.view.untrusted))

    def to_dict(self) -> dict[str, Any]:
        """Return how it went as plain data for JSON."""
        sifted = self.trained.sifted
        record = {
            "accuracy": None if self.accuracy is None else self.accuracy.to_dict(),
            "history": [entry.to_dict() for entry in self.trained.history],
            "cost": dataclasses.asdict(self.trained.cost),
            "notes": list(self.trained.notes),
            "sifted": None if sifted is None else sifted_record(sifted, self.opened),
            "unreadable": unreadable_record(self.opened),
        }
        return plain({"schema": RESULT_SCHEMA, **self.about, **record})

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the page of evidence, one HTML file that needs nothing else, and return its path."""
        page = set_page(self.opened, self.title, self.method, self.to_dict())
        write_train_report(path, page, self.trained, None if self.accuracy is None else self.accuracy.value)
        return Path(path)

    def save_model(self, folder: Path) -> Path:
        """Write model.safetensors, or model.pt of a network that a function built, to a folder that exists; return its path."""
        if not self.is_named:
            return write_state(folder, self.model)
        arch = arch_of(self.network, self.opened.arch)
        save_model(folder / MODEL_FILE, self.model, arch=arch, image_shape=self.opened.view.untrusted.image_shape)
        return folder / MODEL_FILE

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the model, result.json and report.html to a folder, and return its path.

        Raises:
            ValueError: the folder is inside of the data.
            OSError: a file could not be written; each appears whole or not at all.
        """
        require_free(Path(folder), self.opened.source.folder or None, "folder", empty=False)
        place = prepare_folder(folder)
        file = self.save_model(place)
        saved = dataclasses.replace(self, about={**self.about, "model": str(file)})
        saved.save_page(place)
        return place

    def save_page(self, folder: Path) -> None:
        """Write result.json and report.html to a folder that exists."""
        write_json_atomic(folder / RESULT_FILE, self.to_dict())
        self.report(folder / PAGE_FILE)

    def _repr_html_(self) -> str:
        """Show the answer in a notebook."""
        return notebook_html(self.finding, notes=self.trained.notes)


def set_record(
    opened: OpenedSet,
    *,
    command: str,
    data: str,
    clean: str | None,
    method: str,
    settings: Any,
    seed: int,
    device: str,
    expected_seconds: float | None = None,
) -> dict[str, Any]:
    """Return everything needed to repeat a run on a training set, ready for JSON.

    Args:
        opened: the set.
        command: the line that started it.
        data: path or name of the set.
        clean: path or name of the clean images; None where there are none.
        method: its name.
        settings: of the method, a dataclass.
        seed: of the run.
        device: that it ran on.
        expected_seconds: said beforehand; None where it was short, or nobody asked.
    """
    view = opened.view
    return {
        "command": command,
        "data": data,
        "folder": opened.source.folder,
        "images": len(view.untrusted),
        "classes": list(opened.class_names),
        "image_shape": list(view.untrusted.image_shape),
        "clean": clean,
        "clean_images": 0 if view.clean is None else len(view.clean),
        "arch": opened.arch,
        "flip": view.flip,
        "seed": seed,
        "device": device,
        "method": method,
        "settings": settings_record(settings),
        "expected_seconds": expected_seconds,
        "versions": library_versions(),
    }


def set_page(opened: OpenedSet, title: str, method: str, record: Mapping[str, Any], *, written: str = "") -> SiftReport:
    """Return what the pages are made from."""
    brief = {key: value for key, value in record.items() if key not in ("sifted", "unreadable", "history", "notes")}
    return SiftReport(
        title=title,
        data=opened.view.untrusted,
        names=opened.names,
        class_names=opened.class_names,
        method=method,
        written=written,
        unreadable=[(entry["file"], entry["problem"]) for entry in unreadable_record(opened)],
        provenance=brief,
    )


def sifted_record(found: Sifted, opened: OpenedSet) -> dict[str, Any]:
    """Return what a sifter said, ready for JSON; the scores are in the tables."""
    listed = found.flagged.nonzero().flatten().tolist()
    return {
        "listed": len(listed),
        "files": [opened.names[index] for index in listed],
        "named_by": "file" if opened.files else "position",
        "threshold": found.threshold,
        "basis": found.basis,
        "cost": dataclasses.asdict(found.cost),
        "parts": {
            name: {"listed": int(part.flagged.sum()), "threshold": part.threshold, "basis": part.basis}
            for name, part in found.parts.items()
        },
        "notes": list(found.notes),
    }


def unreadable_record(opened: OpenedSet) -> list[dict[str, str]]:
    """Return the pictures that were left out, ready for JSON."""
    entries = zip(opened.unreadable_names, opened.source.unreadable, strict=True)
    return [{"file": name, "problem": entry.problem} for name, entry in entries]


def most_suspicious(found: Sifted, most: int) -> Tensor:
    """Return positions of images, the listed ones first and then by score, (n,) int64."""
    order = found.scores.argsort(descending=True, stable=True)
    return order[found.flagged[order].long().argsort(descending=True, stable=True)][:most]


def write_sheet(path: Path, opened: OpenedSet, found: Sifted) -> None:
    """Write the contact sheet: the most suspicious images with class and score, the listed ones framed."""
    top = most_suspicious(found, ON_SHEET)
    labels = opened.view.untrusted.labels.tolist()
    captions = [f"{visible(opened.class_names[labels[i]])}: {float(found.scores[i]):.3g}" for i in top.tolist()]
    sheet = contact_sheet(as_uint8(fetch(opened.view.untrusted, top)), captions, found.flagged[top].tolist())
    write_bytes_atomic(path, sheet)
