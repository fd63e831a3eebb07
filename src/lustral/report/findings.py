"""What the page says at its top: one plain sentence, its colour, what it rests on, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lustral.core.history import FIGURES
from lustral.report.figures.area_bars import is_found, median_area
from lustral.report.words import chance, number, percent, pixels, points, quoted, quoted_list
from lustral.vision.evaluation import Evaluation, compare_evaluations, unmet_criteria
from lustral.vision.measures import MASK_AREA, SUCCESS_RATE
from lustral.vision.records import Answer, Purified, Verdict

KEPT = 0.5  # share of the attack success above which a backdoor is called still there, and not merely not fully erased
LIMITS = (
    "A scan can show a backdoor, but it cannot prove that there is none: it searches for small patterns that force one "
    "class, and a backdoor of another kind can escape it."
)
OTHER_LIMITS = "A scan can show a backdoor, but it cannot prove that there is none: one of another kind can escape it."


ACCUSED_STEPS = (
    "Do not use this model where a wrong answer matters.",
    "Run “lustral erase” on it with the same clean images, and with “--verdict” and the result.json beside this page: it removes "
    "the backdoor without a second search, and writes a new file.",
    "Find out where the model or its training data came from, and keep the original file as evidence.",
)
CLEAN_STEPS = (
    "Nothing has to be repaired. Keep this page with the model as a record of the check.",
    "If the model comes from a source that you do not trust, scan again with more clean images and another seed before you "
    "rely on it.",
)
UNSEARCHED_STEPS = (
    "Check how the model is read: its normalisation (mean and std), channel order, image size and class order.",
    "Check that the clean images are of the kind that it was trained on, and that their labels are right.",
    "Until then, treat the model as not trusted.",
)
USE_IT = (
    "Use the new model file in place of the old one; your own code loads it as before.",
    "Check its accuracy on your own test set, and keep the original file as evidence.",
)
TRY_MORE = (
    "Do not use the new model yet.",
    "Erase again with more clean images or with another method (“lustral erase --list” names them), or train the model "
    "again from data that you trust.",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The answer of a page.

    Attributes:
        tone: "bad", "good" or "unsure"; colours the badge.
        badge: the answer in two or three words.
        headline: the answer in one sentence.
        details: sentences that support it.
        next_steps: what the reader should do.
        figures: (what, value) pairs to show large.
    """

    tone: str
    badge: str
    headline: str
    details: tuple[str, ...]
    next_steps: tuple[str, ...]
    figures: tuple[tuple[str, str], ...]


FEW_CLASSES = 5  # with fewer a scan has nothing to compare (``MaskArea``'s least number of labels)
FEW_CLASSES_STEPS = (
    "Erasers that ask for no scan can be run all the same, for example `lustral erase --method fine_tuning`.",
    "Until then, treat the model as not trusted.",
)


def scan_finding(verdict: Verdict, names: Sequence[str], image_pixels: int) -> Finding:
    """Return the answer of a scan; ``image_pixels`` is H × W."""
    suspects = [names[label] for label in verdict.suspect_labels]
    of_masks = bool(verdict.by_label(MASK_AREA))
    is_faint = any(
        trigger.kind == "faint" for trigger in verdict.triggers if trigger.target_label in verdict.suspect_labels
    )
    area = "" if is_faint else _area_sentence(verdict, names, image_pixels)  # a mask tells little of a faint change
    details = [sentence for sentence in (area, *verdict.notes, verdict.basis) if sentence]
    figures = _scan_figures(verdict, names)
    if verdict.outcome == "backdoored":
        return Finding(
            tone="bad",
            badge="Backdoored",
            headline=_accusation(suspects, of_masks=of_masks, is_faint=is_faint),
            details=tuple(details),
            next_steps=ACCUSED_STEPS,
            figures=figures,
        )
    if verdict.outcome == "clean":
        return Finding(
            tone="good",
            badge="No backdoor found",
            headline="No backdoor found: no class can be reached with an unusually small pattern."
            if of_masks
            else "No backdoor found: nothing unusual was measured.",
            details=(*details, LIMITS if of_masks else OTHER_LIMITS),
            next_steps=CLEAN_STEPS,
            figures=figures,
        )
    if not verdict.evidence:
        return Finding(
            tone="unsure",
            badge="Cannot tell",
            headline="Cannot tell: nothing was searched, because no answer could come of it.",
            details=tuple(details),
            next_steps=FEW_CLASSES_STEPS if len(names) < FEW_CLASSES else UNSEARCHED_STEPS,
            figures=figures,
        )
    return Finding(
        tone="unsure",
        badge="Cannot tell",
        headline="Cannot tell: the evidence is neither clearly normal nor clearly abnormal."
        + (f" The class to watch is {quoted_list(suspects)}." if suspects else ""),
        details=(*details, LIMITS if of_masks else OTHER_LIMITS),
        next_steps=(
            "Scan again with more clean images, at least several of every class.",
            "Until then, treat the model as not trusted. “lustral erase” unlearns the classes in doubt as a precaution.",
        ),
        figures=figures,
    )


