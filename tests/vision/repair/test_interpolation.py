"""Part of the way back to the given weights, against hand arithmetic."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lustral.core.cost import CostMeter
from lustral.vision.records import ImageSet, RecoveredTrigger
from lustral.vision.repair.interpolation import Point, at_share, least_firing_point
from passes import counting


class Line(nn.Module):
    """Two classes of one pixel: class 1 where a x + b > 0. The trigger makes the pixel white, 1."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        score = self.a * x.flatten(1)[:, 0] + self.b
        return torch.stack([torch.zeros_like(score), score], 1)


def pixels(values: list[int], labels: list[int]) -> ImageSet:
    images = torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1)
    return ImageSet(images=images, labels=torch.tensor(labels), num_classes=2)


WHITE = RecoveredTrigger(
    target_label=1,
    masks=torch.ones(1, 1, 1, 1),
    patterns=torch.ones(1, 1, 1, 1),
    area=1.0,
    attack_success_rate=1.0,
    entropy=0.0,
)
DARK = pixels([0, 51, 102, 153, 204], [0] * 5)  # 0, .2, .4, .6 and .8
GIVEN, REPAIRED = (1.0, -0.9), (1.0, -1.9)  # the trigger fires where b > -1, so below a share of 0.1


def point(given: nn.Module, repaired: nn.Module, held_out: ImageSet, **rest: Any) -> Point:
    return least_firing_point(given, repaired, fit=held_out, held_out=held_out, **{"triggers": (WHITE,), **rest})


def test_the_repaired_end_is_taken_where_it_holds_the_accuracy() -> None:
    repaired = Line(*REPAIRED)
    found = point(Line(*GIVEN), repaired, DARK, floor=0.9)
    assert (found.share, found.admissible, found.notes) == (1.0, True, ())
    assert (found.measured.clean_accuracy, found.measured.recovered_asr) == (1.0, 0.0)
    assert found.model is not repaired


def test_of_points_that_hold_the_accuracy_the_one_that_fires_least() -> None:
    # The repaired end calls everything class 1 that is above 0.1: b(s) = -0.9 + 0.8 s; the trigger fires everywhere.
    found = point(Line(*GIVEN), Line(1.0, -0.1), DARK, floor=0.8)
    assert found.admissible
    assert found.measured.recovered_asr == 1.0
    assert found.share == pytest.approx(0.3)  # b = -0.66: .8 alone is called 1; at 0.4 b = -0.58: .6 too
    assert "30 %" in found.notes[0]


def test_a_trigger_that_stops_firing_on_the_way_back() -> None:
    # Class 1 images at 0.95 are lost from b = -0.95 on; the trigger at 1 fires until b = -1.
    mixed = pixels([0, 51, 102, 250], [0, 0, 0, 1])
    found = point(Line(*GIVEN), Line(*REPAIRED), mixed, floor=0.7)
    assert found.share == 1.0  # 3 of 4 right are enough
    strict = point(Line(*GIVEN), Line(*REPAIRED), mixed, floor=1.0)
    assert strict.admissible
    assert strict.share == 0.0  # b = -1.0 at 0.1 loses the fourth image already
    assert "given weights were kept" in strict.notes[0]


def test_without_triggers_the_most_repaired_point_that_holds() -> None:
    found = point(Line(*GIVEN), Line(1.0, -0.1), DARK, floor=0.8, triggers=())
    assert found.share == pytest.approx(0.3)


def test_where_nothing_holds_the_most_accurate() -> None:
    found = point(Line(1.0, -0.5), Line(1.0, -0.1), DARK, floor=0.9, shares=(0.5,))
    assert not found.admissible
    assert found.share == 0.5  # b = -0.3: 2 of 5 right; 1 at the end


@pytest.mark.parametrize("shares", [(0.1, 0.2), (1.0, 0.5), (0.5, -0.1)])
def test_shares_are_checked(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="falling shares"):
        point(Line(*GIVEN), Line(*REPAIRED), DARK, floor=0.5, shares=shares)


def test_other_architectures_have_no_way_between_them() -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    found = point(Line(*GIVEN), other, DARK, floor=2.0)
    assert found.share == 1.0
    assert not found.admissible


def normed(weight: float, mean: float) -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(1, 2)
    )
    with torch.no_grad():
        network[0].weight.fill_(weight)
    network[1].running_mean.fill_(mean)
    return network


def test_statistics_between_the_ends_are_those_of_the_clean_images_without_dropout() -> None:
    given, repaired = normed(1.0, 0.3), normed(3.0, 9.0)
    with counting(DARK.image_shape) as thirds, CostMeter(given, clean_images=5) as meter:
        middle = at_share(given, repaired, 0.5, DARK)
    assert meter.cost.image_passes == pytest.approx(thirds[0] / 3)
    assert isinstance(middle, nn.Sequential)
    assert middle[0].weight.item() == 2.0
    assert middle[1].running_mean.item() == pytest.approx(2 * 0.4)  # of 0, .2, .4, .6, .8
    assert middle[1].running_var.item() == pytest.approx(4 * 0.1)
    assert middle[1].momentum == 0.1
    assert not any(module.training for module in middle.modules())
    for share, end in ((0.0, given), (1.0, repaired)):
        state = at_share(given, repaired, share, DARK).state_dict()
        assert all(torch.equal(value, state[name]) for name, value in copy.deepcopy(end).state_dict().items())


@pytest.mark.parametrize(("floor", "share"), [(0.7, 1.0), (0.9, 0.9)])
def test_of_silent_points_the_most_repaired_that_holds_the_floor(floor: float, share: float) -> None:
    # a(s) = 1 - 2 s, b(s) = -0.9 + s: nothing fires from s = 0.1 on; only at s = 1 black is called 1, so 4 of 5 are right.
    found = point(Line(*GIVEN), Line(-1.0, 0.1), DARK, floor=floor)
    assert found.share == share
    assert (found.measured.clean_accuracy, found.measured.recovered_asr) == (1.0 if share < 1 else 0.8, 0.0)
    assert found.notes == () or "too much clean accuracy was lost" in found.notes[0]
