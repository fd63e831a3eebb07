"""The commands for a training set of unknown origin: list its suspicious images, or train on it all the same."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from rich.console import RenderableType
from rich.table import Table

from lustral.catalog import SAFE_TRAINERS, SIFTERS
from lustral.cli.arguments import parse_untrusted
from lustral.cli.commands import shown_command
from lustral.cli.console import Screen
from lustral.cli.exporting import prepare_exports, write_sift_exports
from lustral.cli.opening import pick_device, prepare_folder
from lustral.cli.tables import cost_sentence, finding_text, interval
from lustral.cli.untrusted.arguments import Sift, Train
from lustral.cli.untrusted.files import require_free, write_clean, write_scores
from lustral.cli.untrusted.opening import (
    SHORT_WORK,
    OpenedSet,
    estimate_sentence,
    expected_passes,
    open_test,
    open_untrusted,
    seconds_per_pass,
)
from lustral.core.characters import visible
from lustral.core.files import write_bytes_atomic, write_json_atomic
from lustral.core.history import history_table
from lustral.core.randomness import child
from lustral.report.sift_page import SiftReport, write_sift_report, write_train_report
from lustral.report.untrusted_findings import sift_finding, train_finding
from lustral.report.words import percent
from lustral.training import default_trainer
from lustral.vision import untrusted
from lustral.vision.evaluation import clean_accuracy
from lustral.vision.figures import contact_sheet
from lustral.vision.images import as_uint8
from lustral.vision.models import Classifier, arch_of, save_model
from lustral.vision.records import Sifted
from lustral.vision.suspicion.shared_traits import fetch
from lustral.vision.untrusted import OverlapError
from lustral.vision.verdict_files import RESULT_FILE, RESULT_SCHEMA
from lustral.vision.victims import library_versions

Line = TypeVar("Line", Sift[Any], Train[Any])
NONE_LISTED, LISTED = 0, 1  # exit codes of ``sift``
ON_SHEET = 64  # images on the contact sheet
CLASSES_SHOWN = 10  # in the terminal


def sift(command: Sift[Any], argv: Sequence[str], screen: Screen) -> int:
    """List the suspicious images of a training set; the exit code says whether there are any."""
    check_places(command)
    prepare_exports(command.exports, command.given.data)
    command, opened = open_set(command, argv)
    out, seed = prepare_folder(command.out), command.common.seed
    expected = say_how_long(command.settings, opened, screen, seed=seed)
    with screen.progress() as on_progress, named_overlap(opened):
        found = untrusted.sift(command.settings, opened.view, generator=child(seed, "sift"), on_progress=on_progress)
    found = dataclasses.replace(found, notes=(*opening_notes(opened), *found.notes))
    record: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        **provenance(command, argv, opened),
        "expected_seconds": expected,
        "sifted": sifted_record(found, opened),
        "unreadable": unreadable_record(opened),
    }
    write_scores(out, opened, found)
    write_sheet(out / "sheet.png", opened, found)
    if command.write_clean is not None:
        left = write_clean(command.write_clean, opened, found.flagged, as_list=command.write_clean_as == "list")
        record["clean"] = {"folder": str(command.write_clean), "as": command.write_clean_as, "images": left}
    write_json_atomic(out / RESULT_FILE, record)
    code = LISTED if found.flagged.any() else NONE_LISTED
    exported = write_sift_exports(command.exports, record, code=code)
    written = "" if command.write_clean is None else str(command.write_clean)
    write_sift_report(out / "report.html", page_of(command, opened, record, written=written), found)
    finding = sift_finding(
        found,
        opened.view.untrusted.labels.tolist(),
        [visible(name) for name in opened.class_names],
        num_unreadable=len(opened.source.unreadable),
        written=visible(written),
    )
    shown: list[RenderableType] = [listed_table(found, opened)] if found.flagged.any() else []
    shown += [finding_text(finding), *found.notes, cost_sentence(found.cost)]
    shown += [f"Left after sifting: {written}"] if written else []
    shown += [f"Scores: {out / 'scores.csv'}", f"Report: {out / 'report.html'}", *exported]
    screen.show(*shown)
    screen.record(record)
    return code


def train(command: Train[Any], argv: Sequence[str], screen: Screen) -> int:
    """Train a model on a set of unknown origin, and write it."""
    check_places(command)
    command, opened = open_set(command, argv)
    test = opened.test if command.test is None else open_test(command.test, opened, command.given)
    out, seed = prepare_folder(command.out), command.common.seed
    expected = say_how_long(command.settings, opened, screen, seed=seed)
    with screen.progress() as on_progress, named_overlap(opened):
        trained = untrusted.train(
            command.settings, opened.view, generator=child(seed, "train"), on_progress=on_progress
        )
    trained = dataclasses.replace(trained, notes=(*opening_notes(opened), *trained.notes))
    model = trained.model
    assert isinstance(model, Classifier)
    file = out / "model.safetensors"
    arch = arch_of(model.network, opened.arch)
    save_model(file, model, arch=arch, image_shape=opened.view.untrusted.image_shape)
    accuracy = None if test is None else clean_accuracy(model, test.to(next(model.parameters()).device))
    record: dict[str, Any] = {
        "schema": RESULT_SCHEMA,
        **provenance(command, argv, opened),
        "expected_seconds": expected,
        "model": str(file),
        "accuracy": None if accuracy is None else accuracy.to_dict(),
        "history": [entry.to_dict() for entry in trained.history],
        "cost": dataclasses.asdict(trained.cost),
        "notes": list(trained.notes),
        "sifted": None if trained.sifted is None else sifted_record(trained.sifted, opened),
        "unreadable": unreadable_record(opened),
    }
    write_json_atomic(out / RESULT_FILE, record)
    value = None if accuracy is None else accuracy.value
    write_train_report(out / "report.html", page_of(command, opened, record), trained, value)
    finding = train_finding(trained, value, method=command.method, num_images=len(opened.view.untrusted))
    shown: list[RenderableType] = [history_rows(trained.history)] if trained.history else []
    shown += [finding_text(finding), *trained.notes]
    shown += [] if accuracy is None else [f"Accuracy on the test set: {interval(accuracy.to_dict())}"]
    shown += [cost_sentence(trained.cost), f"Model: {file}", f"Report: {out / 'report.html'}"]
    screen.show(*shown)
    screen.record(record)
    return 0


def list_untrusted(verb: str, screen: Screen) -> int:
    """Explain each method of ``sift`` or ``train`` in a line, with what it needs beyond the set and what it costs."""
    catalog: Mapping[str, Any] = SIFTERS if verb == "sift" else SAFE_TRAINERS
    lines = {name: (inspect.getdoc(kind) or "").partition("\n")[0] for name, kind in catalog.items()}
    table = Table("method", "what it does", "needs", "cost", title=f"lustral {verb} --method")
    table.caption = "cost: passes of each image of the set through the network and back"
    for name, line in lines.items():
        table.add_row(name, line, catalog[name].needs, f"{catalog[name].cost_passes:g}")
    screen.show(table)
    records = {
        name: {"does": line, "needs": catalog[name].needs, "passes": catalog[name].cost_passes}
        for name, line in lines.items()
    }
    screen.record({"schema": RESULT_SCHEMA, "methods": records})
    return 0


def check_places(command: Sift[Any] | Train[Any]) -> None:
    """Refuse folders for results that would be taken for data, or that hold something, before any work."""
    require_free(command.out, command.given.data, "--out", empty=False)
    if isinstance(command, Sift) and command.write_clean is not None:
        require_free(command.write_clean, command.given.data, "--write-clean", empty=True)


def open_set(command: Line, argv: Sequence[str]) -> tuple[Line, OpenedSet]:
    """Open the set, and read the line again with its training recipe as the defaults of the trainer's flags."""
    device = pick_device(command.common.device)
    opened = open_untrusted(command.given, seed=command.common.seed, device=device)
    recipe = default_trainer(flip=opened.view.flip, num_images=len(opened.view.untrusted))
    return cast(Line, parse_untrusted(argv, recipe)), opened