def _accusation(suspects: Sequence[str], *, of_masks: bool, is_faint: bool) -> str:
    if not suspects:
        return "This model is backdoored."
    if is_faint:
        return f"This model is backdoored: a faint change of the whole image turns other images into {quoted_list(suspects)}."
    if of_masks:
        return f"This model is backdoored: a small pattern turns other images into {quoted_list(suspects)}."
    return f"This model is backdoored: the evidence points to {quoted_list(suspects)}."


def erase_finding(
    purified: Purified,
    verdict: Verdict | None,
    before: Evaluation | None,
    after: Evaluation | None,
    names: Sequence[str],
) -> Finding:
    """Return the answer of an erasure: measured with the true trigger where one was given, else by the audit."""
    audit = purified.audit
    details = _erase_details(before, after, audit)
    figures = _erase_figures(purified, verdict, before, after)
    was_clean = verdict is not None and verdict.outcome == "clean"
    if purified.selected is None:
        return _unchanged(details, figures, was_clean=was_clean)
    unmet = unmet_criteria(before, after) if before and after else None
    if audit is not None and audit.outcome == "backdoored":
        return _found_again(audit, names, details, figures, is_known_gone=unmet == ())
    if before and after and unmet:
        return _short_of_it(before, after, unmet, details, figures)
    if unmet == ():
        return Finding(
            tone="good",
            badge="Erased",
            headline="The backdoor is erased: the trigger no longer works, and the model still does its job.",
            details=details,
            next_steps=USE_IT,
            figures=figures,
        )
    if audit is not None and audit.outcome == "clean":
        return _nothing_found(audit, details, figures, before=None if verdict is None else verdict.outcome)
    return Finding(
        tone="unsure",
        badge="Cannot tell",
        headline="Cannot tell whether the backdoor is gone: "
        + ("the fresh search gave no clear answer." if audit else "the new model was not searched again."),
        details=details,
        next_steps=("Scan the new model with “lustral scan” and more clean images before you use it.",),
        figures=figures,
    )


Figures = tuple[tuple[str, str], ...]


def _unchanged(details: tuple[str, ...], figures: Figures, *, was_clean: bool) -> Finding:
    why = "the scan found no backdoor to erase." if was_clean else "nothing was erased."
    return Finding(
        tone="good" if was_clean else "unsure",
        badge="Not changed",
        headline=f"The model was returned as it was: {why}",
        details=(*details, LIMITS) if was_clean else details,
        next_steps=("Nothing has to be done.",) if was_clean else TRY_MORE,
        figures=figures,
    )


def _found_again(
    audit: Verdict, names: Sequence[str], details: tuple[str, ...], figures: Figures, *, is_known_gone: bool
) -> Finding:
    found = quoted_list([names[label] for label in audit.suspect_labels])
    known = "The known trigger no longer works, but a" if is_known_gone else "Still backdoored: a"
    return Finding(
        tone="unsure" if is_known_gone else "bad",
        badge="Not fully erased" if is_known_gone else "Still backdoored",
        headline=f"{known} fresh search on the new model finds an unusually small pattern (class: {found})."
        if audit.by_label(MASK_AREA)
        else f"{known} fresh scan calls the new model backdoored (class: {found}).",
        details=details,
        next_steps=TRY_MORE,
        figures=figures,
    )


def _short_of_it(
    before: Evaluation, after: Evaluation, unmet: Sequence[str], details: tuple[str, ...], figures: Figures
) -> Finding:
    if tuple(unmet) != ("acc",):
        return Finding(
            tone="bad",
            badge=_shortfall_badge(before, after, unmet),
            headline=f"{_shortfall(before, after, unmet)}.",
            details=details,
            next_steps=TRY_MORE,
            figures=figures,
        )
    return Finding(
        tone="unsure",
        badge="Erased at a price",
        headline="The trigger no longer works, but the model lost "
        f"{100 * (before.acc.value - after.acc.value):.1f} points of clean accuracy.",
        details=details,
        next_steps=(
            "Erase again with more clean images or with another method; “lustral erase --list” names them.",
            "If you use this model all the same, measure it on your own test set first, and keep the original file as "
            "evidence.",
        ),
        figures=figures,
    )


GONE = {
    "clean": "No backdoor found, neither before nor after",
    "cannot tell": "A backdoor was in doubt, and what was in doubt appears to be erased",
}


def _nothing_found(audit: Verdict, details: tuple[str, ...], figures: Figures, *, before: Answer | None) -> Finding:
    of_masks = bool(audit.by_label(MASK_AREA))
    gone = GONE.get(before or "backdoored", "The backdoor appears to be erased")
    how = (
        "search on the new model finds no unusually small pattern." if of_masks else "scan of it finds nothing unusual."
    )
    return Finding(
        tone="good",
        badge="Erased",
        headline=f"{gone}: a fresh {how}",
        details=(*details, LIMITS if of_masks else OTHER_LIMITS),
        next_steps=USE_IT,
        figures=figures,
    )


