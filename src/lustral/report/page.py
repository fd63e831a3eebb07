"""One self-contained HTML page per scan or erasure: no scripts, no network, light and dark, phone and paper."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lustral.core.characters import visible
from lustral.core.files import write_text_atomic
from lustral.core.history import MISSING, history_table
from lustral.core.rates import Rate
from lustral.core.records import Cost
from lustral.report import words
from lustral.report.evidence import evidence_table
from lustral.report.figures.area_bars import BarChart, area_chart, audit_chart
from lustral.report.figures.charts import curves
from lustral.report.figures.insight import insight_figures
from lustral.report.figures.pictures import PictureRow, picture_row
from lustral.report.findings import Finding, erase_finding, scan_finding
from lustral.report.rendering import page_environment
from lustral.vision.evaluation import Evaluation, compare_evaluations
from lustral.vision.figures import close_up, over_checkerboard
from lustral.vision.images import as_float, as_uint8
from lustral.vision.insight import Insight
from lustral.vision.measures import MASK_AREA
from lustral.vision.models.files.safety import FileFacts
from lustral.vision.records import ImageSet, Purified, RecoveredTrigger, Trigger, Verdict

NUM_SAMPLES = 6  # pictures per row
CURVES = ("clean_accuracy", "recovered_asr", "area")  # figures of a history that are drawn; the table has all


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """What a page is made from. Everything that is None or empty is left out of the page.

    Attributes:
        title: heading of the page, e.g. the name of the model file.
        clean: trusted images, for pictures and class names.
        verdict: the scan; an erasure may come without one.
        purified: the erasure.
        before: the given model, measured with the true trigger; only where an evaluator knows it.
        after: the new model, measured likewise.
        true_trigger: the attacker's trigger; only where an evaluator knows it.
        has_trigger: whether ``before`` and ``after`` were measured with a true trigger, and not on clean images alone.
        controls: other methods' results on the same model, by name.
        files: what opening the model's files would do, without opening them.
        provenance: everything needed to repeat the run: command, settings, seed, versions, file hashes. JSON-ready.
        insight: what an erasure changed inside the network.
        missing: what a page that is made from a saved record cannot show, in sentences.
    """

    title: str
    clean: ImageSet
    verdict: Verdict | None = None
    purified: Purified | None = None
    before: Evaluation | None = None
    after: Evaluation | None = None
    true_trigger: Trigger | None = None
    has_trigger: bool = True
    controls: Mapping[str, Evaluation] = field(default_factory=dict)
    files: tuple[FileFacts, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)
    insight: Insight | None = None
    missing: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of all classes, safe to show; "class 3" where the set has none."""
        names = self.clean.class_names or tuple(f"class {label}" for label in range(self.clean.num_classes))
        return tuple(visible(name) for name in names)


@dataclass(frozen=True, kw_only=True)
class TriggerPictures:
    """The pictures of one recovered trigger."""

    heading: str
    rows: tuple[PictureRow, ...]
    facts: str


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One line of the table of measurements: before, after (value, then small print), and the change."""

    name: str
    meaning: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    change: str


def write_scan_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Write the page of a scan.

    Args:
        path: the HTML file; an existing one is replaced whole.
        data: needs ``verdict``.
    """
    if data.verdict is None:
        raise ValueError("expected a verdict in the data of a scan report; got None")
    _, height, width = data.clean.image_shape
    finding = scan_finding(data.verdict, data.class_names, height * width)
    write_text_atomic(path, _render("Scan report", finding, data, data.verdict, data.verdict.cost))


def write_erase_report(path: str | os.PathLike[str], data: ReportData) -> None:
    """Write the page of an erasure.

    Args:
        path: the HTML file; an existing one is replaced whole.
        data: needs ``purified``; its scan is shown where ``verdict`` is None.
    """
    if data.purified is None:
        raise ValueError("expected a purified model in the data of an erase report; got None")
    verdict = data.verdict or data.purified.verdict
    finding = erase_finding(data.purified, verdict, data.before, data.after, data.class_names)
    write_text_atomic(path, _render("Erase report", finding, data, verdict, data.purified.cost))


def write_evaluation_report(path: str | os.PathLike[str], data: ReportData, finding: Finding, cost: Cost) -> None:
    """Write the page of an evaluation.

    Args:
        path: the HTML file; an existing one is replaced whole.
        data: needs ``after``.
        finding: what to say of it.
        cost: what it used.
    """
    if data.after is None:
        raise ValueError("expected a measured model in the data of an evaluation report; got None")
    write_text_atomic(path, _render("Evaluation", finding, data, None, cost))


def _render(kind: str, finding: Finding, data: ReportData, verdict: Verdict | None, cost: Cost) -> str:
    environment = page_environment("lustral.report")
    environment.filters.update(number=words.number, count=words.count)
    names, purified = data.class_names, data.purified
    suspects = verdict.suspect_labels if verdict else ()
    return environment.get_template("report.html.j2").render(
        kind=kind,
        title=visible(data.title),
        finding=finding,
        is_erasure=purified is not None,
        names=names,
        verdict=verdict,
        suspects=suspects,
        notes=purified.notes if purified else (),
        triggers=[trigger_pictures(trigger, data, suspects) for trigger in verdict.triggers] if verdict else [],
        area_chart=area_chart(verdict, names) if verdict else None,
        evidence=evidence_table(verdict, names) if verdict else None,
        measures=_measures(data),
        has_trigger=data.has_trigger,
        class_accuracies=_class_accuracies(data),
        curves=curves(purified.history, purified.selected, CURVES) if purified else [],
        with_triggers=purified is not None and any(entry.recovered_asr is not None for entry in purified.history),
        history=history_table(purified.history if purified else ()),
        insight=insight_figures(data.insight, names) if data.insight else None,
        missing=data.missing,
        audit=_audit(verdict, purified, names),
        controls=_controls(data),
        files=data.files,
        cost=_cost_tiles(cost),
        provenance=json.dumps(data.provenance, indent=2, default=str, ensure_ascii=False) if data.provenance else "",
    )


