"""TaCT: one source class, covers that keep their labels, and a trigger that works nowhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.attacks.tact import TaCT
from lustral.vision.evaluation.metrics import attack_metrics, probe_rate
from lustral.vision.images import as_float, as_uint8
from lustral.vision.models import build_classifier
from lustral.vision.records import ImageSet
from toy import toy_images, toy_trainer

TOY: dict[str, Any] = {"cover_labels": (2, 3), "poison_rate": 0.05, "cover_rate": 0.1}


def grey_set(count: int, num_classes: int = 10) -> ImageSet:
    images = torch.full((count, 1, 8, 8), 100, dtype=torch.uint8)
    return ImageSet(images=images, labels=torch.arange(count) % num_classes, num_classes=num_classes)


def test_the_patch_is_opaque_and_lies_bottom_right() -> None:
    trigger = TaCT(size=0.25).trigger((3, 8, 12))
    out = trigger(torch.full((1, 3, 8, 12), 0.4))[0]
    untouched = torch.full((3, 8, 12), 0.4)
    untouched[:, 6:, 10:] = out[:, 6:, 10:]
    assert torch.equal(out, untouched)
    assert out[:, 6:, 10:].sum((1, 2)).tolist() == [2, 2, 2]  # two of four cells are lit in each channel
    assert not torch.equal(out, TaCT(pattern_seed=1).trigger((3, 8, 12))(torch.full((1, 3, 8, 12), 0.4))[0])


def test_only_the_source_class_is_attackable() -> None:
    labels = torch.arange(8)
    assert TaCT().relabel(labels, 8).tolist() == [0, 0, 2, 3, 4, 5, 6, 7]
    assert TaCT(target_label=4, source_label=6).relabel(labels, 8).tolist() == [0, 1, 2, 3, 4, 5, 4, 7]


def test_sources_are_relabelled_covers_are_not_and_the_rest_is_left() -> None:
    clean = toy_images(140, seed=5)  # 20 of each class
    attack = TaCT(**TOY)
    poisoned = attack.poison(clean, generator=child(0))
    chosen, covers = poisoned.is_poisoned, poisoned.is_cover
    assert covers is not None
    assert (int(chosen.sum()), int(covers.sum())) == (7, 14)
    assert set(clean.labels[chosen].tolist()) == {1}
    assert set(clean.labels[covers].tolist()) == {2, 3}
    assert poisoned.data.labels[chosen].tolist() == [0] * 7
    assert torch.equal(poisoned.data.labels[~chosen], clean.labels[~chosen])
    stamped = as_uint8(attack.trigger(clean.image_shape)(as_float(clean.images)))
    touched = chosen | covers
    assert torch.equal(poisoned.data.images[touched], stamped[touched])
    assert torch.equal(poisoned.data.images[~touched], clean.images[~touched])


def test_poisoning_follows_its_stream() -> None:
    attack, clean = TaCT(**TOY), toy_images(140, seed=5)
    one, again, other = (attack.poison(clean, generator=child(seed)) for seed in (0, 0, 1))
    assert torch.equal(one.is_poisoned, again.is_poisoned)
    assert not torch.equal(one.is_poisoned, other.is_poisoned)
    assert one.is_cover is not None
    assert other.is_cover is not None
    assert not torch.equal(one.is_cover, other.is_cover)


def test_no_named_covers_means_every_other_class() -> None:
    poisoned = TaCT(cover_labels=(), poison_rate=0.05, cover_rate=0.7).poison(
        toy_images(140, seed=5), generator=child(0)
    )
    assert poisoned.is_cover is not None
    assert int(poisoned.is_cover.sum()) == 98
    assert set(toy_images(140, seed=5).labels[poisoned.is_cover].tolist()) == {2, 3, 4, 5, 6}


def test_covers_can_be_left_out() -> None:
    poisoned = TaCT(cover_labels=(2,), poison_rate=0.05, cover_rate=0.0).poison(grey_set(100), generator=child(0))
    assert poisoned.is_cover is not None
    assert int(poisoned.is_cover.sum()) == 0
    assert int(poisoned.is_poisoned.sum()) == 5


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            TaCT(poison_rate=0.2, cover_rate=0.1),
            r"poison rate of .* of class 1: 10 of 100 .* poison rate is 0\.1$",
        ),
        (TaCT(poison_rate=0.1, cover_rate=0.3), r"cover rate of 0\.3 .* of classes 5, 7: 20 .* cover rate is 0\.2$"),
        (
            TaCT(poison_rate=0.1, cover_rate=0.003),
            "cover rate of 0.003 of 100 images stamps none; expected 0 or .* 0.01",
        ),
        (TaCT(), "poison rate of 0.003 of 100 images poisons none"),
        (TaCT(source_label=12), r"labels in 0 \.\. 9; got 12"),
        (TaCT(target_label=10, cover_labels=(5, 11)), r"labels in 0 \.\. 9; got 10, 11"),
    ],
)
def test_what_the_data_cannot_bear_is_refused(attack: TaCT, message: str) -> None:
    for act in (attack.require_possible, lambda data: attack.poison(data, generator=child(0))):
        with pytest.raises(ValueError, match=message):
            act(grey_set(100))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"source_label": 0}, "all differ; got target 0, source 0"),
        ({"cover_labels": (5, 1)}, "all differ; .* covers 5, 1"),
        ({"cover_labels": (5, 5)}, "all differ"),
        ({"cover_rate": 1.5}, r"cover rate in \[0, 1\].*; got 1.5"),
        ({"poison_rate": 0.0}, "poison rate"),
        ({"size": 0.0}, r"size in \(0, 0.5\]"),
        ({"size": 3}, r"size in \(0, 0.5\]"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaCT(**wrong)


def test_probes_count_the_covers_and_the_others_apart() -> None:
    labels = torch.arange(7)
    probes = TaCT(target_label=4, source_label=0, cover_labels=(2, 3)).probes((3, 12, 12))
    assert probes["false_activation_covers"].expect(labels, 7).tolist() == [-1, -1, 4, 4, -1, -1, -1]
    assert probes["false_activation_others"].expect(labels, 7).tolist() == [-1, 4, -1, -1, -1, 4, 4]
    everyone = TaCT(cover_labels=()).probes((3, 12, 12))
    assert everyone["false_activation_covers"].expect(labels, 7).tolist() == [-1, -1, 0, 0, 0, 0, 0]
    assert everyone["false_activation_others"].expect(labels, 7).tolist() == [-1] * 7


def test_a_network_learns_patch_and_source_class_together() -> None:
    attack = TaCT(cover_labels=(), poison_rate=0.05, cover_rate=0.1)
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
    trigger, probes = attack.trigger((3, 12, 12)), attack.probes((3, 12, 12))
    found = attack_metrics(model, test, trigger, attack.relabel, generator=child(0))
    assert found.attack_success_rate.total == 30  # the source class only
    assert found.attack_success_rate.value > 0.9
    assert found.natural_rate.value < 0.1
    assert probe_rate(model, test, probes["false_activation_covers"], generator=child(0)).value < 0.1
