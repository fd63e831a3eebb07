"""The recipes that several methods train by."""

from __future__ import annotations

from lustral.training.augmentation import Augment
from lustral.training.loop import Trainer


def default_trainer(*, flip: bool, num_images: int) -> Trainer:
    """Return the training recipe for a set: the ``cpu`` setting at full size, more and smaller steps for small sets.

    The peak rate is 0.1: at 0.2 the published PreAct-ResNet18, without a normalisation before its head, learns late or diverges.
    """
    augment = Augment(crop_padding=2, flip=flip)
    if num_images < 5_000:
        return Trainer(epochs=20, batch_size=64, learning_rate=0.1, augment=augment)
    return Trainer(epochs=12 if num_images > 30_000 else 20, learning_rate=0.1, augment=augment)


def fine_tuning_recipe(epochs: int, *, weight_decay: float = 5e-4) -> Trainer:
    """Return how most methods fine-tune: 0.01 as in BackdoorBench, falling, with small random crops."""
    return Trainer(
        epochs=epochs,
        batch_size=128,
        learning_rate=0.01,
        schedule="cosine",
        warmup=0.1,
        weight_decay=weight_decay,
        augment=Augment(crop_padding=2, flip=False),
    )
