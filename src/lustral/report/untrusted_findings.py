"""What the pages of ``lustral sift`` and ``lustral train`` say at their top."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lustral.core.history import FIGURES
from lustral.report.findings import Finding
from lustral.report.words import count, duration, percent, quoted, quoted_list
from lustral.vision.records import Sifted, Trained

SIFT_LIMITS = (
    "This list can be wrong both ways: an honest image that looks unusual may be on it, and a poisoned one that looks "
    "ordinary may not."
)
TRAIN_LIMITS = "No method keeps every backdoor out. Scan the model before you rely on it."


def sift_finding(
    sifted: Sifted, labels: Sequence[int], names: Sequence[str], *, num_unreadable: int, written: str = ""
) -> Finding:
    """Return the answer of a sifter.

    Args:
        sifted: scores and flags.
        labels: of the images.
        names: of the classes.
        num_unreadable: pictures that were left out.
        written: where the images that are left were written to; empty if they were not.
    """
    flagged = sifted.flagged.tolist()
    per_class = [0] * len(names)
    for label, is_listed in zip(labels, flagged, strict=True):
        per_class[label] += is_listed
    listed, total = sum(per_class), len(flagged)
    most = sorted((label for label in range(len(names)) if per_class[label]), key=lambda label: -per_class[label])
    left_out = (
        (f"{count(num_unreadable)} pictures could not be read. They were left out and have no score.",)
        if num_unreadable
        else ()
    )
    figures = (
        ("images looked at", count(total)),
        ("images listed", f"{count(listed)} ({percent(listed / total)})"),
        ("classes with listed images", f"{len(most)} of {len(names)}"),
        ("time it took", duration(sifted.cost.seconds)),
    )
    if not listed:
        return Finding(
            tone="good",
            badge="Nothing listed",
            headline=f"No poisoned image was found among {count(total)}.",
            details=(*left_out, sifted.basis, SIFT_LIMITS),
            next_steps=_clean_steps(),
            figures=figures,
        )
    return Finding(
        tone="bad",
        badge="Poisoned images listed",
        headline=f"{count(listed)} of {count(total)} images look poisoned{_where(most, per_class, names)}.",
        details=(*left_out, sifted.basis, SIFT_LIMITS),
        next_steps=_poisoned_steps(written),
        figures=figures,
    )


def _where(most: Sequence[int], per_class: Sequence[int], names: Sequence[str]) -> str:
    listed = sum(per_class)
    if per_class[most[0]] >= 0.8 * listed:
        share = "all of them" if per_class[most[0]] == listed else f"{count(per_class[most[0]])} of them"
        return f", {share} in the class {quoted(names[most[0]])}"
    chief, reached = list[int](), 0
    while reached < 0.8 * listed:
        chief.append(most[len(chief)])
        reached += per_class[chief[-1]]
    return f", mostly in the classes {quoted_list([names[label] for label in chief])}"


def _clean_steps() -> tuple[str, ...]:
    return (
        "Look at the images with the highest scores below: does a mark repeat, or do several look out of place?",
        "If the set comes from a source that you do not trust, train on it with “lustral train”, and scan the model with "
        "“lustral scan”.",
    )


def _poisoned_steps(written: str) -> tuple[str, ...]:
    away = (
        f"The images that are left were written to {written}. The given files are as they were."
        if written
        else "Run “lustral sift” again with “--write-clean FOLDER”: it copies the images that are not listed. It deletes nothing."
    )
    return (
        "Look at the listed images below. A mark, a pattern or a tint that repeats, often on pictures that belong to another "
        "class, is a trigger.",
        "If honest images are on the list, that costs little: a model hardly misses a few. Poisoned ones left in cost a lot.",
        away,
        f"Train on what is left: “lustral train {written or 'FOLDER'} --method plain --out model”.",
        "Or leave the set whole and let a safe method work around the poison: “lustral train --list” explains them.",
        "Keep scores.csv and the listed files as evidence, and ask where they came from.",
    )


def train_finding(trained: Trained, accuracy: float | None, *, method: str, num_images: int) -> Finding:
    """Return the answer of a safe trainer.

    Args:
        trained: the model and how it came about.
        accuracy: on a test set that the method never saw, as a fraction; None where there is none.
        method: its name in the catalog.
        num_images: of the training set.
    """
    is_plain = method == "plain"
    held_out = trained.history[-1].value("clean_accuracy") if trained.history else None
    listed = None if trained.sifted is None else int(trained.sifted.flagged.sum())
    figures = [("images in the set", count(num_images))]
    if accuracy is not None:
        figures.append(("accuracy on the test set", percent(accuracy)))
    elif held_out is not None and math.isfinite(held_out):
        figures.append((FIGURES["clean_accuracy"].words, percent(held_out)))
    if listed is not None:
        figures.append(("images kept from the model as suspicious", count(listed)))
    figures.append(("time it took", duration(trained.cost.seconds)))
    measured = "" if accuracy is None else f" It is right on {percent(accuracy)} of the test images."
    unmeasured = (
        () if accuracy is not None else ("There was no test set, so its accuracy is not known: --test gives one.",)
    )
    return Finding(
        tone="unsure",
        badge="Trained on everything" if is_plain else "Trained with care",
        headline=(
            f"A model was trained on all {count(num_images)} images. If there is a backdoor among them, it was learnt too."
            if is_plain
            else f"A model was trained on {count(num_images)} images of unknown origin by {method}.{measured}"
        ),
        details=(*((measured.strip(),) if is_plain and measured else ()), *unmeasured, TRAIN_LIMITS),
        next_steps=(
            "Scan the model with images that you trust: “lustral scan model.safetensors --data CLEAN --out scan”.",
            "If the scan says backdoored, erase with “lustral erase”, or train again with another method.",
        ),
        figures=tuple(figures),
    )