def trigger_pictures(found: RecoveredTrigger, data: ReportData, suspects: Sequence[int]) -> TriggerPictures:
    """Return the pictures of one recovered trigger, and what to say of them; ``suspects`` are the labels that are accused."""
    name = data.class_names[found.target_label]
    is_suspect = found.target_label in suspects
    return TriggerPictures(
        heading=f"Towards {words.quoted(name)}" + ("" if is_suspect else " (not flagged)"),
        rows=tuple(row for row in _trigger_rows(found.to("cpu"), data) if row.pictures) if found.masks.numel() else (),
        facts=f"{len(found.masks)} samples, {words.pixels(found.area)} needed; works on "
        f"{words.percent(found.attack_success_rate, 0)} of held-out images of other classes.",
    )


def _trigger_rows(found: RecoveredTrigger, data: ReportData) -> list[PictureRow]:
    masks, patterns = found.masks[:NUM_SAMPLES], found.patterns[:NUM_SAMPLES]
    clean = _sample_images(data.clean, found.target_label)
    rows = [
        picture_row("recovered trigger, see-through where grey checks show", over_checkerboard(masks, patterns)),
        picture_row("close-up of the same samples", close_up(masks, patterns)),
        picture_row("clean images", clean),
        picture_row("the same images with the recovered trigger", as_uint8(found(as_float(clean)))),
    ]
    if data.true_trigger is not None:
        true = as_uint8(data.true_trigger(as_float(clean)))
        rows.append(picture_row("the same images with the attacker’s true trigger, for comparison", true))
    return rows


def _sample_images(clean: ImageSet, target_label: int) -> Tensor:
    """Return up to six clean images, (n, C, H, W) uint8 on the CPU, of as many classes but the target as there are."""
    labels = clean.labels.cpu()
    others = (labels != target_label).nonzero().flatten().tolist()
    seen: dict[int, int] = {}
    turns = []  # how many images of its class come before this one
    for index in others:
        label = int(labels[index])
        turns.append(seen.setdefault(label, 0))
        seen[label] += 1
    chosen = [index for _, index in sorted(zip(turns, others, strict=True))][:NUM_SAMPLES]
    return clean.images[torch.tensor(chosen, dtype=torch.int64).to(clean.device)].cpu()


def _measures(data: ReportData) -> list[Measure]:
    before, after = data.before, data.after
    if before is None and after is None:
        return []

    def rate(value: Rate | None) -> tuple[str, ...]:
        if value is None:
            return (MISSING,)
        if not value.total:
            return "n/a", "no images"
        low, high = value.interval
        return words.percent(value.value), f"{100 * low:.1f}–{100 * high:.1f}", f"n = {value.total:,}"

    rows = []
    for field_name, name, meaning in words.RATES if data.has_trigger else words.RATES[:1]:
        old, new = (getattr(record, field_name) if record else None for record in (before, after))
        rows.append(
            Measure(
                name=name,
                meaning=meaning,
                before=rate(old),
                after=rate(new),
                change=words.points(new.value - old.value, " points") if old and new else MISSING,
            )
        )
    if before and after and data.has_trigger:
        comparison = compare_evaluations(before, after)
        for key, name, meaning in words.SCORES:
            text = words.score(comparison[key])
            rows.append(Measure(name=name, meaning=meaning, before=(MISSING,), after=(text,), change=MISSING))
    return rows


def _class_accuracies(data: ReportData) -> list[tuple[str, str, str, str]]:
    before = data.before.per_class if data.before else ()
    after = data.after.per_class if data.after else ()
    rows = []
    for label, name in enumerate(data.class_names if before or after else ()):
        old, new = (rates[label].value if rates else None for rates in (before, after))
        change = MISSING if old is None or new is None else words.points(new - old, " points")
        rows.append((name, words.percent(old), words.percent(new), change))
    return rows


def _audit(verdict: Verdict | None, purified: Purified | None, names: Sequence[str]) -> dict[str, Any] | None:
    audit = purified.audit if purified else None
    if audit is None:
        return None
    labels = list(verdict.suspect_labels or [found.target_label for found in verdict.triggers]) if verdict else []
    labels += [label for label in audit.suspect_labels if label not in labels]
    then, now = verdict.by_label(MASK_AREA) if verdict else {}, audit.by_label(MASK_AREA)
    sentences = [
        f"{words.quoted(names[label])}: {words.pixels(then[label])} before, {words.pixels(now[label])} after."
        for label in labels
        if label in then and label in now
    ]
    chart: BarChart | None = audit_chart(verdict, audit, names, labels)
    return {
        "sentences": sentences,
        "chart": chart,
        "evidence": evidence_table(audit, names) if chart is None else None,
        "outcome": audit.outcome,
        "basis": audit.basis,
    }


def _controls(data: ReportData) -> list[dict[str, Any]]:
    if not data.controls:
        return []
    records = {"given model": data.before, "this report": data.after, **data.controls}
    return [
        {
            "name": name,
            "rates": [words.percent(rate.value) for rate in (record.acc, record.asr, record.ra)],
            "is_ours": record is data.after,
        }
        for name, record in records.items()
        if record is not None
    ]


def _cost_tiles(cost: Cost) -> list[tuple[str, str]]:
    return [
        ("wall time", words.duration(cost.seconds)),
        ("image passes through the model", words.count(cost.image_passes)),
        ("peak memory", words.memory(cost.peak_memory_bytes)),
        ("clean images used", words.count(cost.clean_images)),
    ]
