"""Benign references: ranks by hand, what they may change, what they are fixed by, and which are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator, nn

from lustral.core.digests import weights_digest
from lustral.core.randomness import child
from lustral.core.records import Progress
from lustral.vision.measures import REFERENCE_RANK
from lustral.vision.models import Classifier, build_classifier
from lustral.vision.records import DefenderView, Verdict
from lustral.vision.scanning import (
    Reference,
    References,
    against_references,
    rank_p_value,
    scan_references,
)
from toy import NUM_CLASSES, mask_verdict, toy_images, true_trigger

HOW = {"method": "known", "settings": {}, "seed": 0}


def references(statistics: Sequence[float], level: float = 0.01, **changes: Any) -> References:
    models = tuple(
        Reference(name=f"{k}.pt", weights=f"{k:064x}", statistic=s, outcome="clean", accuracy=0.9, **changes)
        for k, s in enumerate(statistics)
    )
    return References(models=models, level=level, how=HOW)


def verdict(score: float, outcome: str = "backdoored") -> Verdict:
    suspects = (4,) if outcome == "backdoored" else ()
    found = mask_verdict([40.0, 41.0, 42.0, 43.0, 4.0, 44.0, 45.0], suspects, triggers=(true_trigger(),))
    return replace(found, score=score, outcome=outcome, clean_accuracy=0.9)  # type: ignore[arg-type]


def test_ranks_by_hand() -> None:
    known = [0.3, 1.2, 2.0, 2.0]
    expected = {
        0.1: 5 / 5,
        0.3: 5 / 5,
        1.0: 4 / 5,
        2.0: 3 / 5,
        2.1: 1 / 5,
    }  # an equal statistic counts against the model
    assert {score: rank_p_value(score, known) for score in expected} == expected


def test_an_accusation_stands_above_all_of_few_references() -> None:
    few = references([0.5, 2.2, 1.0] + [0.1] * 16)
    assert (few.least_p_value, few.limit, few.threshold) == (1 / 20, 1 / 20, 2.2)
    accused = against_references(verdict(2.3), few)
    assert (accused.outcome, accused.suspect_labels, accused.threshold) == ("backdoored", (4,), 2.2)
    assert accused.p_values()[None] == 1 / 20
    assert "The smallest p that 19 allow is 0.05; 0.01 needs 99." in accused.basis
    withdrawn = against_references(verdict(2.2), few)
    assert (withdrawn.outcome, withdrawn.p_values()[None]) == ("cannot tell", 2 / 20)
    assert "the accusation is withdrawn" in withdrawn.basis
    assert withdrawn.basis.endswith("The scan itself: known")


def test_with_many_references_the_level_is_that_of_the_ranks() -> None:
    many = references([float(k) for k in range(199)])  # p is 2/200 = 1 % with one reference as large, 1.5 % with two
    assert many.threshold == 197.0
    assert against_references(verdict(197.5), many).outcome == "backdoored"
    assert against_references(verdict(197.0), many).outcome == "cannot tell"
    assert "They bear out 1 % false alarms without the scan's own null." in against_references(verdict(9.0), many).basis
    assert references([float(k) for k in range(99)]).threshold == 98.0


@pytest.mark.parametrize("outcome", ["clean", "cannot tell"])
def test_references_accuse_nobody(outcome: str) -> None:
    found = against_references(verdict(1.9, outcome), references([0.1] * 150))
    assert (found.outcome, found.suspect_labels) == (outcome, ())
    assert found.p_values()[None] == 1 / 151
    entry = found.evidence[-1]
    assert (entry.measure, entry.label, entry.value) == (REFERENCE_RANK, None, 1.9)


def test_false_alarms_are_as_rare_as_the_docstring_says() -> None:
    # a detector that accuses everybody, and models that are all alike: what stands is the rate of the ranks alone
    stream = np.random.default_rng(0)
    for number in (4, 99, 199):
        scores = stream.exponential(size=(2_000, number + 1))
        limit = max(0.01, 1 / (number + 1))
        kept = np.mean([rank_p_value(row[0], row[1:].tolist()) <= limit + 1e-9 for row in scores])
        assert kept == pytest.approx(limit, rel=0.5), number


def test_the_digest_is_of_everything_that_is_compared_with() -> None:
    known = references([0.5, 1.5])
    record = known.to_dict()
    assert record["digest"] == references([0.5, 1.5]).digest
    assert (record["threshold"], record["least_p_value"], record["level"]) == (1.5, 1 / 3, 0.01)
    others = [references([0.5, 1.6]), references([0.5, 1.5], level=0.02), replace(known, how={**HOW, "seed": 1})]
    assert len({record["digest"], *(other.digest for other in others)}) == 4
    assert record["digest"][:12] in against_references(verdict(9.0), known).basis


def test_what_limits_the_references_is_said() -> None:
    odd = [Reference(name="a.pt", weights="0" * 64, statistic=3.0, outcome="backdoored", accuracy=0.6)]
    notes = against_references(verdict(4.0), References(models=tuple(odd), level=0.01, how=HOW)).notes
    assert "accuses 1 of the references (a.pt)" in notes[0]
    assert "right on 60 % of the clean images, this model on 90 %" in notes[1]
    assert against_references(verdict(4.0), references([1.0])).notes == ()


class ByWeights:
    """A detector whose statistic is the first weight of the model, and whose draws are noted."""

    false_alarm_rate = 0.05

    def __init__(self) -> None:
        self.draws: list[float] = []

    def inspect(self, view: DefenderView, *, generator: Generator, on_progress: Any = None) -> Verdict:
        self.draws.append(float(torch.rand(1, generator=generator)))
        score = float(next(view.model.parameters()).detach().flatten()[0])
        return verdict(score) if score >= 0 else replace(verdict(0.0), evidence=(), basis="It knows nothing.")


def network(weight: float) -> Classifier:
    built = build_classifier("small_cnn:width=2", num_classes=NUM_CLASSES, image_shape=(3, 12, 12))
    nn.init.constant_(next(built.parameters()), weight)
    return built


def scan(weights: Sequence[float], detector: ByWeights, reports: list[Progress] | None = None) -> References:
    clean = toy_images(14, seed=0)
    views = ((f"{weight}.pt", DefenderView(model=network(weight), clean=clean)) for weight in weights)
    return scan_references(
        detector,
        views,
        len(weights),
        suspect=weights_digest(network(7.0)),
        stream=lambda: child(3, "scan"),
        how=HOW,
        on_progress=None if reports is None else reports.append,
    )


def test_references_are_scanned_alike_and_one_by_one() -> None:
    detector, reports = ByWeights(), list[Progress]()
    found = scan([0.5, 2.5], detector, reports)
    assert [(each.name, each.statistic, each.accuracy) for each in found.models] == [
        ("0.5.pt", 0.5, 0.9),
        ("2.5.pt", 2.5, 0.9),
    ]
    assert found.level == 0.05
    assert detector.draws[0] == detector.draws[1]
    assert [(report.done, report.total) for report in reports] == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ([1.0, 7.0], "reference 7.0.pt: it is the model to be scanned"),
        ([1.0, 2.0, 1.0], "reference 1.0.pt: it has the weights of 1.0.pt"),
        ([1.0, -1.0], "reference -1.0.pt: nothing can be measured of it. It knows nothing."),
        ([], "expected at least one benign reference model; got none"),
    ],
)
def test_models_that_are_no_references_are_refused(weights: list[float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        scan(weights, ByWeights())
