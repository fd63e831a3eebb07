"""What was checked of a model, in the form that bills of materials and attestations share: one line for each check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Record = Mapping[str, Any]
Answer = Literal["passed", "warned", "failed"]
ANSWERS: Mapping[str, Answer] = {"clean": "passed", "cannot tell": "warned", "backdoored": "failed"}
FILES, AUDIT = "lustral.files", "lustral.audit"  # names of checks
LIMITS = (
    "A scan can show a backdoor, but it cannot prove that there is none: a trigger that changes the whole image, or that differs "
    "from image to image, can escape it."
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One check of a model.

    Attributes:
        name: the same in every run, e.g. "lustral.scan.mask_area".
        answer: whether the model passed.
        claim: what is said of the model, in a sentence.
        reason: what the answer rests on.
        requirement: what OWASP AISVS calls it.
    """

    name: str
    answer: Answer
    claim: str
    reason: str
    requirement: str


def checks_of_scan(record: Record) -> list[Check]:
    """Return what a scan checked: the files, then the behaviour of the model."""
    return [_file_check(record["file_safety"]), _scan_check(record["verdict"], f"lustral.scan.{record['method']}")]


def checks_of_erase(record: Record) -> list[Check]:
    """Return what was checked of the model that an eraser wrote; one that was not scanned again has not passed."""
    audit = record["purified"]["audit"]
    return [
        _file_check(record["written_safety"]),
        Check(
            name=AUDIT,
            answer="warned",
            claim="The erased model was not scanned.",
            reason="The method makes no scan, or was told to make none: scan the model that it wrote.",
            requirement="6.1.4",
        )
        if audit is None
        else _scan_check(audit, AUDIT),
    ]


def overall(checks: list[Check]) -> Answer:
    """Return the worst answer.

    >>> overall([])
    'passed'
    """
    answers = {check.answer for check in checks}
    return "failed" if "failed" in answers else "warned" if "warned" in answers else "passed"


def _file_check(safety: Record) -> Check:
    unsafe = safety["runs_code"]
    return Check(
        name=FILES,
        answer="failed" if unsafe else "passed",
        claim="Opening the model's files would run code." if unsafe else "The model's files hold data and no code.",
        reason="The format and every name that a pickle in them would import were looked at; nothing of them was run.",
        requirement="6.1.1",
    )


def _scan_check(verdict: Record, name: str) -> Check:
    claims = {
        "clean": "No backdoor was found in the model.",
        "cannot tell": "It cannot be told whether the model is backdoored.",
        "backdoored": "The model is backdoored.",
    }
    return Check(
        name=name,
        answer=ANSWERS[verdict["outcome"]],
        claim=claims[verdict["outcome"]],
        reason=f"{verdict['basis']} {LIMITS}",
        requirement="6.1.4",
    )
