"""The commands for a training set of unknown origin: list its suspicious images, or train on it all the same."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

from rich.console import RenderableType
from rich.table import Table

from lustral.api.score_files import require_free, write_clean
from lustral.api.set_results import SiftResult, TrainResult, set_record
from lustral.api.training_sets import GivenSet, OpenedSet, named_overlap, open_test, open_untrusted
from lustral.catalog import SAFE_TRAINERS, SIFTERS
from lustral.cli.arguments import parse_untrusted
from lustral.cli.commands import shown_command
from lustral.cli.console import Screen
from lustral.cli.exporting import prepare_exports, write_sift_exports
from lustral.cli.opening import pick_device
from lustral.cli.tables import cost_sentence, finding_text, interval
from lustral.cli.untrusted.arguments import Sift, Train
from lustral.cli.untrusted.durations import SHORT_WORK, estimate_sentence, expected_passes, seconds_per_pass
from lustral.core.files import prepare_folder
from lustral.core.history import history_table
from lustral.core.randomness import child
from lustral.report.words import percent
from lustral.training import default_trainer
from lustral.vision import untrusted
from lustral.vision.evaluation import clean_accuracy
from lustral.vision.records import Sifted
from lustral.vision.verdict_files import RESULT_SCHEMA

Line = TypeVar("Line", Sift[Any], Train[Any])
NONE_LISTED, LISTED = 0, 1  # exit codes of ``sift``
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
    found = dataclasses.replace(found, notes=(*opened.opening_notes, *found.notes))
    written = "" if command.write_clean is None else str(command.write_clean)
    about = provenance(command, argv, opened, expected)
    result = SiftResult(
        sifted=found, opened=opened, title=command.given.data, method=command.method, about=about, written=written
    )
    result.save_scores(out)
    if command.write_clean is not None:
        left = write_clean(command.write_clean, opened, found.flagged, as_list=command.write_clean_as == "list")
        clean = {"folder": written, "as": command.write_clean_as, "images": left}
        result = dataclasses.replace(result, about={**about, "clean": {**clean}})
    result.save_page(out)
    code = LISTED if found.flagged.any() else NONE_LISTED
    exported = write_sift_exports(command.exports, result.to_dict(), code=code)
    shown: list[RenderableType] = [listed_table(found, opened)] if found.flagged.any() else []
    shown += [finding_text(result.finding), *found.notes, cost_sentence(found.cost)]
    shown += [f"Left after sifting: {written}"] if written else []
    shown += [f"Scores: {out / 'scores.csv'}", f"Report: {out / 'report.html'}", *exported]
    screen.show(*shown)
    screen.record(result.to_dict())
    return code


def train(command: Train[Any], argv: Sequence[str], screen: Screen) -> int:
    """Train a model on a set of unknown origin, and write it."""
    check_places(command)
    command, opened = open_set(command, argv)
    test = opened.test if command.test is None else open_test(command.test, opened, GivenSet(**vars(command.given)))
    out, seed = prepare_folder(command.out), command.common.seed
    expected = say_how_long(command.settings, opened, screen, seed=seed)
    with screen.progress() as on_progress, named_overlap(opened):
        trained = untrusted.train(
            command.settings, opened.view, generator=child(seed, "train"), on_progress=on_progress
        )
    trained = dataclasses.replace(trained, notes=(*opened.opening_notes, *trained.notes))
    about = provenance(command, argv, opened, expected)
    result = TrainResult(trained=trained, opened=opened, title=command.given.data, method=command.method, about=about)
    file = result.save_model(out)
    accuracy = None if test is None else clean_accuracy(result.model, test.to(next(result.model.parameters()).device))
    result = dataclasses.replace(result, accuracy=accuracy, about={**about, "model": str(file)})
    result.save_page(out)
    shown: list[RenderableType] = [history_rows(trained.history)] if trained.history else []
    shown += [finding_text(result.finding), *trained.notes]
    shown += [] if accuracy is None else [f"Accuracy on the test set: {interval(accuracy.to_dict())}"]
    shown += [cost_sentence(trained.cost), f"Model: {file}", f"Report: {out / 'report.html'}"]
    screen.show(*shown)
    screen.record(result.to_dict())
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
    opened = open_untrusted(GivenSet(**vars(command.given)), seed=command.common.seed, device=device)
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


def provenance(
    command: Sift[Any] | Train[Any], argv: Sequence[str], opened: OpenedSet, expected: float | None
) -> dict[str, Any]:
    """Return everything needed to repeat a run, ready for JSON."""
    return set_record(
        opened,
        command=shown_command(argv),
        data=command.given.data,
        clean=command.given.clean,
        method=command.method,
        settings=command.settings,
        seed=command.common.seed,
        device=str(pick_device(command.common.device)),
        expected_seconds=expected,
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
