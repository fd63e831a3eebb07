"""A scan that has to end: what is left out, what is said of it, and that nothing changes without a limit. Clocks are made up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lustral.core.cost import Deadline
from lustral.core.randomness import child
from lustral.core.records import Cost
from lustral.vision.detectors import Cascade, MaskArea, cascade, weighing
from lustral.vision.detectors.size_search import SizeSearch
from lustral.vision.detectors.small_areas import log_area, p_values
from lustral.vision.detectors.weighing import SearchedLabel, usable_labels, weigh_labels
from lustral.vision.inverters import MaskSearch
from lustral.vision.inverters.mask_search import FoundMasks, _Candidates, _Ration
from lustral.vision.models import build_classifier
from lustral.vision.records import DefenderView, Verdict
from lustral.vision.scanning import inspect_within
from toy import NUM_CLASSES, passes_for_good, toy_images

SEARCH = MaskSearch(
    steps=60, batch_size=8
)  # three starts: 10 steps of 3 x 4 images, then 50 of 8, is 520 for each label
ORDER = (4, 2, 0, 6, 5, 3, 1)


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def view() -> DefenderView:
    """An untrained network and some images: enough where the searches are made up."""
    network = build_classifier("small_cnn:width=2", num_classes=NUM_CLASSES, image_shape=(3, 12, 12))
    return DefenderView(model=network.eval(), clean=toy_images(70, seed=2))


@pytest.fixture
def second_per_image(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each image of a search take a second, and do nothing."""

    def step(self: Any, rows: torch.Tensor, step: int, batch: int) -> None:
        clock.now += len(rows) * batch

    monkeypatch.setattr(_Candidates, "step", step)


def search(view: DefenderView, deadline: Deadline | None, method: MaskSearch = SEARCH) -> FoundMasks:
    labels = range(NUM_CLASSES)
    return method.run(view.model, view.clean, labels, generator=child(0), order=ORDER, deadline=deadline)


def test_time_enough_changes_nothing(view: DefenderView, clock: Clock) -> None:
    quick = MaskSearch(steps=6, batch_size=4)
    free, limited = search(view, None, quick), search(view, Deadline.after(1.0, clock), quick)
    assert (limited.left_out, limited.population) == ((), NUM_CLASSES)
    for part in ("masks", "patterns", "areas", "energies", "success", "steps"):
        assert torch.equal(getattr(free, part), getattr(limited, part)), part


@pytest.mark.usefixtures("second_per_image")
def test_labels_that_come_last_are_left_out(view: DefenderView, clock: Clock) -> None:
    # after five steps of 84 images, 460 are needed for each label that stays: 2440 / 460 is 5
    found = search(view, Deadline.after(2860.0, clock))
    assert set(found.left_out) == set(ORDER[5:])
    assert found.steps.tolist() == [5 if label in ORDER[5:] else 60 for label in range(NUM_CLASSES)]
    assert clock.now == 100 + 5 * 84 + 5 * 460
    assert found.population == 5


@pytest.mark.usefixtures("second_per_image")
@pytest.mark.parametrize(("seconds", "steps"), [(1.0, 1), (100.0, 2), (1800.0, 5), (2200.0, 0)])
def test_a_search_that_does_not_end_in_time_has_searched_nothing(
    seconds: float, steps: int, view: DefenderView, clock: Clock
) -> None:
    found = search(view, Deadline.after(seconds, clock))
    assert found.left_out == tuple(range(NUM_CLASSES))
    assert steps in (0, int(found.steps.max()))
    assert clock.now - 100 <= seconds + 84  # the step that it was at


def test_screened_labels_are_left_out_in_proportion(clock: Clock) -> None:
    # 29 of 43 are left after a screening, at a second an image: there is time for 20 of them
    method = replace(SEARCH, starts=1)
    ration = _Ration(method, Deadline.after(method._images_left(20, 15) + 9.0, clock), range(43), range(43))
    ration.count(8)
    ration.count(9)
    clock.now += 9
    assert ration.cut(torch.arange(29), 15).tolist() == list(range(20))
    assert ration.population == round(43 * 20 / 29)


def test_leaving_labels_out_accuses_no_more() -> None:
    # as above, and then screened twice more; those that leave are chosen without a look at the areas
    stream = np.random.default_rng(3)
    areas = np.sort(stream.standard_normal((20_000, 43)), 1)[:, :29]
    seen = np.sort(stream.permuted(areas, axis=1)[:, :20], 1)[:, :12]
    for spread in (0.2, 0.45):
        least = p_values(spread * seen, 30)[1].min(1) * 43 / 30
        assert float((least <= 0.01).mean()) <= 0.0125


def found_masks(areas: Sequence[float], left_out: Sequence[int], population: int | None) -> FoundMasks:
    count = len(areas)
    return FoundMasks(
        labels=tuple(range(count)),
        masks=torch.zeros(count, 1, 12, 12),
        patterns=torch.zeros(count, 3, 12, 12),
        areas=torch.tensor(areas),
        energies=torch.tensor(areas),
        success=torch.ones(count),
        steps=torch.tensor([2 if label in left_out else 60 for label in range(count)]),
        left_out=tuple(left_out),
        population=population,
    )


