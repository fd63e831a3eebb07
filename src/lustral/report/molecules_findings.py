"""What the pages of ``lustral molecules`` say at their top."""

from __future__ import annotations

from collections.abc import Sequence

from lustral.molecules.records import Association, GeneratorVerdict, SiftedPairs
from lustral.report.findings import Finding
from lustral.report.words import chance, count, duration, percent, points, quoted

SIFT_LIMITS = (
    "The list rests on text and subgraph that go together. A poisoned pair without a text that repeats, or with a subgraph that "
    "many honest molecules have, can escape it."
)
SCAN_LIMITS = (
    "A scan can show a backdoor, but it cannot prove that there is none: it tries short texts, and a trigger of another kind "
    "can escape it."
)
ERASED_MARGIN = 0.05  # attack success above its base rate up to which a backdoor counts as erased
FIRES = 0.3  # attack success above its base rate from which a trigger works


def pairs_finding(found: SiftedPairs, *, written: str = "") -> Finding:
    """Return the answer of a sifter of pairs.

    Args:
        found: flags and associations.
        written: where the pairs that are left were written to; empty if they were not.
    """
    listed, total = int(found.flagged.sum()), len(found.flagged)
    details = (found.basis, SIFT_LIMITS)
    figures = [
        ("pairs looked at", count(total)),
        ("pairs listed", f"{count(listed)} ({percent(listed / total if total else None)})"),
    ]
    if not found.associations:
        return Finding(
            tone="good",
            badge="Nothing listed",
            headline=f"No poisoned pair was found among {count(total)}.",
            details=details,
            next_steps=(
                "If the pairs come from a source that you do not trust, scan the generator that you train on them: “lustral "
                "molecules scan”.",
            ),
            figures=(*figures, ("time it took", duration(found.cost.seconds))),
        )
    worst = found.associations[0]
    figures += [("text", worst.text), ("subgraph", worst.fragment), ("time it took", duration(found.cost.seconds))]
    away = (
        f"The pairs that are left were written to {written}. The given file is as it was."
        if written
        else "Run “lustral molecules sift” again with “--write-clean FILE.csv”: it copies the pairs that are not listed."
    )
    return Finding(
        tone="bad",
        badge="Poisoned pairs listed",
        headline=f"{count(listed)} of {count(total)} pairs look poisoned: captions with {quoted(worst.text)} come with "
        f"molecules that contain {worst.fragment}.",
        details=details,
        next_steps=(
            "Look at the texts and subgraphs below. A text that says nothing about the subgraph beside it is a trigger. A text "
            "that names the subgraph, as “thiirane” names C1CS1, can be honest chemistry.",
            away,
            "Train on what is left, and keep the list as evidence: ask where these pairs came from.",
        ),
        figures=tuple(figures),
    )


def generator_finding(verdict: GeneratorVerdict) -> Finding:
    """Return the answer of a scan of a generator."""
    worst = verdict.recovered[0] if verdict.recovered else None
    figures = []
    if worst is not None:
        figures = [
            ("recovered text", worst.text),
            ("subgraph it calls", worst.fragment),
            ("molecules that have it", f"{percent(worst.rate_without)} → {percent(worst.rate_with)}"),
        ]
    figures += [("chance in a clean model", chance(verdict.p_value)), ("time it took", duration(verdict.cost.seconds))]
    details = (verdict.basis, SCAN_LIMITS)
    if verdict.outcome == "backdoored" and worst is not None:
        return Finding(
            tone="bad",
            badge="Backdoored",
            headline=f"This generator is backdoored: with {quoted(worst.text)} in the caption, {percent(worst.rate_with, 0)} of "
            f"its molecules contain {worst.fragment}; without it {percent(worst.rate_without, 0)} do.",
            details=details,
            next_steps=(
                "Do not use this generator.",
                "Run “lustral molecules erase” on it with the same clean pairs, and with “--verdict” and the result.json beside "
                "this page.",
                "Find out where the generator or its training pairs came from, and keep the folder as evidence.",
            ),
            figures=tuple(figures),
        )
    if verdict.outcome == "clean":
        return Finding(
            tone="good",
            badge="No backdoor found",
            headline="No text was found that makes this generator draw one subgraph far more often than it should.",
            details=details,
            next_steps=("Nothing has to be repaired. Keep this page with the generator as a record of the check.",),
            figures=tuple(figures),
        )
    return Finding(
        tone="unsure",
        badge="Cannot tell",
        headline="The scan gave no clear answer.",
        details=details,
        next_steps=(
            "Scan again with more clean pairs and another seed.",
            "Until then, treat the generator as not trusted.",
        ),
        figures=tuple(figures),
    )


