"""Making a model forget its task on clean images: what gives way first shows where the backdoor sits (TSBD, RNP)."""

from __future__ import annotations

from dataclasses import replace

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import EpochReport, Trainer
from lustral.vision.records import ImageSet
from lustral.vision.repair.selection import accuracy_up_to, held_out_accuracy

FASTER = 4.0  # the rate is raised by this factor while a task is not forgotten
MOST_RAISES = 4


def forgotten(accuracy: float, num_classes: int, share_left: float) -> float:
    """Return the accuracy at which a task counts as forgotten: so much of what was above chance is left.

    The published bound, 0.1, is chance for ten classes, out of reach for five and far from it for a hundred.

    >>> round(forgotten(0.9, 10, 0.05), 2)
    0.14
    """
    chance = 1 / num_classes
    return chance + share_left * max(accuracy - chance, 0.0)


def ascent(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
    """Return the objective -CE(f(x), y)."""
    return -F.cross_entropy(model(batch.inputs).float(), batch.labels)


def unlearn_clean(
    model: nn.Module,
    data: ImageSet,
    trainer: Trainer,
    *,
    share_left: float,
    generator: Generator,
    on_progress: OnProgress | None = None,
) -> tuple[nn.Module, float | None, int]:
    """Train a copy of a model away from clean labels until the task is forgotten.

    Args:
        model: start, unchanged.
        data: clean images; the accuracy is measured on the same ones, without augmentation.
        trainer: how; whenever its epochs are over and the task is not forgotten, it goes on at ``FASTER`` times the rate,
            ``MOST_RAISES`` times at most. Well-fitted images have next to no gradient to start from.
        share_left: of the accuracy above chance at which to stop.
        generator: CPU stream.
        on_progress: called a few times a second.

    Returns:
        (the unlearned model; its accuracy, or None where the task was not forgotten; epochs taken).
    """
    bound = forgotten(held_out_accuracy(model, data), data.num_classes, share_left)
    reached: float | None = None
    epochs = 0

    def enough(report: EpochReport) -> bool:
        nonlocal reached, epochs
        reached, epochs = accuracy_up_to(report.model, data, bound), report.epoch
        return reached is not None

    unlearned, taken = model, 0
    for raised in range(MOST_RAISES + 1):
        unlearned = replace(trainer, learning_rate=trainer.learning_rate * FASTER**raised).fit(
            unlearned,
            data,
            generator=fork(generator, raised),
            objective=ascent,
            on_epoch=enough,
            on_progress=on_progress,
            stage="unlearning clean images",
        )
        taken += epochs
        if reached is not None:
            break
    return unlearned, reached, taken


def unlearning_note(accuracy: float | None, epochs: int) -> str:
    """Return what ``unlearn_clean`` found, as a clause.

    >>> unlearning_note(0.1131, 14)
    'Clean unlearning took 14 epochs, to an accuracy of 0.113'
    """
    found = "and did not forget the task" if accuracy is None else f"to an accuracy of {accuracy:.3f}"
    return f"Clean unlearning took {epochs} epochs, {found}"
