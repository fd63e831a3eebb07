from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lustral.core.randomness import child
from lustral.vision.records import ImageSet
from lustral.vision.sources import DataSource, SourceError


def image_set(labels: Tensor, num_classes: int, size: int = 2) -> ImageSet:
    """Images whose pixels all hold their own index, so that a subset tells where it came from."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 1, size, size)
    return ImageSet(images=images.contiguous(), labels=labels, num_classes=num_classes)


@pytest.fixture
def source() -> DataSource:
    labels = torch.arange(200) % 4
    test = image_set(torch.arange(8) % 4, 4)
    return DataSource(name="toy", train=image_set(labels, 4), test=test, flip=True, reserve_fraction=0.1)


def identities(data: ImageSet) -> set[int]:
    return set(data.images[:, 0, 0, 0].tolist())


def test_reserve_is_exact_stratified_and_disjoint(source: DataSource) -> None:
    train, reserve = source.training_split()
    assert reserve.labels.bincount().tolist() == [5, 5, 5, 5]
    assert len(train) == 180
    assert identities(train) | identities(reserve) == set(range(200))


def test_reserve_is_the_same_on_every_call_and_depends_on_the_name(source: DataSource) -> None:
    assert torch.equal(source.split_indices()[1], source.split_indices()[1])
    assert not torch.equal(source.split_indices()[1], replace(source, name="other").split_indices()[1])


def test_defender_pool_is_the_reserve_of_a_set_with_a_test_split(source: DataSource) -> None:
    assert identities(source.defender_pool()) == identities(source.training_split()[1])


def test_defender_pool_is_a_plain_set_as_a_whole(source: DataSource) -> None:
    assert len(replace(source, test=None).defender_pool()) == 200


@pytest.mark.parametrize("has_test", [True, False])
def test_images_for_a_defender_are_shuffled_and_the_same_each_time(source: DataSource, has_test: bool) -> None:
    labels = torch.arange(4).repeat_interleave(50)  # ordered by class, as folders are
    ordered = replace(source, train=image_set(labels, 4), reserve_fraction=0.5)
    ordered = ordered if has_test else replace(ordered, test=None)
    pool = ordered.defender_pool()
    assert torch.equal(pool.images, ordered.defender_pool().images)
    assert int(pool.labels[:24].bincount(minlength=4).min()) > 0
    drawn = ordered.draw_clean(40, generator=child(1))
    assert drawn.labels.bincount().tolist() == [10, 10, 10, 10]
    assert int(drawn.labels[:20].bincount(minlength=4).min()) > 0
    assert identities(drawn) <= identities(pool)


def test_groups_stay_together_and_every_class_with_two_gives_one() -> None:
    labels = torch.arange(3).repeat_interleave(60)
    groups = labels * 1000 + torch.arange(180) % 6  # six tracks of ten frames in each class
    groups[labels == 2] = 2000  # but the last class is one single track
    source = DataSource(name="tracks", train=image_set(labels, 3), test=None, flip=False, groups=groups)
    train, reserve = source.split_indices()
    assert not set(groups[train].tolist()) & set(groups[reserve].tolist())
    assert labels[reserve].bincount(minlength=3).tolist() == [10, 10, 0]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_reserve_fraction_must_be_a_proper_share(source: DataSource, fraction: float) -> None:
    with pytest.raises(SourceError, match=r"reserve_fraction in \(0, 1\)"):
        replace(source, reserve_fraction=fraction)


def test_groups_must_be_one_per_image(source: DataSource) -> None:
    with pytest.raises(SourceError, match="one group per training image"):
        replace(source, groups=torch.zeros(3, dtype=torch.int64))


def test_test_images_must_look_like_training_images(source: DataSource) -> None:
    with pytest.raises(SourceError, match=r"test images like the training images, \(1, 2, 2\) in 4 classes"):
        replace(source, test=image_set(torch.arange(4), 4, size=3))
