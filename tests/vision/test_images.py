"""8-bit conversion, stratified splits, and augmentation against slow references."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, Tensor
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.training import Augment
from lustral.vision.images import as_float, as_uint8, at_most, channel_statistics, split, stratified_indices
from lustral.vision.records import ImageSet

NOTHING = {"crop_padding": 0, "flip": False}


def pictures(batch: int = 6, channels: int = 3, height: int = 7, width: int = 9) -> Tensor:
    return torch.rand(batch, channels, height, width, generator=child(0, "pictures"))


# --- 8 bits ---


def test_every_byte_survives_the_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_uint8(as_float(every)), every)
    assert as_float(every).dtype == torch.float32
    assert as_float(every)[[0, 51, 255]].tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_as_uint8_rounds_and_clips_and_leaves_its_input() -> None:
    values = torch.tensor([-0.5, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 3.0])
    given_values = values.clone()
    assert as_uint8(values).tolist() == [0, 0, 0, 1, 255, 255, 255]
    assert torch.equal(values, given_values)


def test_as_float_leaves_its_input() -> None:
    images = torch.tensor([10, 20], dtype=torch.uint8)
    as_float(images)
    assert images.tolist() == [10, 20]


def test_channel_statistics_by_hand() -> None:
    images = torch.zeros(2, 2, 1, 2, dtype=torch.uint8)
    images[:, 0] = torch.tensor([0, 255], dtype=torch.uint8)
    images[:, 1] = 51
    mean, std = channel_statistics(ImageSet(images=images, labels=torch.tensor([0, 1]), num_classes=2))
    assert mean == (0.5, 0.2)
    assert std == (round(math.sqrt(4 * 0.25 / 3), 4), 0.001)  # a constant channel gets the least deviation


# --- splits ---


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=60), st.floats(0, 1), st.integers(0, 10))
def test_stratified_counts_are_exact_and_in_proportion(labels: list[int], fraction: float, seed: int) -> None:
    count = round(fraction * len(labels))
    tensor = torch.tensor(labels, dtype=torch.int64)
    chosen, rest = stratified_indices(tensor, 5, count, generator=child(seed))
    assert len(chosen) == count
    assert torch.cat([chosen, rest]).sort().values.tolist() == list(range(len(labels)))
    for label in range(5):
        share = labels.count(label) * count / max(len(labels), 1)
        assert abs(int((tensor[chosen] == label).sum()) - share) < 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), min_size=1, max_size=60), st.floats(0, 1))
def test_groups_stay_together(rows: list[tuple[int, int]], fraction: float) -> None:
    labels = torch.tensor([label for label, _ in rows])
    groups = torch.tensor([10 * label + group for label, group in rows])  # a group has one label
    chosen, rest = stratified_indices(labels, 3, round(fraction * len(rows)), generator=child(1), groups=groups)
    assert torch.cat([chosen, rest]).sort().values.tolist() == list(range(len(rows)))
    assert not set(groups[chosen].tolist()) & set(groups[rest].tolist())


def test_whole_groups_come_close_to_the_share() -> None:
    labels = torch.arange(400) % 2
    groups = torch.arange(400) // 8 * 2 + labels  # groups of four
    chosen, _ = stratified_indices(labels, 2, 100, generator=child(1), groups=groups)
    for label in range(2):
        assert abs(int((labels[chosen] == label).sum()) - 50) <= 4


def test_stratified_is_reproducible_and_depends_on_the_stream() -> None:
    labels = torch.arange(100) % 4
    one = stratified_indices(labels, 4, 20, generator=child(1))[0]
    assert torch.equal(one, stratified_indices(labels, 4, 20, generator=child(1))[0])
    assert not torch.equal(one, stratified_indices(labels, 4, 20, generator=child(2))[0])


ORDERED = torch.arange(10).repeat_interleave(40)  # as image folders give them


def most_of_one_class(labels: Tensor) -> float:
    return int(labels.bincount().max()) / len(labels)


def test_the_first_images_of_a_drawn_set_are_of_many_classes() -> None:
    for part in stratified_indices(ORDERED, 10, 200, generator=child(0)):
        assert len(set(ORDERED[part][:50].tolist())) == 10
        assert most_of_one_class(ORDERED[part][:50]) < 0.3


def test_both_parts_of_a_split_are_shuffled() -> None:
    images = torch.zeros(400, 1, 1, 1, dtype=torch.uint8)
    for part in split(ImageSet(images=images, labels=ORDERED, num_classes=10), 0.5, generator=child(0)):
        assert most_of_one_class(part.labels[:50]) < 0.3


def test_at_most_keeps_small_sets_and_takes_every_class_in_proportion_of_larger_ones() -> None:
    images = torch.arange(400).remainder(256).to(torch.uint8)[:, None, None, None]
    data = ImageSet(images=images, labels=ORDERED, num_classes=10)
    assert at_most(data, 400) is data
    assert at_most(data, 50).labels.bincount().tolist() == [5] * 10
    assert torch.equal(at_most(data, 50).images, at_most(data, 50).images)


def test_channel_statistics_see_all_classes_of_an_ordered_set() -> None:
    images = (20 * ORDERED).to(torch.uint8)[:, None, None, None]
    mean, _ = channel_statistics(ImageSet(images=images, labels=ORDERED, num_classes=10), sample=40)
    assert mean[0] == pytest.approx(90 / 255, abs=1e-4)


@pytest.mark.parametrize("count", [-1, 11])
def test_impossible_counts_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="between 0 and 10"):
        stratified_indices(torch.zeros(10, dtype=torch.int64), 2, count, generator=child(0))


def test_split_keeps_images_with_their_labels() -> None:
    labels = torch.arange(50) % 5
    images = labels.to(torch.uint8)[:, None, None, None].expand(50, 1, 2, 2).contiguous()
    first, second = split(ImageSet(images=images, labels=labels, num_classes=5), 0.2, generator=child(0))
    assert (len(first), len(second)) == (10, 40)
    for part in (first, second):
        assert torch.equal(part.images[:, 0, 0, 0].long(), part.labels)
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\]"):
        split(first, 1.5, generator=child(0))


# --- augmentation ---


def test_crop_and_flip_equal_padding_and_slicing_image_by_image() -> None:
    images, pad = pictures(batch=40), 2
    height, width = images.shape[2:]
    stream = child(5)
    is_mirrored = torch.rand(40, 1, generator=stream) < 0.5
    dy, dx = torch.randint(2 * pad + 1, (2, 40, 1), generator=stream)
    expected = []
    for index, image in enumerate(images):
        top, left = int(dy[index]), int(dx[index])
        padded = F.pad(image, (pad, pad, pad, pad))
        # the window is cut first and mirrored in place afterwards
        window = padded[:, top : top + height, left : left + width]
        expected.append(window.flip(2) if is_mirrored[index] else window)
    out = Augment(crop_padding=pad, flip=True)(images, generator=child(5))
    assert torch.equal(out, torch.stack(expected))
    assert is_mirrored.any()
    assert not is_mirrored.all()
    assert len(set(zip(dy.flatten().tolist(), dx.flatten().tolist(), strict=True))) > 10


def test_crops_reach_every_shift_from_edge_to_edge() -> None:
    images = torch.zeros(400, 1, 5, 5)
    images[:, 0, 2, 2] = 1
    out = Augment(crop_padding=1, flip=False)(images, generator=child(0))
    rows, columns = out[:, 0].nonzero()[:, 1], out[:, 0].nonzero()[:, 2]
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {(r, c) for r in (1, 2, 3) for c in (1, 2, 3)}


def test_flip_alone_mirrors_about_half_of_the_images() -> None:
    images = pictures(batch=200)
    out = Augment(crop_padding=0, flip=True)(images, generator=child(0))
    mirrored = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(out, images, strict=True)])
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(out, images, strict=True)])
    assert torch.equal(mirrored, ~kept)
    assert 70 < int(mirrored.sum()) < 130


def slow_affine(image: Tensor, angle: float, size: float, shift_x: float, shift_y: float) -> Tensor:
    """Sample (C, H, W) pixel by pixel, bilinearly, outside of the image zero; angle and shifts act on coordinates."""
    _, height, width = image.shape
    out = torch.zeros_like(image)
    for row in range(height):
        for column in range(width):
            y, x = row - (height - 1) / 2, column - (width - 1) / 2  # pixels from the centre
            u = (math.cos(angle) * x - math.sin(angle) * y) / size + shift_x * width + (width - 1) / 2
            v = (math.sin(angle) * x + math.cos(angle) * y) / size + shift_y * height + (height - 1) / 2
            for r in (math.floor(v), math.floor(v) + 1):
                for c in (math.floor(u), math.floor(u) + 1):
                    if 0 <= r < height and 0 <= c < width:
                        out[:, row, column] += (1 - abs(v - r)) * (1 - abs(u - c)) * image[:, r, c]
    return out


@pytest.mark.parametrize("shape", [(7, 7), (6, 10)])
def test_affine_motion_equals_sampling_pixel_by_pixel(shape: tuple[int, int]) -> None:
    images = pictures(batch=5, channels=2, height=shape[0], width=shape[1])
    draws = torch.rand(4, 5, generator=child(8)) * 2 - 1
    out = Augment(**NOTHING, rotation=20.0, translation=0.2, scale=0.3)(images, generator=child(8))
    for index, image in enumerate(images):
        angle, size, dx, dy = draws[:, index].tolist()
        expected = slow_affine(image, math.radians(20) * angle, 1 + 0.3 * size, 0.2 * dx, 0.2 * dy)
        assert torch.allclose(out[index], expected, atol=1e-5)


def test_a_quarter_turn_on_a_tiny_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(*shape: int, generator: Generator, device: torch.device) -> Tensor:
        return torch.ones(shape)  # every draw at its upper end: the full angle, and no other motion is asked for

    monkeypatch.setattr(torch, "rand", largest)
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    out = Augment(**NOTHING, rotation=90.0)(image, generator=child(0))
    assert torch.allclose(out[0, 0], torch.tensor([[2.0, 4.0], [1.0, 3.0]]), atol=1e-5)
    oblong = torch.zeros(1, 1, 3, 5)
    oblong[0, 0, 1, 3] = 1  # one pixel right of the centre; turned, it is one pixel above or below
    turned = Augment(**NOTHING, rotation=90.0)(oblong, generator=child(0))
    assert turned[0, 0].round(decimals=4).nonzero().tolist() == [[0, 2]]


def test_no_motion_is_the_identity() -> None:
    images = pictures()
    assert torch.equal(Augment(**NOTHING)(images, generator=child(0)), images)
    still = Augment(**NOTHING, rotation=1e-6)(images, generator=child(0))
    assert torch.allclose(still, images, atol=1e-5)


def test_erasing_sets_one_rectangle_of_the_right_area_to_grey() -> None:
    images = torch.ones(300, 3, 40, 40)
    out = Augment(**NOTHING, erasing=1.0)(images, generator=child(0))
    is_grey = (out == 0.5).all(1)
    assert torch.equal(is_grey, (out != 1).any(1))
    for grey in is_grey:
        rows, columns = grey.any(1), grey.any(0)
        assert torch.equal(grey, rows[:, None] & columns)  # a product set ...
        assert int(rows.diff().sum()) <= 2  # ... of intervals
        assert int(columns.diff().sum()) <= 2
    share = is_grey.float().mean((1, 2))
    assert float(share.min()) > 0.01
    assert float(share.max()) < 0.23  # 20 %, and half a pixel on each side
    assert float(share.mean()) == pytest.approx(0.11, abs=0.01)


def test_erasing_happens_at_its_rate() -> None:
    out = Augment(**NOTHING, erasing=0.25)(torch.ones(1000, 1, 8, 8), generator=child(0))
    touched = float((out != 1).flatten(1).any(1).float().mean())
    assert touched == pytest.approx(0.25, abs=0.05)


EVERYTHING = Augment(crop_padding=2, flip=True, rotation=15, translation=0.1, scale=0.1, erasing=0.5)


@pytest.mark.parametrize(
    "augment",
    [
        Augment(crop_padding=2, flip=False),
        Augment(**NOTHING, rotation=15),
        Augment(**NOTHING, translation=0.2),
        Augment(**NOTHING, scale=0.3),
        Augment(**NOTHING, erasing=1.0),
        EVERYTHING,
    ],
)
def test_augmentation_is_reproducible_per_image_and_pure(augment: Augment) -> None:
    images = pictures(batch=1).expand(12, -1, -1, -1).contiguous()
    before = images.clone()
    out = augment(images, generator=child(3))
    assert torch.equal(images, before)
    assert out.shape == images.shape
    assert out.dtype == torch.float32
    assert float(out.min()) >= 0
    assert float(out.max()) <= 1
    assert torch.equal(out, augment(images, generator=child(3)))
    assert not torch.equal(out, augment(images, generator=child(4)))
    assert len({tuple(image.flatten().tolist()) for image in out}) > 3  # each image has parameters of its own


def test_memory_layout_does_not_matter() -> None:
    images = pictures()
    nhwc = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(EVERYTHING(images, generator=child(1)), EVERYTHING(nhwc, generator=child(1)))


@pytest.mark.parametrize(
    "wrong", [{"crop_padding": -1}, {"rotation": -1.0}, {"translation": -0.1}, {"scale": 1.0}, {"erasing": 1.5}]
)
def test_impossible_augmentation_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        Augment(**wrong)  # type: ignore[arg-type]
