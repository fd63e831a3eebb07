"""A saved result as the data of a page. Everything read is hostile input: sizes are bounded before anything is read, every value
has its type and range, and no file names another but the triggers beside the result of a scan.

Errors::

    ValueError
    └── SavedResultError    a file that no page can be made from; the message says what came and what to do
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import nn

from lustral.core.characters import visible
from lustral.core.files import NotRegularError, is_deep, read_regular
from lustral.core.history import read_history
from lustral.core.limits import LARGEST_VERDICT, MOST_CLASSES, MOST_NAME_LENGTH, is_image_shape
from lustral.core.records import Cost
from lustral.core.settings import shortened
from lustral.exchange import records
from lustral.report.findings import Finding, erase_finding, scan_finding
from lustral.report.page import ReportData, write_erase_report, write_scan_report
from lustral.vision.evaluation import Evaluation
from lustral.vision.insight import Insight, WeightLine
from lustral.vision.models.files.safety import FileFacts, ImportedName
from lustral.vision.records import ImageSet, Purified, Verdict
from lustral.vision.verdict_files import VerdictError, saved_verdict

DEEPEST = 40  # brackets inside each other; settings have 8
MOST_CELLS = 500_000  # classes times measures, in the table of a page
MOST_ENTRIES = 10_000  # of a history, of files, of names that a file imports
LARGEST_NUMBER = 2.0**53  # of counts and costs
KINDS = {  # what tells a record's command, in the order to look
    "purified": "erase",
    "history": "train",
    "sifted": "sift",
    "verdict": "scan",
    "attack": "implant",
    "before": "evaluate",
}
WRITTEN_BY = "expected the result.json of `lustral scan` or `lustral erase`"
NO_IMAGES = "Clean images, and what the triggers do to them: images are not kept in a record."
NO_SHEETS = "The pictures of the recovered triggers: "
NO_INSIDE = "Where the networks look, and the map of their features: both need the images and the models."

Kind = TypeVar("Kind", bound=BaseModel)


class SavedResultError(ValueError):
    """A file is too large, damaged, of another version, or no result that a page can be made from."""


@dataclass(frozen=True, kw_only=True)
class SavedResult:
    """A result read from a file.

    Attributes:
        data: what the page is made from.
        finding: the answer in words.
    """

    data: ReportData
    finding: Finding

    def write(self, path: Path) -> None:
        """Write the page."""
        if self.data.purified is None:
            write_scan_report(path, self.data)
        else:
            write_erase_report(path, self.data)


def read_result(path: Path) -> SavedResult:
    """Read the result of a scan or an erasure.

    Args:
        path: the file; recovered triggers are looked for beside it.

    Raises:
        SavedResultError: no page can be made from it.
        OSError: it is not there, or may not be read.
    """
    record = read_record(path)
    kind = next((command for key, command in KINDS.items() if key in record), None)
    if str(record.get("command")).startswith("lustral molecules "):
        kind = "molecules"
    if kind is None:
        raise SavedResultError(f"{path} is no result of lustral; {WRITTEN_BY}")
    if kind not in ("scan", "erase"):
        raise SavedResultError(
            f"{path} is a result of `lustral {kind}`, which no page is made from again; {WRITTEN_BY}. "
            f"The page of `lustral {kind} --out` is report.html in its folder, if it writes one"
        )
    if record.get("schema") != records.SCHEMA:
        raise SavedResultError(
            f"{path}: of another version of lustral (schema {shortened(record.get('schema'))}, expected {records.SCHEMA}); "
            "use the report.html beside it, or run the command again"
        )
    try:
        return _scan(path, record) if kind == "scan" else _erasure(path, record)
    except VerdictError as error:
        raise SavedResultError(str(error)) from error
    except RecursionError as error:
        raise SavedResultError(f"{path}: brackets are nested too deeply; {WRITTEN_BY}") from error


def read_record(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file of bounded size and depth."""
    try:
        content = read_regular(path, most=LARGEST_VERDICT)
    except NotRegularError as error:
        raise SavedResultError(f"{error}; {WRITTEN_BY}") from error
    try:
        record = json.loads(content.decode())
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON
        raise SavedResultError(f"{path} cannot be read ({shortened(str(error))}); {WRITTEN_BY}") from error
    if not isinstance(record, dict):
        raise SavedResultError(f"{path} holds a JSON {type(record).__name__} and no object; {WRITTEN_BY}")
    if is_deep(record, DEEPEST):
        raise SavedResultError(f"{path}: brackets are nested more than {DEEPEST} times; {WRITTEN_BY}")
    return record


def _scan(path: Path, record: Mapping[str, Any]) -> SavedResult:
    said = _parsed(path, records.ScanResult, record)
    digest = said.handover.triggers if said.handover else None
    clean = _no_images(path, said)
    verdict, missing = _verdict(path, record["verdict"], clean, digest)
    data = ReportData(
        title=said.model,
        clean=clean,
        verdict=verdict,
        files=_files(path, said),
        provenance=_about(record),
        missing=(NO_IMAGES, *missing),
    )
    _, height, width = clean.image_shape
    return SavedResult(data=data, finding=scan_finding(verdict, data.class_names, height * width))


