"""The pages of ``lustral sift`` and ``lustral train``: what was found suspicious in a training set, in pictures and words."""

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
from lustral.core.history import history_table
from lustral.core.records import Cost
from lustral.report import words
from lustral.report.figures.charts import curves
from lustral.report.figures.histogram import Histogram, histogram
from lustral.report.figures.pictures import LARGEST_PIXELATED, PictureRow, picture_row
from lustral.report.findings import Finding
from lustral.report.rendering import page_environment
from lustral.report.untrusted_findings import sift_finding, train_finding
from lustral.vision.figures import data_uri, png
from lustral.vision.images import as_uint8
from lustral.vision.records import LabelledImages, Sifted, Trained
from lustral.vision.suspicion.shared_traits import SharedTraits, fetch, shared_traits

MOST_CLASSES_SHOWN = 6  # with pictures; the tables have all
PICTURES = 12  # of a class
PAIRS = 6
LEAST_IN_COMMON = 4  # images from which a mean says something
ROWS_SHOWN = 200  # of the list of files
MEAN_CAPTIONS = (
    "mean of the listed images",
    "mean of their nearest neighbours that are not listed",
    "the difference, around grey",
    "where they differ alike: bright",
)


@dataclass(frozen=True, kw_only=True)
class SiftReport:
    """What the pages are made from.

    Attributes:
        title: heading, e.g. the data's path.
        data: the training set.
        names: of the images, N texts.
        class_names: of all classes.
        method: name in the catalog.
        written: where the images that are left were written to, or empty.
        unreadable: (name, problem) of each picture that was left out.
        provenance: everything needed to repeat the run, JSON-ready.
    """

    title: str
    data: LabelledImages
    names: Sequence[str]
    class_names: Sequence[str]
    method: str
    written: str = ""
    unreadable: Sequence[tuple[str, str]] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ClassPictures:
    """The pictures of one class: a heading, a sentence, the most suspicious, the four means, and rows of pairs."""

    heading: str
    facts: str
    suspects: PictureRow
    means: tuple[tuple[str, str], ...]
    pairs: tuple[PictureRow, ...]
    is_pixelated: bool


def write_sift_report(path: str | os.PathLike[str], report: SiftReport, sifted: Sifted) -> None:
    """Write the page of a sifter; an existing file is replaced whole."""
    labels = report.data.labels.cpu().tolist()
    finding = sift_finding(
        sifted,
        labels,
        [visible(name) for name in report.class_names],
        num_unreadable=len(report.unreadable),
        written=visible(report.written),
    )
    page = _render(
        "sift.html.j2", "Sift report", finding, report, sifted.cost, sifted.notes, found=_suspects(report, sifted)
    )
    write_text_atomic(path, page)


def write_train_report(
    path: str | os.PathLike[str], report: SiftReport, trained: Trained, accuracy: float | None
) -> None:
    """Write the page of a safe trainer; an existing file is replaced whole.

    Args:
        path: the HTML file.
        report: the training set.
        trained: the model and how it came about.
        accuracy: on a test set, as a fraction; None where there is none.
    """
    finding = train_finding(trained, accuracy, method=report.method, num_images=len(report.data))
    suspects = None if trained.sifted is None else _suspects(report, trained.sifted)
    page = _render(
        "train.html.j2",
        "Training report",
        finding,
        report,
        trained.cost,
        trained.notes,
        curves=curves(trained.history, None),
        history=history_table(trained.history),
        suspects=suspects,
        basis="" if trained.sifted is None else trained.sifted.basis,
    )
    write_text_atomic(path, page)


def _render(
    template: str,
    kind: str,
    finding: Finding,
    report: SiftReport,
    cost: Cost,
    notes: Sequence[str],
    **content: Any,
) -> str:
    record = json.dumps(report.provenance, indent=2, default=str, ensure_ascii=False) if report.provenance else ""
    return (
        page_environment("lustral.report")
        .get_template(template)
        .render(
            kind=kind,
            title=visible(report.title),
            finding=finding,
            notes=notes,
            cost=[
                ("wall time", words.duration(cost.seconds)),
                ("image passes through the network", words.count(cost.image_passes)),
                ("peak memory", words.memory(cost.peak_memory_bytes)),
                ("clean images used", words.count(cost.clean_images)),
            ],
            provenance=record,
            method=report.method,
            unreadable=report.unreadable[:ROWS_SHOWN],
            num_unreadable=len(report.unreadable),
            **content,
        )
    )


