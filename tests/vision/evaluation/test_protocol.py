"""Evaluating victims: records, JSON, and the comparison of before and after."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Generator, Tensor, nn

from lustral.core.randomness import child
from lustral.core.rates import Rate
from lustral.vision.evaluation import Evaluation, compare_evaluations, evaluate
from lustral.vision.records import ImageSet, Victim


class Backdoored(nn.Module):
    """Tells dark (0) from bright (1) images by the first pixel; a lit last pixel forces class 1."""

    def forward(self, images: Tensor) -> Tensor:
        bright, lit = images[:, 0, 0, 0] > 0.5, images[:, 0, -1, -1] > 0.5
        is_one = (bright | lit).float()
        return torch.stack([1 - is_one, is_one], 1)


class Repaired(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        bright = (images[:, 0, 0, 0] > 0.5).float()
        return torch.stack([1 - bright, bright], 1)


def light_the_last_pixel(images: Tensor, *, generator: Generator | None = None) -> Tensor:
    triggered = images.clone()
    triggered[..., -1, -1] = 1
    return triggered


@pytest.fixture
def test_set() -> ImageSet:
    images = torch.zeros(8, 1, 3, 3, dtype=torch.uint8)
    images[4:, 0, 0, 0] = 255
    return ImageSet(images=images, labels=torch.tensor([0] * 4 + [1] * 4), num_classes=2)


@pytest.fixture
def victim() -> Victim:
    return Victim(
        model=Backdoored(),
        trigger=light_the_last_pixel,
        relabel=lambda labels, _: torch.ones_like(labels),
        poisoned=None,
        provenance={},
        metrics={},
    )


def test_before_and_after_by_hand(victim: Victim, test_set: ImageSet) -> None:
    before = evaluate(victim, None, test_set, generator=child(0))
    assert (before.acc, before.asr, before.ra) == (Rate(8, 8), Rate(4, 4), Rate(0, 4))
    assert before.natural_rate == Rate(0, 4)
    assert before.per_class == (Rate(4, 4), Rate(4, 4))
    assert not before.non_finite
    after = evaluate(victim, Repaired(), test_set, generator=child(0))
    assert (after.asr, after.ra) == (Rate(0, 4), Rate(4, 4))
    assert compare_evaluations(before, after) == {
        "der": 1.0,
        "rir": 1.0,
        "acc_loss": 0.0,
        "asr_drop": 1.0,
        "ra_gain": 1.0,
        "erased": True,
    }
    assert compare_evaluations(before, before)["erased"] is False


def test_records_survive_json(victim: Victim, test_set: ImageSet) -> None:
    only_class_1 = test_set.subset(torch.arange(4, 8))
    record = evaluate(victim, None, only_class_1, generator=child(0))
    written = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert written == record.to_dict()
    assert Evaluation.from_dict(written) == record
    assert written["asr"] == {"value": None, "low": None, "high": None, "hits": 0, "n": 0}
    assert written["per_class"][0]["value"] is None
    comparison = compare_evaluations(record, record)
    assert comparison["der"] is None
    assert comparison["erased"] is None
    json.dumps(comparison, allow_nan=False)


def test_a_broken_model_is_flagged_and_never_called_erased(victim: Victim, test_set: ImageSet) -> None:
    class HalfBroken(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = Repaired()(images)
            return torch.where(images[:, :1, 0, 0] > 0.5, torch.full_like(logits, math.nan), logits)

    after = evaluate(victim, HalfBroken(), test_set, generator=child(0))
    assert after.non_finite
    assert after.num_non_finite == 4  # the four bright images; the attackable ones are dark
    assert after.acc == Rate(4, 8)
    assert compare_evaluations(evaluate(victim, None, test_set, generator=child(0)), after)["erased"] is False


def test_destroying_the_model_is_not_erasing() -> None:
    def record(acc: int, asr: int, ra: int) -> Evaluation:
        return Evaluation(
            acc=Rate(acc, 100),
            asr=Rate(asr, 100),
            ra=Rate(ra, 100),
            natural_rate=Rate(1, 100),
            per_class=(),
            num_non_finite=0,
        )

    before = record(92, 99, 1)
    assert compare_evaluations(before, record(91, 2, 88))["erased"] is True
    assert compare_evaluations(before, record(50, 0, 48))["erased"] is False  # accuracy gone
    assert compare_evaluations(before, record(91, 0, 20))["erased"] is False  # triggered images not recognised
    assert compare_evaluations(before, record(91, 8, 85))["erased"] is False  # trigger still works


def test_an_empty_test_set_is_refused(victim: Victim, test_set: ImageSet) -> None:
    with pytest.raises(ValueError, match="at least one test image"):
        evaluate(victim, None, test_set.subset(torch.tensor([], dtype=torch.int64)), generator=child(0))
