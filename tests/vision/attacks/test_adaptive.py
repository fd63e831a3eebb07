"""Adap-Blend and Adap-Patch: weak varied triggers in training, the full one in use, covers that keep their labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.attacks.adap_blend import AdapBlend, PieceTrigger
from lustral.vision.attacks.adap_patch import AdapPatch, TurnTrigger
from lustral.vision.attacks.pictures import Addition, draw_picture
from lustral.vision.evaluation.metrics import attack_metrics, probe_rate
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import build_classifier
from lustral.vision.records import ImageSet
from toy import toy_images, toy_trainer


def grey_set(count: int, num_classes: int = 5) -> ImageSet:
    images = torch.full((count, 3, 8, 8), 100, dtype=torch.uint8)
    return ImageSet(images=images, labels=torch.arange(count) % num_classes, num_classes=num_classes)


def test_pieces_by_hand() -> None:
    """White on black, a grid of 2 on 3x4 pixels: rows 0-1 and 2, columns 0-1 and 2-3; two of the four pieces show."""
    trigger = PieceTrigger(picture=torch.ones(1, 3, 4), alpha=0.25, grid=2, num_shown=2)
    out = trigger(torch.zeros(50, 1, 3, 4), generator=child(0))[:, 0]
    pieces = torch.stack([out[:, 0, 0], out[:, 0, 2], out[:, 2, 0], out[:, 2, 2]], 1)
    assert set(pieces.flatten().tolist()) == {0.0, 0.25}
    assert (pieces > 0).sum(1).tolist() == [2] * 50
    assert torch.equal(out, pieces.reshape(50, 2, 2)[:, [0, 0, 1]][:, :, [0, 0, 1, 1]])
    assert len({tuple(row) for row in pieces.tolist()}) == 6  # each pair of pieces comes up


def test_every_image_gets_half_of_sixteen_pieces_of_its_own() -> None:
    shape = (3, 32, 32)
    images = torch.full((40, *shape), 0.5)
    out = AdapBlend().training_trigger(shape)(images, generator=child(0))
    blended = torch.lerp(images[0], draw_picture(shape, 0), 0.15)
    changed = (out != images).any(1)
    assert torch.equal(out, torch.where(changed[:, None], blended, images))
    cells = changed.reshape(40, 4, 8, 4, 8).any(4).any(2).flatten(1)
    assert cells.sum(1).tolist() == [8] * 40
    assert len({tuple(row) for row in cells.tolist()}) > 35


def test_pieces_follow_the_stream_and_need_none() -> None:
    trigger, images = AdapBlend().training_trigger((1, 8, 8)), torch.rand(6, 1, 8, 8, generator=child(0))
    assert torch.equal(trigger(images, generator=child(1)), trigger(images, generator=child(1)))
    assert not torch.equal(trigger(images, generator=child(1)), trigger(images, generator=child(2)))
    assert torch.equal(trigger(images), trigger(images))
    assert trigger(images[:0]).shape == (0, 1, 8, 8)


def test_the_attack_uses_the_whole_picture_at_its_own_weight() -> None:
    attack = AdapBlend(alpha=0.1, alpha_test=0.2)
    images = torch.rand(3, 3, 8, 8, generator=child(0))
    expected = 0.8 * images + 0.2 * draw_picture((3, 8, 8), 0)
    assert torch.allclose(attack.trigger((3, 8, 8))(images), expected, atol=1e-6)


def test_images_take_turns() -> None:
    parts = tuple(Addition(pattern=torch.full((1, 1, 1), value)) for value in (0.1, 0.2, 0.3))
    out = TurnTrigger(triggers=parts)(torch.zeros(5, 1, 1, 1))
    assert out.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.1, 0.2])


def corners(image: torch.Tensor, side: int) -> list[bool]:
    """Return whether a (C, H, W) residual has something in its four corners: top left, bottom right, top right, ..."""
    parts = (image[:, :side, :side], image[:, -side:, -side:], image[:, :side, -side:], image[:, -side:, :side])
    assert sum(float(part.abs().sum()) for part in parts) == pytest.approx(float(image.abs().sum()))
    return [bool(part.any()) for part in parts]


def test_each_patch_has_its_corner_colours_and_opacity() -> None:
    attack = AdapPatch()
    images = torch.full((4, 3, 12, 12), 0.25)
    residual = attack.training_trigger((3, 12, 12))(images) - images
    for index, opacity in enumerate((0.5, 0.2, 0.5, 0.3)):
        assert corners(residual[index], 3) == [place == index for place in range(4)]
        assert float(residual[index].max()) == pytest.approx(0.75 * opacity)
        assert float(residual[index].min()) == pytest.approx(-0.25 * opacity)
    assert not torch.equal(residual[0, :, :3, :3], residual[2, :, :3, -3:])  # the same opacity, other colours


def test_the_attack_uses_two_opaque_patches_at_once() -> None:
    attack = AdapPatch(test_patches=(0, 1))
    images = torch.full((1, 3, 12, 12), 0.5)
    out = attack.trigger((3, 12, 12))(images)
    assert corners((out - images)[0], 3) == [True, True, False, False]
    for index in (0, 1):
        patch = attack.patch((3, 12, 12), index, 1.0)
        assert torch.equal(out[0][:, patch.opacity[0] > 0], patch.pattern[:, patch.opacity[0] > 0])


@pytest.mark.parametrize(
    "attack", [AdapBlend(poison_rate=0.1, cover_rate=0.2), AdapPatch(poison_rate=0.1, cover_rate=0.2)]
)
def test_payload_is_relabelled_covers_are_not_and_both_are_stamped(attack: AdapBlend | AdapPatch) -> None:
    clean = grey_set(200)
    poisoned = attack.poison(clean, generator=child(0))
    chosen, covers = poisoned.is_poisoned, poisoned.is_cover
    assert covers is not None
    assert (int(chosen.sum()), int(covers.sum()), int((chosen & covers).sum())) == (20, 40, 0)
    assert poisoned.data.labels[chosen].tolist() == [0] * 20
    assert torch.equal(poisoned.data.labels[~chosen], clean.labels[~chosen])
    assert set(clean.labels[chosen].tolist()) == set(clean.labels[covers].tolist()) == set(range(5))
    changed = (poisoned.data.images != clean.images).flatten(1).any(1)
    assert torch.equal(changed, chosen | covers)
    assert bool((clean.images == 100).all())
    again, other = attack.poison(clean, generator=child(0)), attack.poison(clean, generator=child(1))
    assert torch.equal(poisoned.data.images, again.data.images)
    assert not torch.equal(chosen, other.is_poisoned)


def test_the_four_patches_share_the_poison_and_the_covers_equally() -> None:
    clean = grey_set(100)
    attack = AdapPatch(poison_rate=0.14, cover_rate=0.28)
    poisoned = attack.poison(clean, generator=child(0))
    stamps = [as_uint8(part(as_float(clean.images[:1])))[0] for part in attack.training_trigger((3, 8, 8)).triggers]
    for mark, counts in ((poisoned.is_poisoned, [4, 4, 3, 3]), (poisoned.is_cover, [7, 7, 7, 7])):
        images = poisoned.data.images[mark]
        assert [sum(torch.equal(image, stamp) for image in images) for stamp in stamps] == counts


def test_covers_can_be_left_out() -> None:
    poisoned = AdapBlend(poison_rate=0.1, cover_rate=0.0).poison(grey_set(100), generator=child(0))
    assert poisoned.is_cover is not None
    assert int(poisoned.is_cover.sum()) == 0


@pytest.mark.parametrize("kind", [AdapBlend, AdapPatch])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"poison_rate": 0.6, "cover_rate": 0.5},
            r"leaves 40 of 100 images, .* asks for 50; the largest .* rate is 0\.4$",
        ),
        (
            {"poison_rate": 0.1, "cover_rate": 0.001},
            r"cover rate of 0.001 of 100 images stamps none; .* at least 0\.01$",
        ),
        ({}, "poison rate of 0.003 of 100 images poisons none"),
        ({"poison_rate": 0.1, "cover_rate": 0.1, "target_label": 5}, r"target label in 0 \.\. 4; got 5"),
    ],
)
def test_what_the_data_cannot_bear_is_refused(kind: Any, wrong: dict[str, Any], message: str) -> None:
    attack = kind(**wrong)
    for act in (attack.require_possible, lambda data: attack.poison(data, generator=child(0))):
        with pytest.raises(ValueError, match=message):
            act(grey_set(100))


def test_images_smaller_than_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="grid of 9 pieces along a side does not fit images of 8x8"):
        AdapBlend(poison_rate=0.1, cover_rate=0.1, grid=9).require_possible(grey_set(100))


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (AdapBlend, {"alpha": 0.0}, r"weights in \(0, 1\]; got 0.0 and 0.2"),
        (AdapBlend, {"alpha_test": 1.2}, r"weights in \(0, 1\]; got 0.15 and 1.2"),
        (AdapBlend, {"shown_rate": 0.01}, "at least one piece to show"),
        (AdapBlend, {"grid": 0}, "at least one piece to show"),
        (AdapBlend, {"cover_rate": -0.1}, "cover rate"),
        (AdapPatch, {"opacities": ()}, "one to 4 opacities"),
        (AdapPatch, {"opacities": (0.5, 0.0, 0.5)}, "one to 4 opacities"),
        (AdapPatch, {"opacities": (0.5,) * 5}, "one to 4 opacities"),
        (AdapPatch, {"test_patches": (0, 4)}, r"test patches in 0 \.\. 3"),
        (AdapPatch, {"test_patches": (1, 1)}, "none twice"),
        (AdapPatch, {"test_patches": ()}, "at least one test patch"),
        (AdapPatch, {"size": 0.6}, r"size in \(0, 0.5\]"),
        (AdapPatch, {"cover_rate": 1.1}, "cover rate"),
    ],
)
def test_impossible_settings_are_refused(kind: Any, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


@pytest.mark.parametrize("kind", [AdapBlend, AdapPatch])
def test_covers_make_the_weak_trigger_harmless_and_the_full_one_works(kind: Any) -> None:
    """The science of it: without covers the training trigger alone takes images away from their classes."""
    train, test = toy_images(1400, seed=0), toy_images(210, seed=1)
    accuracies = []
    for cover_rate in (0.1, 0.0):
        attack = kind(target_label=4, poison_rate=0.1, cover_rate=cover_rate)
        network = build_classifier(
            "small_cnn:width=16",
            num_classes=7,
            image_shape=(3, 12, 12),
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            generator=child(0, "weights"),
        )
        data = attack.poison(train, generator=child(0, "poison")).data
        model = toy_trainer().fit(network, data, generator=child(0, "training"))
        found = attack_metrics(model, test, attack.trigger((3, 12, 12)), attack.relabel, generator=child(0))
        assert found.attack_success_rate.value > 0.9
        probe = attack.probes((3, 12, 12))["cover_accuracy"]
        rate = probe_rate(model, test, probe, generator=child(0))
        assert rate.total == 180  # all but the target class
        accuracies.append(rate.value)
    assert accuracies[0] > accuracies[1] + 0.2
