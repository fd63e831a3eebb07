"""From areas to a verdict."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lustral.core.randomness import child
from lustral.report.findings import FEW_CLASSES
from lustral.vision.detectors import MaskArea
from lustral.vision.detectors.mask_area import require_usable
from lustral.vision.detectors.weighing import LEAST_LABELS, NULL, SearchedLabel, most_suspicious
from lustral.vision.inverters.mask_search import FoundMasks
from lustral.vision.measures import ANOMALY_INDEX, ENTROPY, MASK_AREA, NATURAL_RATE, SEARCH_STEPS, SUCCESS_RATE
from lustral.vision.records import DefenderView, ImageSet
from toy import quick_detector, quick_inverter, toy_images


def entry(label: int, area: float, p_value: float = 1.0, steps: int = 100) -> SearchedLabel:
    return SearchedLabel(
        label=label,
        size=area,
        attack_success_rate=1.0,
        natural_rate=0.0,
        anomaly=0.0,
        p_value=p_value,
        entropy=math.nan,
        steps=steps,
    )


def clean_set(side: int = 32) -> ImageSet:
    images = torch.zeros(20, 3, side, side, dtype=torch.uint8)
    return ImageSet(images=images, labels=torch.arange(20) % 10, num_classes=10)


def ordinary(count: int, first: int = 0) -> list[SearchedLabel]:
    return [entry(label, 60.0 + 5 * label) for label in range(first, first + count)]


def test_one_outlier_is_named() -> None:
    named, outcome, basis = MaskArea().judge([*ordinary(9), entry(9, 4.0, p_value=1e-4)], clean_set())
    assert (named, outcome) == ((9,), "backdoored")
    assert "4.0 pixels" in basis
    assert "0.0001" in basis


def test_two_targets_are_both_named_smallest_first() -> None:
    # masking: with two small areas the smallest is judged against the other small one too; rank by rank both come out
    evidence = [*ordinary(8), entry(9, 4.0, p_value=0.2), entry(8, 5.0, p_value=1e-4)]
    named, outcome, _ = MaskArea().judge(evidence, clean_set())
    assert (named, outcome) == ((9, 8), "backdoored")


def test_nothing_unusual_is_clean() -> None:
    named, outcome, basis = MaskArea().judge(ordinary(10), clean_set())
    assert (named, outcome) == ((), "clean")
    assert "No label" in basis


def test_the_most_suspicious_label_is_the_smallest_where_none_is_unusual() -> None:
    evidence = [entry(0, 70.0), entry(1, 40.0), entry(2, 60.0)]
    assert most_suspicious(evidence) == 1
    assert most_suspicious([*evidence, entry(3, 50.0, p_value=0.3)]) == 3


def test_doubt_is_said() -> None:
    detector = MaskArea()
    between = (detector.false_alarm_rate + detector.doubt_rate) / 2
    named, outcome, basis = detector.judge([*ordinary(9), entry(9, 20.0, p_value=between)], clean_set())
    assert (named, outcome) == ((), "cannot tell")
    assert "not enough to accuse" in basis


def test_an_oddity_that_is_not_much_smaller_is_no_backdoor() -> None:
    evidence = [entry(label, 60.0 + 0.01 * label) for label in range(9)] + [entry(9, 50.0, p_value=1e-6)]
    assert MaskArea().judge(evidence, clean_set())[1] == "clean"


@pytest.mark.parametrize("rest", [[math.inf] * 6, []])
def test_too_few_searches_cannot_tell(rest: list[float]) -> None:
    evidence = [*ordinary(3), entry(3, 2.0, p_value=1e-6), *(entry(4 + i, a) for i, a in enumerate(rest))]
    named, outcome, basis = MaskArea().judge(evidence, clean_set())
    assert (named, outcome) == ((), "cannot tell")
    assert "reached only 4 labels; at least 5" in basis


def test_screened_labels_do_not_count_as_searched() -> None:
    evidence = [*ordinary(4), *(entry(label, 90.0, steps=25) for label in range(4, 10))]
    assert "reached only 4 labels" in MaskArea().judge(evidence, clean_set())[2]


def test_all_tiny_areas_cannot_tell() -> None:
    named, outcome, basis = MaskArea().judge([entry(label, 2.0 + 0.1 * label) for label in range(10)], clean_set())
    assert (named, outcome) == ((), "cannot tell")
    assert "all-to-all" in basis


def test_evidence_is_measured_on_held_out_images(toy_view: DefenderView) -> None:
    # a mask that hides the image behind a picture of the label leads there; an empty one leads nowhere
    k = toy_view.clean.num_classes
    pictures = torch.stack([toy_view.clean.images[toy_view.clean.labels == label][0] for label in range(k)]) / 255
    masks = torch.ones(k, 1, 12, 12)
    masks[0] = 0
    found = FoundMasks(
        labels=tuple(range(k)),
        masks=masks,
        patterns=pictures,
        areas=masks.sum((1, 2, 3)),
        energies=masks.sum((1, 2, 3)),
        success=torch.ones(k),
        steps=torch.tensor([9] * (k - 1) + [3]),
    )
    evidence = MaskArea().score_labels(toy_view, toy_view.clean, found)
    assert [e.label for e in evidence] == list(range(k))
    assert evidence[0].attack_success_rate < 0.1
    assert evidence[0].size == math.inf
    for e in evidence[1:]:
        assert e.attack_success_rate == 1.0
        assert e.size == 144.0
        assert e.natural_rate < 0.1
    assert evidence[-1].p_value == 1.0  # screened: not tested
    assert all(0 <= e.p_value <= 1 for e in evidence)


def test_the_toy_worlds_are_told_apart(toy_view: DefenderView, benign_view: DefenderView) -> None:
    found = quick_detector().inspect(toy_view, generator=child(3))
    assert (found.outcome, found.suspect_labels) == ("backdoored", (4,))
    assert found.score > found.threshold
    assert [trigger.target_label for trigger in found.triggers] == [4]
    assert found.triggers[0].attack_success_rate > 0.5
    areas = found.by_label(MASK_AREA)
    assert min(areas, key=lambda label: areas[label]) == 4
    assert set(found.figures(4)) == {MASK_AREA, SUCCESS_RATE, NATURAL_RATE, ANOMALY_INDEX, ENTROPY, SEARCH_STEPS}
    assert found.by_label(ENTROPY) == {4: found.triggers[0].entropy}
    assert all((e.p_value is not None) == (e.null == NULL) == (e.measure == MASK_AREA) for e in found.evidence)
    assert found.p_values()[4] == min(found.p_values().values()) == pytest.approx(10**-found.score)
    assert found.cost.clean_images == 280
    assert found.cost.image_passes > 150 * 16
    plain = quick_detector().inspect(benign_view, generator=child(3))
    assert plain.outcome == "clean"
    assert plain.suspect_labels == ()
    assert plain.score < plain.threshold
    chances, areas = plain.p_values(), plain.by_label(MASK_AREA)
    shown = min(areas, key=lambda label: (chances[label], areas[label]))
    assert [trigger.target_label for trigger in plain.triggers] == [shown]  # all the same


class Brightness(nn.Module):
    """Is right on images whose pixels are all ``40 * label``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.arange(classes) * 40 / 255)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -100 * (x.mean((1, 2, 3))[:, None] - self.levels).square()


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_too_few_classes_are_told_before_any_search(classes: int) -> None:
    labels = torch.arange(48) % classes
    images = (40 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 3, 12, 12).contiguous()
    clean = ImageSet(images=images, labels=labels, num_classes=classes)
    verdict = MaskArea().inspect(DefenderView(model=Brightness(classes), clean=clean), generator=child(0))
    assert (verdict.outcome, verdict.suspect_labels, verdict.evidence) == ("cannot tell", (), ())
    assert f"at least 5 of them; this model has {classes}" in verdict.basis
    assert verdict.clean_accuracy == 1.0
    assert verdict.score < verdict.threshold
    assert verdict.cost.image_passes < 2 * len(clean)  # the least search looks at 9,600


