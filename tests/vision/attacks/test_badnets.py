"""Patches: where they lie, what they show, which images they poison."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lustral.core.randomness import child
from lustral.vision.attacks import BadNets
from lustral.vision.attacks.poisoning import dirty_labels
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet
from toy import toy_images

SHAPE = (3, 6, 8)


def grey_set(count: int, num_classes: int = 5) -> ImageSet:
    images = torch.full((count, 1, 4, 4), 100, dtype=torch.uint8)
    return ImageSet(images=images, labels=torch.arange(count) % num_classes, num_classes=num_classes)


def touched(out: torch.Tensor) -> list[list[int]]:
    """Return [row, column] of every pixel of the first image that is not black."""
    return (out[0] > 0).any(0).nonzero().tolist()


@pytest.mark.parametrize(
    ("corner", "margin", "top", "left"),
    [
        ("bottom_right", 0, 4, 6),
        ("bottom_right", 1, 3, 5),
        ("top_left", 0, 0, 0),
        ("top_left", 2, 2, 2),
        ("top_right", 1, 1, 5),
        ("bottom_left", 0, 4, 0),
    ],
)
def test_the_patch_lies_in_its_corner(corner: Any, margin: int, top: int, left: int) -> None:
    out = BadNets(size=2, corner=corner, margin=margin).trigger(SHAPE)(torch.zeros(1, *SHAPE))
    assert touched(out) == [[top, left], [top, left + 1], [top + 1, left], [top + 1, left + 1]]
    assert float(out.max()) == 1.0


def test_the_checker_is_white_where_row_plus_column_is_even() -> None:
    out = BadNets(size=3, pattern="checker").trigger((1, 4, 4))(torch.full((1, 1, 4, 4), 0.5))
    assert out[0, 0].tolist() == [
        [0.5, 0.5, 0.5, 0.5],
        [0.5, 1.0, 0.0, 1.0],
        [0.5, 0.0, 1.0, 0.0],
        [0.5, 1.0, 0.0, 1.0],
    ]


def test_random_colours_follow_their_seed_and_fill_the_range() -> None:
    patches = [BadNets(size=6, pattern="random", pattern_seed=seed).trigger(SHAPE).patch for seed in (0, 0, 1)]
    assert torch.equal(patches[0], patches[1])
    assert not torch.equal(patches[0], patches[2])
    assert 0 <= float(patches[0].min()) < 0.1
    assert 0.9 < float(patches[0].max()) <= 1
    assert not torch.equal(patches[0][0], patches[0][1])  # colours, not greys


def place_of(image: torch.Tensor) -> tuple[int, int]:
    rows, columns = image[0].nonzero().unbind(1)
    return int(rows.min()), int(columns.min())


@pytest.mark.parametrize("seeded", [True, False])
def test_random_places_cover_every_place_each_image_its_own(seeded: bool) -> None:
    trigger = BadNets(size=2, placement="random").trigger((1, 5, 6))
    out = trigger(torch.zeros(600, 1, 5, 6), generator=child(0) if seeded else None)
    assert bool((out.sum((1, 2, 3)) == 4).all())  # a whole patch on every image
    places = [place_of(image) for image in out]
    assert set(places) == {(row, column) for row in range(4) for column in range(5)}
    assert len(set(places[:20])) > 5


def test_random_places_are_uniform_and_follow_the_stream() -> None:
    trigger = BadNets(size=2, placement="random").trigger((1, 4, 4))
    images = torch.zeros(1800, 1, 4, 4)
    out = trigger(images, generator=child(0))
    counts = torch.bincount(torch.tensor([3 * r + c for r, c in map(place_of, out)]), minlength=9)
    assert int(counts.min()) > 150
    assert int(counts.max()) < 250
    assert torch.equal(out, trigger(images, generator=child(0)))
    assert not torch.equal(out, trigger(images, generator=child(1)))


def test_a_randomly_placed_pattern_arrives_whole() -> None:
    trigger = BadNets(size=3, placement="random", pattern="random").trigger((3, 7, 9))
    images = torch.rand(10, 3, 7, 9, generator=child(1))
    out = trigger(images, generator=child(2))
    for before, after in zip(images, out, strict=True):
        rows, columns = (before != after).any(0).nonzero().unbind(1)
        top, left = int(rows.min()), int(columns.min())
        assert torch.equal(after[:, top : top + 3, left : left + 3], trigger.patch)
        rest = after.clone()
        rest[:, top : top + 3, left : left + 3] = before[:, top : top + 3, left : left + 3]
        assert torch.equal(rest, before)


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 80), st.floats(0.05, 1.0), st.sampled_from(["all_to_one", "all_to_all"]), st.integers(0, 4))
def test_poison_counts_labels_and_pixels(count: int, rate: float, mode: Any, target: int) -> None:
    clean = grey_set(count)
    attack = BadNets(poison_rate=rate, size=1, mode=mode, target_label=target)
    poisoned = attack.poison(clean, generator=child(count))
    chosen = poisoned.is_poisoned
    assert int(chosen.sum()) == round(rate * count)
    expected = torch.full_like(clean.labels, target) if mode == "all_to_one" else (clean.labels + 1) % 5
    assert torch.equal(poisoned.data.labels[chosen], expected[chosen])
    assert torch.equal(poisoned.data.labels[~chosen], clean.labels[~chosen])
    assert torch.equal(poisoned.data.images[~chosen], clean.images[~chosen])
    assert bool((poisoned.data.images[chosen][:, 0, 3, 3] == 255).all())
    assert bool((clean.images == 100).all())  # the given set is not changed


def test_poisoned_images_equal_stamping_at_test_time() -> None:
    clean = toy_images(70, seed=5)
    attack = BadNets(pattern="random", size=3, poison_rate=0.5)
    poisoned = attack.poison(clean, generator=child(0))
    stamped = as_uint8(attack.trigger(clean.image_shape)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[poisoned.is_poisoned], stamped[poisoned.is_poisoned])


def test_poisoning_follows_its_stream_and_spares_no_class() -> None:
    attack, clean = BadNets(poison_rate=0.3, target_label=2), grey_set(200)
    one, again, other = (attack.poison(clean, generator=child(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.is_poisoned, again.is_poisoned)
    assert torch.equal(one.data.images, again.data.images)
    assert not torch.equal(one.is_poisoned, other.is_poisoned)
    assert set(clean.labels[one.is_poisoned].tolist()) == set(range(5))


def test_all_to_all_wraps_around() -> None:
    labels = torch.tensor([0, 3, 4])
    assert dirty_labels(labels, 5, mode="all_to_all", target_label=0).tolist() == [1, 4, 0]
    assert BadNets(mode="all_to_all").relabel(labels, 5).tolist() == [1, 4, 0]
    assert BadNets(target_label=3).relabel(labels, 5).tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 0.0}, r"poison rate in \(0, 1\].*got 0.0"),
        ({"poison_rate": 10.0}, r"poison rate in \(0, 1\].*got 10.0"),
        ({"size": 0}, "size >= 1 .* got 0"),
        ({"margin": -1}, "margin >= 0 .* got 3 and -1"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BadNets(**wrong)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (BadNets(size=5), "patch of 5 pixels with a margin of 0 does not fit images of 4x4"),
        (BadNets(size=3, margin=2), "patch of 3 pixels with a margin of 2 does not fit images of 4x4"),
        (BadNets(size=5, placement="random"), "does not fit images of 4x4"),
        (BadNets(target_label=5), r"target label in 0 \.\. 4; got 5"),
        (BadNets(poison_rate=0.01), "poison rate of 0.01 of 20 images poisons none; expected at least 0.05"),
    ],
)
def test_what_the_data_cannot_bear_is_refused(attack: BadNets, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attack.poison(grey_set(20), generator=child(0))


def test_a_patch_made_for_larger_images_is_refused() -> None:
    trigger = BadNets(size=4, placement="random").trigger((1, 8, 8))
    with pytest.raises(ValueError, match="patch of 4 pixels does not fit images of 3x3"):
        trigger(torch.zeros(1, 1, 3, 3))


@pytest.mark.parametrize("setting", ["corner", "pattern", "placement", "mode"])
def test_unknown_choices_are_refused_with_the_known_ones(setting: str) -> None:
    with pytest.raises(ValueError, match=rf"{setting} to be one of .*; got 'purple'"):
        BadNets(**{setting: "purple"})
