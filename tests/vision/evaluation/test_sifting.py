"""How sifters are measured: golden values from the plain definitions, and what happens where there is nothing to count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lustral.vision.evaluation import SiftingRates, auprc, auroc, score_histogram, sifting_rates

SCORED = st.lists(st.tuples(st.integers(-3, 3), st.booleans(), st.booleans()), min_size=1, max_size=30)


def tensors(rows: list[tuple[int, bool, bool]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, poisoned, flagged = zip(*rows, strict=True)
    return torch.tensor(scores).float(), torch.tensor(poisoned), torch.tensor(flagged)


@given(SCORED)
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[int, bool, bool]]) -> None:
    scores, poisoned, _ = tensors(rows)
    pairs = [(p, n) for p in scores[poisoned].tolist() for n in scores[~poisoned].tolist()]
    found = auroc(scores, poisoned)
    if not pairs:
        assert math.isnan(found)
    else:
        assert found == pytest.approx(sum((p > n) + 0.5 * (p == n) for p, n in pairs) / len(pairs))
        assert auroc(-scores, poisoned) == pytest.approx(1 - found)


@given(SCORED)
def test_auprc_sums_precision_over_the_thresholds(rows: list[tuple[int, bool, bool]]) -> None:
    scores, poisoned, _ = tensors(rows)
    found = auprc(scores, poisoned)
    if not poisoned.any():
        assert math.isnan(found)
        return
    expected, before = 0.0, 0.0
    for line in sorted(set(scores.tolist()), reverse=True):
        listed = scores >= line
        recall = float((listed & poisoned).sum() / poisoned.sum())
        expected += float((listed & poisoned).sum() / listed.sum()) * (recall - before)
        before = recall
    assert found == pytest.approx(expected)


def test_the_rates_of_a_list_by_hand() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    poisoned = torch.tensor([True, False, True, False, False, True])
    cover = torch.tensor([False, False, False, True, False, False])
    found = sifting_rates(scores, scores > 5.5, poisoned, cover)
    assert [(rate.hits, rate.total) for rate in (found.tpr, found.fpr, found.precision)] == [(2, 3), (1, 2), (2, 3)]
    assert (found.listed.hits, found.listed.total) == (4, 6)  # the cover too
    assert (found.covers_listed.hits, found.covers_listed.total) == (1, 1)
    assert found.auroc == pytest.approx((2 + 1 + 0) / 6)  # the cover is in no pair
    assert found.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert SiftingRates.from_dict(found.to_dict()) == found


def test_rates_of_nothing_are_no_numbers() -> None:
    scores, none, every = torch.arange(4.0), torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    clean = sifting_rates(scores, scores > 2, none)
    assert all(map(math.isnan, (clean.auroc, clean.auprc, clean.tpr.value, clean.f1, clean.covers_listed.value)))
    assert (clean.fpr.value, clean.precision.value) == (0.25, 0.0)
    record = clean.to_dict()
    assert [record[name] for name in ("auroc", "auprc", "f1")] == [None, None, None]
    assert math.isnan(SiftingRates.from_dict(record).auroc)
    silent = sifting_rates(scores, none, scores > 2)
    assert (silent.f1, silent.tpr.value, silent.listed.value) == (0.0, 0.0, 0.0)
    assert math.isnan(silent.precision.value)
    assert math.isnan(sifting_rates(scores, every, every).fpr.value)
    assert auroc(torch.zeros(4), scores > 2) == 0.5


def test_scores_that_are_no_numbers_are_the_most_suspicious() -> None:
    scores = torch.tensor([0.0, math.nan, 1.0, -math.inf])
    assert auroc(scores, torch.tensor([False, True, False, True])) == 1.0
    assert auroc(torch.tensor([math.nan, math.inf]), torch.tensor([True, False])) == 0.5


def test_a_histogram_counts_every_image_once() -> None:
    scores = torch.tensor([0.0, 0.1, 0.5, 1.0, math.nan, 0.55])
    poisoned = torch.tensor([False, False, True, True, True, False])
    cover = torch.tensor([False, True, False, False, False, False])
    found = score_histogram(scores, poisoned, cover, bins=2)
    assert found == {
        "edges": [0.0, 0.5, 1.0],
        "clean": [1, 1],
        "poisoned": [0, 2],
        "cover": [1, 0],
        "not_finite": [0, 1, 0],
    }
    assert score_histogram(torch.ones(3), torch.zeros(3, dtype=torch.bool), bins=2)["clean"] == [3, 0]
    assert score_histogram(torch.full((2,), math.nan), torch.ones(2, dtype=torch.bool), bins=2)["not_finite"] == [
        0,
        2,
        0,
    ]


def test_flags_that_do_not_fit_are_refused() -> None:
    good = torch.zeros(3, dtype=torch.bool)
    for scores, flagged, poisoned in (
        (torch.zeros(3), good[:2], good),
        (torch.zeros(3), good.long(), good),
        (torch.zeros(3), good, good[:2]),
        (torch.zeros(3, 1), good, good),
    ):
        with pytest.raises(ValueError, match="expected one"):
            sifting_rates(scores, flagged, poisoned)