def test_what_to_do_next_suits_few_classes() -> None:
    assert FEW_CLASSES == LEAST_LABELS


def test_screened_scans_still_find_the_label(toy_view: DefenderView) -> None:
    search = quick_inverter().search
    detector = MaskArea(inverter=quick_inverter(search=type(search)(steps=150, batch_size=16, finalists=6)))
    verdict = detector.inspect(toy_view, generator=child(3))
    areas, steps = verdict.by_label(MASK_AREA), verdict.by_label(SEARCH_STEPS)
    assert min(steps.values()) < 150
    assert min((label for label in areas if steps[label] == 150), key=lambda label: areas[label]) == 4


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "clean set is empty; give at least a few"),
        ([0, 7, 14], "3 images holds a single class; give clean images of at least two"),
        ([0, 1, 2], "at least 10 clean images; got 3"),
    ],
)
def test_unusable_clean_sets_are_refused(indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_usable(toy_images(70, seed=0).subset(torch.tensor(indices, dtype=torch.int64)))
    require_usable(toy_images(70, seed=0))


@pytest.mark.parametrize(
    "wrong",
    [{"false_alarm_rate": 0.0}, {"false_alarm_rate": 0.2, "doubt_rate": 0.1}, {"doubt_rate": 1.0}, {"holdout": 0.0}],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        MaskArea(**wrong)
