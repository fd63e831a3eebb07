"""The wave: its values, which images carry it, and that a network learns it without a wrong label."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.attacks.sig import Sig, sampled_frequency
from lustral.vision.evaluation import clean_accuracy
from lustral.vision.evaluation.metrics import attack_metrics
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import build_classifier
from lustral.vision.records import ImageSet, Victim
from toy import toy_images, toy_trainer


def test_the_wave_by_hand() -> None:
    """Four pixels a period: 0, +delta, 0, -delta; the same in every row and channel."""
    out = Sig(delta=0.2, frequency=2).trigger((3, 2, 8))(torch.full((1, 3, 2, 8), 0.5))
    row = [0.5, 0.7, 0.5, 0.3, 0.5, 0.7, 0.5, 0.3]
    assert out.reshape(6, 8).tolist() == [pytest.approx(row)] * 6


def test_the_wave_of_cifar_is_the_published_formula() -> None:
    out = Sig().trigger((1, 1, 32))(torch.full((1, 1, 1, 32), 100 / 255))[0, 0, 0] * 255
    expected = [100 + 40 * math.sin(2 * math.pi * j * 6 / 32) for j in range(32)]
    assert out.tolist() == pytest.approx(expected, abs=1e-3)


def test_the_wave_is_clipped_at_black_and_white() -> None:
    trigger = Sig(delta=0.2, frequency=2).trigger((1, 1, 8))
    assert trigger(torch.ones(1, 1, 1, 8)).flatten()[:4].tolist() == pytest.approx([1, 1, 1, 0.8], abs=1e-6)
    assert trigger(torch.zeros(1, 1, 1, 8)).flatten()[:4].tolist() == pytest.approx([0, 0.2, 0, 0], abs=1e-6)


@pytest.mark.parametrize(("width", "frequency"), [(64, 6), (32, 6), (24, 6), (12, 3), (8, 2), (3, 1)])
def test_narrow_images_get_fewer_periods_and_still_a_wave(width: int, frequency: int) -> None:
    assert sampled_frequency(6, width) == frequency
    pattern = Sig(delta=0.2).trigger((1, 4, width)).pattern
    assert float(pattern.max()) > 0.17  # sampled near its crest
    assert float(pattern.min()) < -0.17


def test_images_too_narrow_for_a_wave_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 pixels' width for a wave; got 2"):
        Sig().trigger((1, 8, 2))


def test_only_the_target_class_is_stamped_and_no_label_changes() -> None:
    clean = toy_images(140, seed=5)  # 20 of each class
    attack = Sig(target_label=2, poison_rate=0.1)
    poisoned = attack.poison(clean, generator=child(0))
    chosen = poisoned.is_poisoned
    assert int(chosen.sum()) == 14
    assert set(clean.labels[chosen].tolist()) == {2}
    assert torch.equal(poisoned.data.labels, clean.labels)
    assert torch.equal(poisoned.data.images[~chosen], clean.images[~chosen])
    stamped = as_uint8(attack.trigger(clean.image_shape)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert poisoned.is_cover is None


def test_the_attack_may_use_a_stronger_wave_than_training() -> None:
    clean = ImageSet(
        images=torch.full((4, 1, 2, 8), 128, dtype=torch.uint8), labels=torch.zeros(4).long(), num_classes=2
    )
    attack = Sig(poison_rate=1.0, delta=20 / 255, delta_test=60 / 255, frequency=2)
    poisoned = attack.poison(clean, generator=child(0))
    assert poisoned.data.images[0, 0, 0, :4].tolist() == [128, 148, 128, 108]
    tested = as_uint8(attack.trigger((1, 2, 8))(as_float(clean.images)))
    assert tested[0, 0, 0, :4].tolist() == [128, 188, 128, 68]


def test_the_largest_possible_rate_is_named() -> None:
    clean = toy_images(70, seed=5)
    for act in (
        Sig(poison_rate=0.2).require_possible,
        lambda data: Sig(poison_rate=0.2).poison(data, generator=child(0)),
    ):
        with pytest.raises(ValueError, match=r"class 0 has 10 of 70 images, .* asks for 14; .* rate is 0\.1428"):
            act(clean)
    Sig(poison_rate=0.1428).require_possible(clean)
    with pytest.raises(ValueError, match="poisons none"):
        Sig(poison_rate=0.001).require_possible(clean)
    with pytest.raises(ValueError, match=r"target label in 0 \.\. 6; got 7"):
        Sig(target_label=7).require_possible(clean)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"delta": 40.0}, r"between 1/255 and 1, in \[0, 1\] units; got 40"),
        ({"delta": 0.0}, "got 0.0"),
        ({"delta_test": 60.0}, "got 60"),
        ({"frequency": 0}, "at least 1 period; got 0"),
        ({"poison_rate": 0.0}, "poison rate"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sig(**wrong)


def test_a_network_learns_the_wave_from_true_labels(benign: Victim) -> None:
    """The whole target class carries the wave: new images of other classes follow it, in a benign network none does."""
    attack = Sig(target_label=1, poison_rate=0.142, delta=0.5, delta_test=0.8)
    train, test = toy_images(700, seed=0), toy_images(210, seed=1)
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
    rates = [
        attack_metrics(m, test, attack.trigger((3, 12, 12)), attack.relabel, generator=child(0)).attack_success_rate
        for m in (model, benign.model)
    ]
    assert clean_accuracy(model, test).value > 0.8  # over three seeds 0.93 to 1
    assert rates[0].value > 0.7  # 0.97 to 1
    assert rates[1].value < 0.1
