"""FCT: the equations beside plain loops, and its properties."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lustral.core.randomness import child, on_device
from lustral.training import Trainer
from lustral.vision.attacks import BadNets
from lustral.vision.images import as_uint8
from lustral.vision.models import build_classifier
from lustral.vision.models.features import gather
from lustral.vision.records import ImageSet, TrainingView
from lustral.vision.sifters import FCT, EarlyLoss
from lustral.vision.sifters.fct import COLLAPSED, collapse_notes, intra_class_loss, transformed
from toy import tinted_images, toy_images


def plainly_transformed(image: Tensor, angle: float, right: int, down: int) -> Tensor:
    """Turn one image (C, H, W) about its middle, then shift it, pixel by pixel: two pictures, one after the other."""
    _, height, width = image.shape
    turned, shifted = torch.zeros_like(image), torch.zeros_like(image)
    for row in range(height):
        for col in range(width):
            across, down_there = col + 0.5 - width / 2, row + 0.5 - height / 2
            x = math.cos(angle) * across - math.sin(angle) * down_there + width / 2
            y = math.sin(angle) * across + math.cos(angle) * down_there + height / 2
            if 0 <= x < width and 0 <= y < height:
                turned[:, row, col] = image[:, int(y), int(x)]
    for row in range(height):
        for col in range(width):
            if 0 <= row - down < height and 0 <= col - right < width:
                shifted[:, row, col] = turned[:, row - down, col - right]
    return shifted


def test_tau_turns_and_then_shifts_as_two_pictures_would() -> None:
    stream = child(0)
    images = torch.rand(6, 3, 8, 12, generator=stream)
    angles = (torch.rand(6, generator=stream) * 2 - 1) * math.pi
    shifts = torch.tensor([[2, -1], [-3, 0], [0, 2], [1, 1], [-2, -2], [4, 3]]).float()
    found = transformed(images, angles, shifts)
    for index, image in enumerate(images):
        right, down = (int(value) for value in shifts[index])
        expected = plainly_transformed(image, float(angles[index]), right, down)
        assert torch.equal(found[index], expected), index
    assert float((found == 0).float().mean()) > 0.05  # some of it is black


def test_a_positive_angle_turns_counter_clockwise() -> None:
    image = torch.zeros(1, 1, 3, 3)
    image[0, 0, 0, 1] = 1.0  # the top
    turned = transformed(image, torch.tensor([math.pi / 2]), torch.zeros(1, 2))
    assert turned[0, 0, 1, 0] == 1.0  # is left of the middle now
    assert turned.sum() == 1.0


def network(seed: int = 0) -> torch.nn.Module:
    return build_classifier("small_cnn:width=4", num_classes=7, image_shape=(3, 12, 12), generator=child(seed)).eval()


def test_the_distance_is_the_mean_square_of_the_features_differences() -> None:
    data, model = toy_images(30, seed=0), network()
    method = FCT(draws=2)
    found = method.distances(model, data, generator=child(3))
    stream = on_device(child(3), torch.device("cpu"))
    expected = torch.zeros(30)
    features, _ = gather(model, data)
    for _ in range(2):
        angles, shifts = method.draw(30, data.image_shape, stream)
        copies = [
            plainly_transformed(image, float(angle), int(shift[0]), int(shift[1]))
            for image, angle, shift in zip(data.images.float() / 255, angles, shifts, strict=True)
        ]
        there, _ = gather(model, ImageSet(images=as_uint8(torch.stack(copies)), labels=data.labels, num_classes=7))
        expected += ((features - there) ** 2).sum(1) / features.shape[1] / 2
    torch.testing.assert_close(found, expected, rtol=0.02, atol=1e-5)
    assert float(expected.min()) > 0


def test_draws_keep_to_their_ranges_and_fill_them() -> None:
    angles, shifts = FCT(rotation=90, translation=0.25).draw(4000, (3, 12, 20), child(1))
    assert float(angles.abs().max()) <= math.pi / 2
    assert float(angles.abs().max()) > 0.98 * math.pi / 2
    assert sorted(set(shifts[:, 0].tolist())) == list(range(-5, 6))
    assert sorted(set(shifts[:, 1].tolist())) == list(range(-3, 4))


def test_without_a_transformation_nothing_moves() -> None:
    still = FCT(rotation=0, translation=0, draws=2).distances(network(), toy_images(20, seed=0), generator=child(0))
    assert torch.equal(still, torch.zeros(20))


def test_the_loss_of_the_centres_is_their_mean_cosine() -> None:
    stream = child(2)
    features, labels = torch.randn(40, 5, generator=stream), torch.randint(6, (40,), generator=stream)
    labels[labels == 3] = 2  # a class that is absent
    present = sorted(set(labels.tolist()))
    centres = [F.normalize(features[labels == label].mean(0), dim=0) for label in present]
    pairs = [float(a @ b) if i != j else 0.0 for i, a in enumerate(centres) for j, b in enumerate(centres)]
    found = intra_class_loss(features, labels, 7)
    assert float(found) == pytest.approx(sum(pairs) / len(present) ** 2, rel=1e-5)
    orthogonal = torch.eye(4).repeat(2, 1)
    assert float(intra_class_loss(orthogonal, torch.arange(4).repeat(2), 4)) == pytest.approx(0.0, abs=1e-7)
    alone = intra_class_loss(features.requires_grad_(), torch.zeros(40, dtype=torch.int64), 7)
    assert float(alone.detach()) == pytest.approx(0.0, abs=1e-6)
    (slope,) = torch.autograd.grad(intra_class_loss(features, labels, 7), features)
    assert bool(torch.isfinite(slope).all())


def test_the_second_stage_leaves_the_head_alone_and_the_centres_apart() -> None:
    data = toy_images(140, seed=0)
    method = FCT(least_steps=0, intra_least_steps=0, intra_epochs=6)
    given = network()
    before = [parameter.clone() for parameter in given.parameters()]
    short = FCT(least_steps=0, intra_epochs=0).extractor(given, data, generator=child(0))
    long = method.extractor(given, data, generator=child(0))
    assert all(torch.equal(a, b) for a, b in zip(before, given.parameters(), strict=True))
    torch.testing.assert_close(short.network.linear.weight, long.network.linear.weight)  # same seed, same first stage
    losses = [float(intra_class_loss(gather(model, data)[0], data.labels, 7)) for model in (short, long)]
    assert losses[1] < losses[0] - 0.01
    assert not any(module._forward_pre_hooks for module in long.modules())


@pytest.mark.parametrize("count", [2, 7, 100, 1003])
def test_the_split_meets_its_quotas_and_covers_the_set(count: int) -> None:
    scores = torch.rand(count, generator=child(count))
    clean, poisoned, uncertain = FCT().split(scores)
    assert (len(clean), len(poisoned)) == (count * 20 // 100, count * 5 // 100)
    assert sorted(torch.cat([clean, poisoned, uncertain]).tolist()) == list(range(count))
    if len(clean) and len(poisoned):
        assert float(scores[clean].max()) < float(scores[uncertain].min())
        assert float(scores[uncertain].max()) < float(scores[poisoned].min())


def test_ties_are_split_by_position_and_shares_are_met_to_the_image() -> None:
    clean, poisoned, uncertain = FCT().split(torch.ones(20))
    assert (clean.tolist(), poisoned.tolist()) == ([0, 1, 2, 3], [19])
    assert uncertain.tolist() == list(range(4, 19))
    assert len(FCT(clean_share=0.29).split(torch.arange(100.0))[0]) == 29  # 100 * 0.29 is a little less than 29


def test_impossible_settings_are_refused() -> None:
    for wrong in ({"draws": 0}, {"clean_share": 0.0}, {"clean_share": 0.97}, {"rotation": -1.0}, {"translation": 1.0}):
        with pytest.raises(ValueError, match="expected"):
            FCT(**wrong)
    one = toy_images(1, seed=0)
    with pytest.raises(ValueError, match="at least 2 images"):
        FCT().sift(TrainingView(untrusted=one, build_model=lambda _: network()), generator=child(0))


def test_collapsed_features_are_noted() -> None:
    scores = torch.ones(100)
    scores[:5] = COLLAPSED / 2
    assert collapse_notes(scores) == ()
    scores[5] = 0.0
    assert "6 % of the images do not move" in collapse_notes(scores)[0]


def poisoned_view(rate: float) -> tuple[TrainingView, Tensor]:
    """Return tinted images, a share of them with a patch, with 1,000 clean ones; and which have it."""
    data, clean = tinted_images(600, seed=0), tinted_images(1000, seed=7)
    found = BadNets(target_label=2, size=3, poison_rate=rate).poison(data, generator=child(0, "p")) if rate else None

    def build(stream: Generator) -> torch.nn.Module:
        return build_classifier("small_cnn:width=8", num_classes=4, image_shape=(3, 12, 12), generator=stream)

    return (
        TrainingView(untrusted=found.data if found else data, build_model=build, clean=clean),
        found.is_poisoned if found else torch.zeros(600, dtype=torch.bool),
    )


SHORT: dict[str, FCT | EarlyLoss] = {
    "fct": FCT(least_steps=150, intra_epochs=1, intra_least_steps=60),
    "early_loss": EarlyLoss(
        trainer=Trainer(epochs=1, batch_size=64, learning_rate=0.05, schedule="constant"), least_steps=60
    ),
}


@pytest.mark.parametrize("name", sorted(SHORT))
def test_images_with_a_patch_are_told_from_others(name: str) -> None:
    view, is_poisoned = poisoned_view(0.1)
    sifted = SHORT[name].sift(view, generator=child(1))
    poisoned, others = sifted.scores[is_poisoned], sifted.scores[~is_poisoned]
    assert float((poisoned[:, None] > others).float().mean()) > 0.9  # the AUROC: 0.97 and more on both
    assert float(sifted.flagged[is_poisoned].float().mean()) > 0.2
    assert float(sifted.flagged[~is_poisoned].float().mean()) < 0.03
    assert torch.equal(sifted.flagged, sifted.scores > sifted.threshold)
    assert "1,000 clean images" in sifted.basis


def test_a_clean_set_comes_out_as_clean() -> None:
    sifted = SHORT["early_loss"].sift(poisoned_view(0.0)[0], generator=child(1))
    assert not bool(sifted.flagged.any())
    assert sifted.threshold == torch.inf
