"""What listed images have in common: a planted patch shows where it is, and nothing else does."""

import torch

from lustral.vision.records import ImageSet
from lustral.vision.suspicion.shared_traits import fetch, shared_traits


def planted(count: int = 200, every: int = 10) -> tuple[ImageSet, torch.Tensor]:
    stream = torch.Generator().manual_seed(1)
    images = torch.randint(60, 120, (count, 3, 12, 12), generator=stream, dtype=torch.uint8)
    is_planted = torch.arange(count) % every == 0
    images[is_planted, 0, 9:11, 2:4] = 255
    labels = torch.arange(count) % 3
    labels[is_planted] = 1
    return ImageSet(images=images, labels=labels, num_classes=3), is_planted


def test_the_patch_stands_out_in_the_residual_and_in_the_agreement() -> None:
    data, flagged = planted()
    found = shared_traits(data, flagged.float(), flagged, 1)
    assert found is not None
    assert set(found.listed.tolist()) == set(flagged.nonzero().flatten().tolist())
    patch = torch.zeros(12, 12, dtype=torch.bool)
    patch[9:11, 2:4] = True
    assert found.residual[0][patch].min() > 0.5
    assert found.residual[0][~patch].abs().max() < 0.1
    assert found.residual[1:].abs().max() < 0.1
    assert found.agreement[patch].min() > 3 * found.agreement[~patch].max()
    assert torch.allclose(found.residual, found.mean - found.mean_neighbours, atol=1e-6)


def test_the_partner_is_the_nearest_image_of_the_class_that_is_not_listed() -> None:
    data, flagged = planted()
    found = shared_traits(data, flagged.float(), flagged, 1)
    assert found is not None
    pool = ((data.labels == 1) & ~flagged).nonzero().flatten()
    for row in range(3):
        distances = (fetch(data, pool) - found.images[row]).flatten(1).norm(dim=1)
        assert int(pool[distances.argmin()]) == int(found.nearest[row])
    assert torch.equal(found.partners, fetch(data, found.nearest))


def test_images_that_were_missed_are_no_neighbours() -> None:
    data, is_planted = planted()
    flagged = is_planted & (torch.arange(200) < 100)
    scores = is_planted.float()  # those that were missed have high scores all the same
    found = shared_traits(data, scores, flagged, 1)
    assert found is not None
    assert found.mean_neighbours[0, 9:11, 2:4].max() < 0.5


def test_there_is_nothing_to_compare_without_both_kinds() -> None:
    data, flagged = planted()
    assert shared_traits(data, flagged.float(), flagged, 0) is None
    assert shared_traits(data, flagged.float(), torch.ones_like(flagged), 1) is None
