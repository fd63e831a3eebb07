from __future__ import annotations

from dataclasses import replace

from lustral.core.randomness import child
from lustral.training import default_trainer
from lustral.vision.evaluation import evaluate
from lustral.vision.models import build_classifier
from lustral.vision.records import TrainingView, Victim
from lustral.vision.safe_training import PlainTraining
from toy import toy_images, toy_trainer


def view_of(victim: Victim) -> TrainingView:
    assert victim.poisoned is not None
    return TrainingView(
        untrusted=victim.poisoned.data,
        build_model=lambda stream: build_classifier(
            "small_cnn:width=16", num_classes=7, image_shape=(3, 12, 12), generator=stream
        ),
    )


def test_the_control_learns_the_backdoor(backdoored: Victim) -> None:
    trained = PlainTraining(trainer=toy_trainer()).train(view_of(backdoored), generator=child(0))
    record = evaluate(backdoored, trained.model, toy_images(420, seed=1), generator=child(0))
    assert record.asr.value > 0.9
    assert record.acc.value > 0.9
    assert [entry.count for entry in trained.history] == list(range(1, 13))
    assert trained.history[0].clean_accuracy is None  # there are no clean images


def test_the_recipe_follows_the_size_of_the_set(backdoored: Victim) -> None:
    view = view_of(backdoored)
    assert PlainTraining().recipe(view) == default_trainer(flip=False, num_images=1400)
    assert PlainTraining().recipe(replace(view, flip=True)) == default_trainer(flip=True, num_images=1400)
    assert PlainTraining(trainer=toy_trainer()).recipe(view) == toy_trainer()


def test_the_passes_said_beforehand_are_those_of_the_recipe() -> None:
    assert PlainTraining().estimated_passes(50_000) == 12 * 50_000
    assert PlainTraining().estimated_passes(1_400) == 20 * 1_400