def say_how_long(method: Any, opened: OpenedSet, screen: Screen, *, seed: int) -> float | None:
    """Measure a few steps, say how long the work takes if that is more than a minute, and return the seconds; None: short."""
    untrusted.check_labels(method, opened.view)
    passes = expected_passes(method, len(opened.view.untrusted))
    if passes * math.prod(opened.view.untrusted.image_shape) < SHORT_WORK:
        return None
    seconds = passes * seconds_per_pass(opened.view, seed=seed)
    line = estimate_sentence(seconds, passes, opened.view)
    if line is not None and not screen.is_quiet:
        screen.aside.print(line, soft_wrap=True)
    return round(seconds, 1)


@contextmanager
def named_overlap(opened: OpenedSet) -> Iterator[None]:
    """Tell an overlap of the clean and the untrusted set, within the block, by the names of files."""
    try:
        yield
    except OverlapError as error:
        raise OverlapError(error.indices, opened.names if opened.files else ()) from None


def opening_notes(opened: OpenedSet) -> tuple[str, ...]:
    """Return what the user should know of how the set was opened."""
    if not opened.dropped_clean:
        return ()
    return (
        f"{opened.dropped_clean} of the clean images are in the rest of the set too, pixel for pixel, and were left out.",
    )


def provenance(command: Sift[Any] | Train[Any], argv: Sequence[str], opened: OpenedSet) -> dict[str, Any]:
    """Return everything needed to repeat a run, ready for JSON."""
    view = opened.view
    return {
        "command": shown_command(argv),
        "data": command.given.data,
        "folder": opened.source.folder,
        "images": len(view.untrusted),
        "classes": list(opened.class_names),
        "image_shape": list(view.untrusted.image_shape),
        "clean": command.given.clean,
        "clean_images": 0 if view.clean is None else len(view.clean),
        "arch": opened.arch,
        "flip": view.flip,
        "seed": command.common.seed,
        "device": str(pick_device(command.common.device)),
        "method": command.method,
        "settings": dataclasses.asdict(command.settings),
        "versions": library_versions(),
    }


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


