"""Searching the smallest masks, all labels at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Progress
from lustral.vision.inverters import MaskSearch
from lustral.vision.inverters.sampling import SampleImages
from lustral.vision.records import DefenderView, ImageSet
from toy import NUM_CLASSES


def labelled_greys() -> ImageSet:
    """Images whose every pixel is their label times ten."""
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    images = (labels * 10).to(torch.uint8)[:, None, None, None].expand(7, 1, 4, 4).contiguous()
    return ImageSet(images=images, labels=labels, num_classes=4)


def test_a_labels_own_images_are_never_drawn() -> None:
    feed = SampleImages(labelled_greys(), torch.tensor([0, 2, 3]), generator=child(0))
    drawn = feed.draw(torch.tensor([0, 1, 2]), 300)
    assert drawn.shape == (3, 300, 1, 4, 4)
    values = (drawn[:, :, 0, 0, 0] * 25.5).round()
    for row, others in zip(values, [{1, 2, 3}, {0, 1, 3}, {0, 1, 2}], strict=True):
        assert set(row.tolist()) == others
    only = feed.draw(torch.tensor([2]), 5)  # rows ask for labels by position
    assert only.shape[:2] == (1, 5)
    assert 3 not in (only * 25.5).round()


def test_draws_follow_the_stream() -> None:
    def draw(seed: int) -> Tensor:
        return SampleImages(labelled_greys(), torch.tensor([1]), generator=child(seed)).draw(torch.tensor([0]), 20)

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


def test_a_single_class_is_refused() -> None:
    data = labelled_greys()
    with pytest.raises(ValueError, match=r"images of a single class.*at least two classes"):
        SampleImages(data.subset(data.labels == 0), torch.tensor([0]), generator=child(0))


def test_screening_keeps_the_finalists_and_tells_steps(toy_view: DefenderView) -> None:
    search = MaskSearch(steps=24, batch_size=8, finalists=2)
    found = search.run(toy_view.model, toy_view.clean, range(NUM_CLASSES), generator=child(0))
    assert found.labels == tuple(range(NUM_CLASSES))
    # 7 labels; after 6 of 24 steps 5 remain, after 12 steps 4, after 18 steps 3
    assert sorted(found.steps.tolist()) == [6, 6, 12, 18, 24, 24, 24]
    assert found.masks.shape == (NUM_CLASSES, 1, 12, 12)
    assert found.patterns.shape == (NUM_CLASSES, 3, 12, 12)
    for tensor in (found.masks, found.patterns):
        assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
        assert not tensor.requires_grad
    assert torch.allclose(found.areas, found.masks.sum((1, 2, 3)))
    assert bool(((found.success >= 0) & (found.success <= 1)).all())


def test_protected_labels_are_searched_to_the_end(toy_view: DefenderView) -> None:
    search = MaskSearch(steps=24, batch_size=8, finalists=2)
    plain = search.run(toy_view.model, toy_view.clean, range(NUM_CLASSES), generator=child(0)).steps
    dropped = [label for label, steps in enumerate(plain.tolist()) if steps < 24][:2]
    found = search.run(toy_view.model, toy_view.clean, range(NUM_CLASSES), generator=child(0), protected=dropped)
    assert [int(found.steps[label]) for label in dropped] == [24, 24]


def test_the_best_start_goes_on(toy_view: DefenderView) -> None:
    # one step for each start, then no more: what is kept is what needs least among them
    def needs(starts: int, seed: int) -> Tensor:
        search = MaskSearch(steps=6, batch_size=32, starts=starts, learning_rate=1.0)
        found = search.run(toy_view.model, toy_view.clean, [4], generator=child(seed))
        return found.areas / found.success.clamp_min(0.05)

    several = torch.cat([needs(6, seed) for seed in range(8)])
    single = torch.cat([needs(1, seed) for seed in range(8)])
    assert float(several.mean()) < float(single.mean())


def test_energy_is_what_the_change_has(toy_view: DefenderView) -> None:
    clean = toy_view.clean.subset(torch.arange(len(toy_view.clean)))
    search = MaskSearch(penalty="energy", steps=120, batch_size=16, starts=1)
    found = search.run(toy_view.model, clean, range(NUM_CLASSES), generator=child(0))
    x = clean.images.float() / 255
    change = found.masks[4] * (found.patterns[4] - x[clean.labels != 4])
    assert float(change.square().mean(1).sum((1, 2)).mean()) == pytest.approx(float(found.energies[4]), rel=0.3)
    area = MaskSearch(steps=120, batch_size=16, starts=1).run(
        toy_view.model, clean, range(NUM_CLASSES), generator=child(0)
    )
    assert float(found.energies.mean()) < float(area.energies.mean())
    assert float(found.areas.mean()) > float(area.areas.mean())


def test_some_rows_in_another_order(toy_view: DefenderView) -> None:
    found = MaskSearch(steps=2, batch_size=4).run(toy_view.model, toy_view.clean, [5, 1, 3], generator=child(0))
    some = found.of([3, 5])
    assert some.labels == (3, 5)
    assert torch.equal(some.masks, found.masks[[2, 0]])
    assert torch.equal(some.energies, found.energies[[2, 0]])


@pytest.mark.parametrize("changes", [{"screening": False}, {"finalists": NUM_CLASSES}])
def test_without_screening_every_label_gets_every_step(toy_view: DefenderView, changes: dict[str, Any]) -> None:
    search = MaskSearch(**{"steps": 8, "batch_size": 4, "finalists": 1, **changes})
    found = search.run(toy_view.model, toy_view.clean, range(NUM_CLASSES), generator=child(0))
    assert found.steps.tolist() == [8] * NUM_CLASSES


def test_a_backdoor_needs_a_small_mask(toy_view: DefenderView, benign_view: DefenderView) -> None:
    search = MaskSearch(steps=150, batch_size=16)
    found = search.run(toy_view.model, toy_view.clean, range(NUM_CLASSES), generator=child(0))
    areas = found.areas.tolist()
    assert min(range(NUM_CLASSES), key=lambda k: areas[k]) == 4
    assert areas[4] < 12  # the true patch has 4 pixels, the image 144
    assert areas[4] < 0.5 * min(a for k, a in enumerate(areas) if k != 4)
    assert float(found.success[4]) > 0.8
    plain = search.run(benign_view.model, benign_view.clean, [4], generator=child(0))
    assert float(plain.areas[0]) > 2 * areas[4]


def test_labels_may_be_asked_for_in_any_order(toy_view: DefenderView) -> None:
    found = MaskSearch(steps=4, batch_size=4).run(toy_view.model, toy_view.clean, (5, 1), generator=child(0))
    assert found.labels == (5, 1)
    assert len(found.masks) == 2


def test_the_model_and_the_global_stream_are_left_alone(toy_view: DefenderView) -> None:
    before = {name: value.clone() for name, value in toy_view.model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    MaskSearch(steps=3, batch_size=4).run(toy_view.model, toy_view.clean, [0, 1], generator=child(0))
    assert all(torch.equal(before[name], value) for name, value in toy_view.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in toy_view.model.parameters())
    assert torch.equal(random_state, torch.random.get_rng_state())


def test_equal_seeds_give_equal_masks(toy_view: DefenderView) -> None:
    search = MaskSearch(steps=5, batch_size=4)
    one, again, other = (
        search.run(toy_view.model, toy_view.clean, [0, 1], generator=child(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(one.masks, again.masks)
    assert torch.equal(one.patterns, again.patterns)
    assert not torch.equal(one.masks, other.masks)


def test_progress_grows_to_its_total(toy_view: DefenderView) -> None:
    reports: list[Progress] = []
    search = MaskSearch(steps=12, batch_size=4, finalists=2)
    search.run(toy_view.model, toy_view.clean, range(7), generator=child(0), on_progress=reports.append)
    assert len(reports) == 12
    assert reports[-1].done == reports[-1].total
    shares = [report.done / report.total for report in reports]
    assert shares == sorted(shares)


class Bright(nn.Module):
    """Calls an image class 1 when its first pixel is bright: the smallest trigger is one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x: Tensor) -> Tensor:
        logit = self.scale * (x[:, 0, 0, 0] - 0.5)
        return torch.stack([-logit, logit], 1)


def test_a_known_smallest_trigger_is_found() -> None:
    images = ImageSet(
        images=torch.full((20, 1, 6, 6), 30, dtype=torch.uint8), labels=torch.arange(20) % 2, num_classes=2
    )
    found = MaskSearch(steps=120, batch_size=8).run(Bright(), images, [1], generator=child(0))
    assert float(found.success[0]) > 0.8
    assert float(found.areas[0]) < 2.5
    assert int(found.masks[0].argmax()) == 0
    assert float(found.patterns[0, 0, 0, 0]) > 0.5


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"batch_size": 0}, {"finalists": 0}, {"learning_rate": 0.0}, {"target_success": 1.0}]
)
def test_impossible_searches_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        MaskSearch(**wrong)