def _suspects(report: SiftReport, sifted: Sifted) -> dict[str, Any]:
    """Return everything about scores that a template shows."""
    flagged, scores = sifted.flagged, sifted.scores
    chart: Histogram = histogram(scores.tolist(), flagged.tolist(), sifted.threshold)
    labels = report.data.labels.cpu()
    listed = torch.bincount(labels[flagged], minlength=report.data.num_classes)
    sizes = torch.bincount(labels, minlength=report.data.num_classes)
    shown = [label for label in listed.argsort(descending=True, stable=True).tolist() if listed[label]]
    order = scores.argsort(descending=True, stable=True)
    order = torch.cat([order[flagged[order]], order[~flagged[order]]])
    large = [label for label in shown if listed[label] >= LEAST_IN_COMMON] or shown[:1]
    few = [index for index in order[: int(flagged.sum())].tolist() if int(labels[index]) not in large]
    rows = order[: int(flagged.sum())][:ROWS_SHOWN].tolist()
    return {
        "classes": [_class_pictures(report, sifted, label) for label in large[:MOST_CLASSES_SHOWN]],
        "few": _row("listed images of other classes", fetch(report.data, torch.tensor(few[:PICTURES])))
        if few
        else None,
        "class_table": [
            (
                visible(report.class_names[label]),
                int(listed[label]),
                int(sizes[label]),
                words.percent(int(listed[label]) / int(sizes[label])),
            )
            for label in shown
        ],
        "highest": None if shown else _row("the images with the highest scores", fetch(report.data, order[:PICTURES])),
        "histogram": chart,
        "num_listed": int(flagged.sum()),
        "num_images": len(flagged),
        "threshold": sifted.threshold,
        "parts": _parts(sifted),
        "agreement": _agreement(sifted),
        "files": [
            (visible(report.names[i]), visible(report.class_names[int(labels[i])]), f"{float(scores[i]):.4g}")
            for i in rows
        ],
    }


def _class_pictures(report: SiftReport, sifted: Sifted, label: int) -> ClassPictures:
    members = report.data.labels.cpu() == label
    flagged = (members & sifted.flagged).nonzero().flatten()
    top = flagged[sifted.scores[flagged].argsort(descending=True, stable=True)][:PICTURES]
    pictures = fetch(report.data, top)
    found = shared_traits(report.data, sifted.scores, sifted.flagged, label)
    listed, size = len(flagged), int(members.sum())
    alone = found is None
    facts = f"{words.count(listed)} of its {words.count(size)} images are listed."
    if alone:
        facts += " None is left to compare them with."
    return ClassPictures(
        heading=f"Class {words.quoted(visible(report.class_names[label]))}",
        facts=facts,
        suspects=_row(f"the {len(top)} most suspicious" if listed > len(top) else "the listed images", pictures),
        means=() if found is None or len(found.listed) < LEAST_IN_COMMON else _means(found),
        pairs=() if found is None else _pairs(found),
        is_pixelated=max(pictures.shape[-2:]) <= LARGEST_PIXELATED,
    )


def _means(found: SharedTraits) -> tuple[tuple[str, str], ...]:
    gain = 0.5 / max(float(found.residual.abs().max()), 1e-6)
    heat = (found.agreement / max(float(found.agreement.max()), 1e-6)).sqrt()  # so that all of a trigger shows
    pictures = (found.mean, found.mean_neighbours, 0.5 + gain * found.residual, heat.expand_as(found.mean))
    return tuple(
        (caption, data_uri(png(as_uint8(picture)))) for caption, picture in zip(MEAN_CAPTIONS, pictures, strict=True)
    )


def _pairs(found: SharedTraits) -> tuple[PictureRow, ...]:
    mine, theirs = found.images[:PAIRS], found.partners[:PAIRS]
    return (
        _row("listed", mine),
        _row("its nearest neighbour in the class that is not listed", theirs),
        _row("the difference, around grey", 0.5 + (mine - theirs) / 2),
    )


def _row(caption: str, images: Tensor) -> PictureRow:
    return picture_row(caption, as_uint8(images))


def _parts(sifted: Sifted) -> list[tuple[str, str, str, str]]:
    """Return (name, images listed, of which in the list, basis) of each method that took part."""
    return [
        (
            name,
            words.count(int(part.flagged.sum())),
            words.count(int((part.flagged & sifted.flagged).sum())),
            part.basis,
        )
        for name, part in sifted.parts.items()
    ]


def _agreement(sifted: Sifted) -> list[tuple[str, str, float]]:
    """Return (how many methods, how many listed images, share in percent) by the number of methods that list an image alone."""
    if not sifted.parts or not sifted.flagged.any():
        return []
    votes = torch.stack([part.flagged for part in sifted.parts.values()]).sum(0)[sifted.flagged]
    counts = torch.bincount(votes, minlength=len(sifted.parts) + 1).tolist()
    total = len(votes)
    return [
        (f"{number} of {len(sifted.parts)} methods", words.count(found), round(100 * found / total, 1))
        for number, found in reversed(list(enumerate(counts)))
        if found
    ]
