"""Records: what they check, and how a recovered trigger stamps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.images import as_float
from lustral.vision.records import ImageSet, RecoveredTrigger


def numbered(count: int = 10, num_classes: int = 2) -> ImageSet:
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, 2, 2).contiguous()
    return ImageSet(images=images, labels=torch.arange(count) % num_classes, num_classes=num_classes)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"images": torch.zeros(4, 2, 2, dtype=torch.uint8)}, r"shape \(N, C, H, W\).*got \(4, 2, 2\)"),
        ({"images": torch.zeros(4, 1, 2, 2)}, r"uint8; got \(4, 1, 2, 2\) torch.float32; convert .*as_uint8"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"one int64 label per image, shape \(4,\); got \(3,\)"),
        ({"labels": torch.zeros(4)}, "one int64 label per image.*torch.float32"),
        ({"num_classes": 1}, "at least 2 classes; got 1"),
        ({"class_names": ("cat",)}, "expected 3 class names; got 1"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"expected 0 \.\. 2, found 0 \.\. 3"),
        ({"labels": torch.tensor([-1, 0, 1, 2])}, r"expected 0 \.\. 2, found -1 \.\. 2"),
    ],
)
def test_wrong_sets_are_refused_with_the_reason(wrong: dict[str, object], message: str) -> None:
    right = {
        "images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8),
        "labels": torch.tensor([0, 1, 2, 0]),
        "num_classes": 3,
        "class_names": ("cat", "dog", "owl"),
    }
    ImageSet(**right)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        ImageSet(**{**right, **wrong})  # type: ignore[arg-type]


def test_a_set_knows_its_shape_and_may_be_empty() -> None:
    data = numbered()
    assert (len(data), data.image_shape, data.device.type) == (10, (3, 2, 2), "cpu")
    empty = data.subset(torch.zeros(10, dtype=torch.bool))
    assert len(empty) == 0
    assert list(empty.batches(4)) == []


def test_subset_takes_indices_in_order_or_a_mask() -> None:
    data = numbered()
    picked = data.subset(torch.tensor([7, 2]))
    assert picked.images[:, 0, 0, 0].tolist() == [7, 2]
    assert picked.labels.tolist() == [1, 0]
    assert len(data.subset(data.labels == 1)) == 5
    assert data.to("cpu").images.equal(data.images)


def test_batches_are_floats_in_order() -> None:
    batches = list(numbered().batches(4))
    assert [len(x) for x, *_ in batches] == [4, 4, 2]
    assert batches[0][0].dtype == torch.float32
    assert torch.equal(torch.cat([x for x, *_ in batches])[:, 0, 0, 0] * 255, torch.arange(10.0))
    assert torch.cat([batch.labels for batch in batches]).tolist() == numbered().labels.tolist()


def test_shuffled_batches_hold_every_image_once_and_follow_the_stream() -> None:
    data = numbered()

    def order(seed: int) -> list[int]:
        batches = data.batches(3, generator=child(seed))
        return [round(v * 255) for x, *_ in batches for v in x[:, 0, 0, 0].tolist()]

    assert sorted(order(0)) == list(range(10))
    assert order(0) == order(0) != order(1)
    for x, y, _ in data.batches(3, generator=child(0)):
        assert torch.equal((x[:, 0, 0, 0] * 255).round().long() % 2, y)


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_index_gives_the_images_back(seed: int | None, drop_last: bool) -> None:
    data = numbered()
    batches = list(data.batches(3, generator=None if seed is None else child(seed), drop_last=drop_last))
    for batch in batches:
        assert batch.index.dtype == torch.int64
        assert batch.index.device == batch.labels.device
        assert torch.equal(batch.inputs, as_float(data.images[batch.index]))
        assert torch.equal(batch.labels, data.labels[batch.index])
    seen = torch.cat([batch.index for batch in batches]).tolist()
    assert len(set(seen)) == len(seen) == (9 if drop_last else 10)
    assert (seen == sorted(seen)) == (seed is None)


def test_drop_last_leaves_out_only_a_partial_batch() -> None:
    assert [len(x) for x, *_ in numbered().batches(4, drop_last=True)] == [4, 4]
    assert [len(x) for x, *_ in numbered().batches(5, drop_last=True)] == [5, 5]
    with pytest.raises(ValueError, match="batch size of at least 1"):
        next(numbered().batches(0))


def test_batches_leave_the_set_alone() -> None:
    data = numbered()
    for x, *_ in data.batches(10):
        x.zero_()
    assert torch.equal(data.images, numbered().images)


def recovered(count: int = 3) -> RecoveredTrigger:
    masks = torch.zeros(count, 1, 2, 2)
    masks[:, 0, 0, 0] = torch.linspace(0.25, 1.0, count)
    return RecoveredTrigger(
        target_label=1,
        masks=masks,
        patterns=torch.full((count, 3, 2, 2), 0.8),
        area=1.0,
        attack_success_rate=1.0,
        entropy=0.0,
    )


def test_stamping_by_hand() -> None:
    images = torch.full((4, 3, 2, 2), 0.4)
    out = recovered()(images)  # samples 0, 1, 2 and 0 again
    corner = [0.4 + m * 0.4 for m in (0.25, 0.625, 1.0, 0.25)]
    assert out[:, 0, 0, 0].tolist() == pytest.approx(corner)
    assert torch.equal(out[:, :, 1], images[:, :, 1])
    assert torch.equal(out[:, :, 0, 1], images[:, :, 0, 1])
    assert torch.equal(images, torch.full((4, 3, 2, 2), 0.4))


def test_samples_are_drawn_by_the_stream() -> None:
    images, trigger = torch.zeros(200, 3, 2, 2), recovered()
    out = trigger(images, generator=child(0))
    assert torch.equal(out, trigger(images, generator=child(0)))
    assert not torch.equal(out, trigger(images, generator=child(1)))
    values, counts = (out[:, 0, 0, 0] / 0.8).unique(return_counts=True)
    assert values.tolist() == pytest.approx([0.25, 0.625, 1.0])
    assert int(counts.min()) > 40


def test_a_trigger_moves_and_keeps_its_figures() -> None:
    trigger = recovered()
    moved = trigger.to("cpu")
    for item in dataclasses.fields(trigger):
        one, other = getattr(trigger, item.name), getattr(moved, item.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