def test_p_values_are_corrected_for_all_labels(view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weighing, "held_out_rates", lambda *_: ([1.0] * NUM_CLASSES, [0.0] * NUM_CLASSES))
    areas = [30.0, 0.1, 40.0, 0.1, 2.5, 50.0, 35.0]  # 1 and 3 are of unfinished searches
    found = found_masks(areas, (1, 3), 5)
    evidence = weigh_labels(view, view.clean, found, penalty="area", least_success=0.75, precision="auto")
    alone = p_values(np.array([log_area(area) for area in sorted((30.0, 40.0, 2.5, 50.0, 35.0))]), 5)[1]
    assert evidence[4].p_value == pytest.approx(float(alone[0]) * 7 / 5)
    assert 0 < evidence[4].p_value < 0.01
    assert [e.label for e in evidence if e.left_out] == [1, 3]
    assert [e.label for e in usable_labels(evidence)] == [4, 0, 6, 2, 5]
    assert evidence[1].p_value == 1


def scanned(
    view: DefenderView,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock,
    *,
    least: float,
    left_out: Sequence[int],
    seconds: float = 1.0,
    limit: float | None = 10.0,
) -> Verdict:
    """Scan with made-up searches: label 4 needs a size that has this p-value, and each search takes so many seconds."""
    monkeypatch.setattr(cascade, "check_task", passes_for_good)
    asked: list[Deadline | None] = []

    def weigh(self: SizeSearch, view: DefenderView, *_: Any, deadline: Deadline | None, **__: Any) -> Any:
        clock.now += seconds
        asked.append(deadline)
        sizes = [4.0 if label == 4 else 60.0 for label in range(NUM_CLASSES)]
        found = found_masks(sizes, left_out, NUM_CLASSES - len(left_out))
        monkeypatch.setattr(weighing, "held_out_rates", lambda *_: ([1.0] * NUM_CLASSES, [0.0] * NUM_CLASSES))
        evidence = self.score_labels(view, view.clean, found)
        return found, [replace(e, p_value=least if e.label == 4 else 1.0) for e in evidence]

    monkeypatch.setattr(SizeSearch, "weigh", weigh)
    method = Cascade(first_look=False)
    return inspect_within(method, view, max_time=limit, generator=child(0), clock=clock)


def test_what_was_not_searched_is_named_and_not_called_clean(
    view: DefenderView, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    verdict = scanned(view, monkeypatch, clock, least=0.9, left_out=(1, 3))
    assert (verdict.outcome, verdict.suspect_labels) == ("cannot tell", ())
    assert "not searched: small masks of 2 classes (1, 3), and faint changes of 2 classes (1, 3)." in verdict.basis
    whole = scanned(view, monkeypatch, clock, least=0.9, left_out=())
    assert whole.outcome == "clean"
    assert "time" not in whole.basis
    assert (
        replace(scanned(view, monkeypatch, clock, least=0.9, left_out=(), limit=None), cost=whole.cost).basis
        == whole.basis
    )


def test_the_second_search_is_left_out_where_it_is_late(
    view: DefenderView, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    verdict = scanned(view, monkeypatch, clock, least=0.9, left_out=(), seconds=11.0)
    assert verdict.outcome == "cannot tell"
    assert "not searched: faint changes of all classes." in verdict.basis
    nothing = scanned(view, monkeypatch, clock, least=1.0, left_out=range(NUM_CLASSES), seconds=11.0)
    assert nothing.outcome == "cannot tell"
    assert "small masks of all classes, and faint changes of all classes." in nothing.basis


def test_an_accusation_needs_the_same_p_value_and_comes_with_its_mask(
    view: DefenderView, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    verdict = scanned(view, monkeypatch, clock, least=0.004, left_out=(1, 3), seconds=11.0)
    assert (verdict.outcome, verdict.suspect_labels) == ("backdoored", (4,))
    assert "small masks of 2 classes (1, 3)." in verdict.basis
    assert [(trigger.target_label, len(trigger.masks)) for trigger in verdict.triggers] == [(4, 1)]  # not spread out
    assert scanned(view, monkeypatch, clock, least=0.006, left_out=(1, 3)).outcome == "cannot tell"  # two searches


def test_triggers_are_spread_out_where_there_is_time(
    view: DefenderView, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    # 120 steps of 32 images at three levels, and half as many for the places, is 17,280: so many seconds at a pass a second
    accused = cascade.Cascade(first_look=False)
    monkeypatch.setattr(SizeSearch, "weigh", lambda *_, **__: (found_masks([9.0] * 7, (), 7), searched_labels()))
    look = accused._search(accused.patches, view, view.clean, view.clean, None, child(0), None)
    assert look.suspects == (4,)
    cost = Cost(seconds=300.0, image_passes=300.0, peak_memory_bytes=0, clean_images=70)
    assert cascade.may_spread(look, cost, Deadline.after(17_281.0, clock))
    assert not cascade.may_spread(look, cost, Deadline.after(17_279.0, clock))


def searched_labels() -> list[SearchedLabel]:
    return [
        SearchedLabel(
            label=label,
            size=4.0 if label == 4 else 60.0,
            attack_success_rate=1.0,
            natural_rate=0.0,
            anomaly=0.0,
            p_value=0.001 if label == 4 else 1.0,
            entropy=0.0,
            steps=60,
        )
        for label in range(NUM_CLASSES)
    ]


def test_limits_that_cannot_be_kept_are_refused(view: DefenderView) -> None:
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected a time limit in seconds, above 0"):
            inspect_within(Cascade(), view, max_time=wrong, generator=child(0))
    with pytest.raises(ValueError, match="MaskArea keeps no time limit: leave max_time out, or scan by cascade"):
        inspect_within(MaskArea(), view, max_time=9.0, generator=child(0))