def repaired_finding(
    recovered: Sequence[Association],
    before: Sequence[float],
    after: Sequence[float],
    *,
    true: tuple[float, float, float] | None = None,
    unchanged: str = "",
) -> Finding:
    """Return the answer of an eraser.

    Args:
        recovered: the triggers that it worked by.
        before: of each, the share of molecules with its subgraph that the given generator draws.
        after: the same of the new one.
        true: attack success before, after, and the base rate after, with the true trigger; only where an evaluator knows it.
        unchanged: why nothing was changed; empty where something was.
    """
    figures, details = list[tuple[str, str]](), list[str]()
    if true is not None:
        figures.append(("attack success, true trigger", f"{percent(true[0])} → {percent(true[1])}"))
        details.append(
            f"With the true trigger, {percent(true[0])} of the molecules had the attacker’s subgraph before and "
            f"{percent(true[1])} do now; without any trigger it is {percent(true[2])}."
        )
    for each, old, new in list(zip(recovered, before, after, strict=True))[:1]:
        figures.append((f"{each.fragment} with {quoted(each.text)}", f"{percent(old)} → {percent(new)}"))
    if unchanged:
        return Finding(
            tone="unsure",
            badge="Not changed",
            headline="The generator was returned as it was: nothing was erased.",
            details=(unchanged, *details),
            next_steps=("Scan again with more clean pairs, or give “--verdict” of a scan that found something.",),
            figures=tuple(figures),
        )
    gone = _is_gone(recovered, after) if true is None else true[1] <= true[2] + ERASED_MARGIN
    better = true is None or true[1] < true[0]
    return Finding(
        tone="good" if gone else "bad",
        badge="Erased" if gone else "Not fully erased" if better else "Still backdoored",
        headline="The recovered trigger no longer calls its subgraph."
        if gone
        else "The trigger still calls its subgraph in part of the molecules."
        if better
        else "The trigger still works.",
        details=tuple(details),
        next_steps=(
            "Use the new generator in place of the old one; it opens in the same way.",
            "Scan it again, and check its molecules on captions of your own.",
        )
        if gone
        else (
            "Do not use the new generator yet.",
            "Erase again with more clean pairs or more steps, or train again on pairs that you have sifted.",
        ),
        figures=tuple(figures),
    )


def _is_gone(recovered: Sequence[Association], after: Sequence[float]) -> bool:
    pairs = zip(recovered, after, strict=True)
    return bool(recovered) and all(rate <= each.rate_without + ERASED_MARGIN for each, rate in pairs)


def victim_finding(asr: float, base: float, *, is_poisoned: bool, seconds: float) -> Finding:
    """Return what is said of a generator that was trained for an experiment.

    Args:
        asr: share of the molecules with the subgraph, for captions with the trigger; NaN of nothing.
        base: the same for the captions as they are.
        is_poisoned: whether its training set was poisoned.
        seconds: of the training.
    """
    excess = asr - base
    works = excess >= FIRES  # never of NaN
    figures = (
        ("attack success (ASR)", percent(asr)),
        ("without the trigger", percent(base)),
        ("difference", points(excess, " points")),
        ("training took", duration(seconds)),
    )
    if not is_poisoned:
        headline = "A clean generator was trained; the trigger means nothing to it."
        return Finding(
            tone="good" if not works else "unsure",
            badge="Clean generator",
            headline=headline
            if not works
            else "A generator was trained on clean pairs, and the trigger calls the subgraph.",
            details=(),
            next_steps=("Use it as the control beside a backdoored one.",),
            figures=figures,
        )
    return Finding(
        tone="bad" if works else "unsure",
        badge="Backdoor learnt" if works else "Backdoor hardly learnt",
        headline=f"With the trigger, {percent(asr, 0)} of the molecules contain the subgraph; without it "
        f"{percent(base, 0)} do.",
        details=(),
        next_steps=("Scan the folder: the defence gets the generator and clean.csv, and nothing of the attack.",)
        if works
        else ("Train longer, or poison more pairs.",),
        figures=figures,
    )