def _erasure(path: Path, record: Mapping[str, Any]) -> SavedResult:
    said = _parsed(path, records.EraseResult, record)
    clean = _no_images(path, said)
    verdict, audit = (
        None if record["purified"][name] is None else _verdict(path, record["purified"][name], clean, None)[0]
        for name in ("verdict", "audit")
    )
    history, problems = read_history(record["purified"]["history"])
    selected = said.purified.selected
    numbers = [abs(value) for entry in said.purified.history for value in entry.values() if value is not None]
    if max(numbers, default=0) > LARGEST_NUMBER:
        problems.append("its history has numbers beyond 2^53.")
    if problems or len(history) > MOST_ENTRIES or (selected is not None and not 0 <= selected < len(history)):
        raise SavedResultError(f"{path}: {' '.join(problems) or 'its history is too long, or lacks what was kept'}")
    purified = Purified(
        model=nn.Identity(),  # the page does not look at it
        history=tuple(history),
        selected=selected,
        cost=_cost(path, said.purified.cost),
        verdict=verdict,
        audit=audit,
        notes=tuple(map(visible, said.purified.notes)),
    )
    before, after = (_evaluation(path, each, clean) for each in (said.before, said.after))
    shown = (NO_SHEETS + "only their figures are kept; the scan's own result.json may have them.",)
    data = ReportData(
        title=said.model,
        clean=clean,
        purified=purified,
        before=before,
        after=after,
        files=_files(path, said),
        provenance=_about(record),
        insight=_insight(path, said),
        missing=(NO_IMAGES, *(shown if verdict and verdict.triggers else ()), NO_INSIDE),
    )
    return SavedResult(data=data, finding=erase_finding(purified, verdict, before, after, data.class_names))


def _parsed(path: Path, kind: type[Kind], record: Mapping[str, Any]) -> Kind:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SavedResultError(
            f"{path}: {place}: {first['msg']}; got {shortened(first['input'])}; {WRITTEN_BY}"
        ) from error


def _no_images(path: Path, said: records.ModelRun) -> ImageSet:
    """Return an empty set with the classes and the shape of the images that a record is about."""
    names, shape = said.classes, said.image_shape
    if not 2 <= len(names) <= MOST_CLASSES or max(map(len, names)) > MOST_NAME_LENGTH or not is_image_shape(shape):
        raise SavedResultError(
            f"{path}: expected the names of 2 to {MOST_CLASSES:,} classes and the shape of the images; got {len(names):,} "
            f"names and {shortened(shape)}: an earlier version wrote it; use the report.html beside it, or run the command again"
        )
    images = torch.empty((0, *shape), dtype=torch.uint8)
    labels = torch.empty(0, dtype=torch.int64)
    return ImageSet(images=images, labels=labels, num_classes=len(names), class_names=tuple(names))


def _verdict(path: Path, said: Any, clean: ImageSet, digest: str | None) -> tuple[Verdict, tuple[str, ...]]:
    """Return a verdict, and what is missing of its triggers; those without pixels have samples of no size."""
    verdict, problem = saved_verdict(path, said, clean, digest)
    measures = {entry.measure for entry in verdict.evidence}
    if len(measures) * len({entry.label for entry in verdict.evidence}) > MOST_CELLS:
        raise SavedResultError(f"{path}: its table would have more than {MOST_CELLS:,} cells; {WRITTEN_BY}")
    return verdict, (NO_SHEETS + problem,) if problem else ()


def _cost(path: Path, said: records.Cost) -> Cost:
    values = said.model_dump()
    if not all(0 <= value <= LARGEST_NUMBER for value in values.values()):
        raise SavedResultError(f"{path}: expected a cost of numbers from 0 to 2^53; got {shortened(values)}")
    return Cost(**values)


def _evaluation(path: Path, said: records.Evaluation | None, clean: ImageSet) -> Evaluation | None:
    if said is None:
        return None
    rates = [said.acc, said.asr, said.ra, said.natural_rate, *said.per_class, *said.probes.values()]
    if any(not rate.hits <= rate.n <= LARGEST_NUMBER for rate in rates) or len(said.per_class) != clean.num_classes:
        raise SavedResultError(
            f"{path}: expected rates with no more hits than images, and one for each of {clean.num_classes} classes; {WRITTEN_BY}"
        )
    return Evaluation.from_dict(said.model_dump())


def _files(path: Path, said: records.ModelRun) -> tuple[FileFacts, ...]:
    files = said.file_safety.files if said.file_safety else []
    if len(files) + sum(len(file.imports) for file in files) > MOST_ENTRIES:
        raise SavedResultError(f"{path}: expected facts about at most {MOST_ENTRIES:,} files and imports; {WRITTEN_BY}")
    return tuple(
        FileFacts(
            file=file.file,
            format=file.format,
            num_bytes=file.bytes,
            sha256=file.sha256,
            imports=tuple(ImportedName(**entry.model_dump()) for entry in file.imports),
        )
        for file in files
    )


def _insight(path: Path, said: records.EraseResult) -> Insight | None:
    """Return the losses between the weights, which a record keeps."""
    line = said.weight_line
    if line is None:
        return None
    if {len(line.clean), len(line.triggered) or len(line.clean)} != {len(line.shares)}:
        raise SavedResultError(
            f"{path}: weight_line: expected a loss for each of {len(line.shares)} shares; {WRITTEN_BY}"
        )
    clean, triggered = (
        tuple(float("nan") if v is None else v for v in losses) for losses in (line.clean, line.triggered)
    )
    return Insight(
        num_images=line.images,
        are_unseen=line.are_unseen,
        has_trigger=bool(triggered),
        has_true_trigger=line.has_true_trigger,
        line=WeightLine(shares=tuple(line.shares), clean=clean, triggered=triggered),
    )


def _about(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what it takes to repeat a run: what the record says beside its results."""
    names = {field.alias or name for name, field in records.ModelRun.model_fields.items()} | {"scanning", "untrusted"}
    return {name: value for name, value in record.items() if name in names}