def page_of(
    command: Sift[Any] | Train[Any], opened: OpenedSet, record: Mapping[str, Any], *, written: str = ""
) -> SiftReport:
    """Return what the pages are made from."""
    brief = {key: value for key, value in record.items() if key not in ("sifted", "unreadable", "history", "notes")}
    return SiftReport(
        title=command.given.data,
        data=opened.view.untrusted,
        names=opened.names,
        class_names=opened.class_names,
        method=command.method,
        written=written,
        unreadable=[(entry["file"], entry["problem"]) for entry in unreadable_record(opened)],
        provenance=brief,
    )


def write_sheet(path: Path, opened: OpenedSet, found: Sifted) -> None:
    """Write the contact sheet: the most suspicious images with class and score, the listed ones framed."""
    order = found.scores.argsort(descending=True, stable=True)
    top = order[found.flagged[order].long().argsort(descending=True, stable=True)][:ON_SHEET]
    labels = opened.view.untrusted.labels.tolist()
    captions = [f"{visible(opened.class_names[labels[i]])}: {float(found.scores[i]):.3g}" for i in top.tolist()]
    write_bytes_atomic(
        path, contact_sheet(as_uint8(fetch(opened.view.untrusted, top)), captions, found.flagged[top].tolist())
    )


def listed_table(found: Sifted, opened: OpenedSet) -> Table:
    """Return how many images of each class are listed, the most first."""
    labels = opened.view.untrusted.labels.cpu()
    listed = labels[found.flagged].bincount(minlength=len(opened.class_names)).tolist()
    sizes = labels.bincount(minlength=len(opened.class_names)).tolist()
    table = Table("class", "listed", "images", "share", title="Listed images per class")
    rows = sorted((label for label in range(len(listed)) if listed[label]), key=lambda label: -listed[label])
    for label in rows[:CLASSES_SHOWN]:
        share = percent(listed[label] / sizes[label])
        table.add_row(opened.class_names[label], str(listed[label]), str(sizes[label]), share)
    if len(rows) > CLASSES_SHOWN:
        table.caption = f"and {len(rows) - CLASSES_SHOWN} more classes"
    return table


def history_rows(history: Sequence[Any]) -> Table:
    """Return the last entries of a history as a table."""
    columns, rows = history_table(history)
    table = Table(*columns, title="Training")
    for row in rows[-CLASSES_SHOWN:]:
        table.add_row(*row)
    return table
