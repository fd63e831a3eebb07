"""What a report says of a trigger that is no patch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lustral.report.findings import scan_finding
from toy import mask_verdict, true_trigger

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


@pytest.mark.parametrize(
    ("kind", "said"), [("patch", "a small pattern turns"), ("faint", "a faint change of the whole")]
)
def test_the_headline_says_the_kind_of_trigger(kind: str, said: str) -> None:
    trigger = replace(true_trigger(), kind=kind)
    verdict = mask_verdict([60.0] * 4 + [4.0] + [60.0] * 2, suspects=(4,), triggers=(trigger,))
    finding = scan_finding(verdict, NAMES, 144)
    assert said in finding.headline
    assert "“eel”" in finding.headline
    assert any("px" in sentence for sentence in finding.details) == (kind == "patch")
