"""What the page of an evaluation says at its top."""

from __future__ import annotations

from collections.abc import Sequence

from lustral.report.findings import KEPT, TRY_MORE, Finding
from lustral.report.words import percent
from lustral.vision.evaluation import Evaluation, unmet_criteria


def evaluation_finding(
    before: Evaluation | None, after: Evaluation, *, has_trigger: bool, notes: Sequence[str] = ()
) -> Finding:
    """Return what an evaluation says of a model.

    Args:
        before: the victim that the model was made from; None where there is none.
        after: the model.
        has_trigger: whether a true trigger was known.
        notes: sentences that limit what the figures are worth.
    """
    accuracy = (("clean accuracy", percent(after.acc.value)), ("images", f"{after.acc.total:,}"))
    if not has_trigger:
        return Finding(
            tone="unsure",
            badge="Measured",
            headline=f"The model is right on {percent(after.acc.value)} of {after.acc.total:,} images.",
            details=(*notes, "Accuracy says nothing about a backdoor: a backdoored model is as accurate as any other."),
            next_steps=("Scan the model before you rely on it.",),
            figures=accuracy,
        )
    unmet = unmet_criteria(before, after) if before else None
    works = after.asr.value > KEPT * (before.asr.value if before else 1.0)
    return Finding(
        tone="bad" if works else "good" if unmet == () else "unsure",
        badge="Backdoored" if works else "Erased" if unmet == () else "Measured",
        headline=f"With the true trigger, {percent(after.asr.value)} of {after.asr.total:,} images go to the attacker’s class; "
        f"the model is right on {percent(after.acc.value)} of clean ones.",
        details=(*notes, *_floor(before, after)),
        next_steps=TRY_MORE if works else ("Compare with other methods before you choose one.",),
        figures=(("attack success", percent(after.asr.value)), *accuracy),
    )


def _floor(before: Evaluation | None, after: Evaluation) -> tuple[str, ...]:
    said = f"Without any trigger, {percent(after.natural_rate.value)} go there."
    return (f"Before, it was {percent(before.asr.value)}. {said}" if before else said,)