def _area_sentence(verdict: Verdict, names: Sequence[str], image_pixels: int) -> str:
    areas, success = verdict.by_label(MASK_AREA), verdict.by_label(SUCCESS_RATE)
    label = verdict.suspect_labels[0] if verdict.suspect_labels else None
    if label is None or label not in areas or not is_found(areas[label]):
        return ""
    typical = median_area(verdict)
    compared = f"; for a typical class it takes {pixels(typical)}" if is_found(typical) else ""
    return (
        f"Covering the equivalent of {pixels(areas[label])} of {image_pixels:,} ({percent(areas[label] / image_pixels)} of "
        f"the image) turns {percent(success.get(label), 0)} of held-out images into "
        f"{quoted(names[label])}{compared}."
    )


def _scan_figures(verdict: Verdict, names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    measured = verdict.clean_accuracy is not None
    accuracy = (("accuracy on the clean images", percent(verdict.clean_accuracy)),) if measured else ()
    areas, chances = verdict.by_label(MASK_AREA), verdict.p_values()
    if not areas:
        tested = (
            (("least chance in a benign model", chance(chances.get(None, min(chances.values())))),) if chances else ()
        )
        return (*tested, *accuracy)
    smallest = min(areas, key=lambda label: areas[label] if is_found(areas[label]) else math.inf)
    least = verdict.suspect_labels[0] if verdict.suspect_labels and verdict.suspect_labels[0] in areas else smallest
    return (
        ("most suspicious class", names[least]),
        ("pixels needed there", pixels(areas[least])),
        ("pixels needed, typical class", pixels(median_area(verdict))),
        ("chance of this in a benign model", chance(chances.get(None, chances.get(least, math.nan)))),
        *accuracy,
    )


def _erase_details(before: Evaluation | None, after: Evaluation | None, audit: Verdict | None) -> tuple[str, ...]:
    details = []
    if before and after and after.asr.total:
        details.append(
            f"With the true trigger, {percent(before.asr.value)} of images went to the attacker’s class before and "
            f"{percent(after.asr.value)} do now; without any trigger it is {percent(after.natural_rate.value)}."
        )
    if after and after.non_finite:
        details.append(
            f"The new model gave numbers that are not finite for {after.num_non_finite:,} images: it is damaged."
        )
    if audit is not None:
        details.append(f"Fresh search on the new model: {audit.basis}")
    return tuple(details)


def _erase_figures(
    purified: Purified, verdict: Verdict | None, before: Evaluation | None, after: Evaluation | None
) -> tuple[tuple[str, str], ...]:
    if before and after:
        rating = compare_evaluations(before, after)["der"]
        return (
            ("attack success", f"{percent(before.asr.value)} → {percent(after.asr.value)}"),
            ("clean accuracy", f"{percent(before.acc.value)} → {percent(after.acc.value)}"),
            ("triggered images recognised", f"{percent(before.ra.value)} → {percent(after.ra.value)}"),
            ("defence effectiveness (DER)", number(rating, 3)),
        )
    figures = []
    if purified.history:
        given, kept = purified.given, purified.history[-1 if purified.selected is None else purified.selected]
        for name in ("recovered_asr", "clean_accuracy"):
            before_it, after_it = None if given is None else given.value(name), kept.value(name)
            if after_it is not None:
                change = percent(after_it) if before_it is None else f"{percent(before_it)} → {percent(after_it)}"
                figures.append((FIGURES[name].words, change))
    if verdict and purified.audit and verdict.suspect_labels:
        then, now = (found.by_label(MASK_AREA) for found in (verdict, purified.audit))
        label = verdict.suspect_labels[0]
        if label in then:
            figures.append(("pixels needed", f"{pixels(then[label])} → {pixels(now.get(label, math.nan))}"))
    return tuple(figures)


def _shortfall_badge(before: Evaluation, after: Evaluation, unmet: Sequence[str]) -> str:
    if "finite" in unmet:
        return "Damaged"
    return "Still backdoored" if after.asr.value > KEPT * before.asr.value else "Not fully erased"


def _shortfall(before: Evaluation, after: Evaluation, unmet: Sequence[str]) -> str:
    reasons = {
        "finite": "the new model is damaged",
        "asr": f"the trigger still works on {percent(after.asr.value)} of images",
        "acc": f"clean accuracy changed by {points(after.acc.value - before.acc.value, ' points')}",
        "ra": f"only {percent(after.ra.value)} of triggered images are recognised as what they show",
    }
    text = ", and ".join(reasons[name] for name in unmet)
    return text[0].upper() + text[1:]
