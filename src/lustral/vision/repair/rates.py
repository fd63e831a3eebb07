"""A learning rate found on the network at hand: a short range test on the images that the defender holds out.

A rate that was chosen on one network does nothing to a second and breaks a third. What can be told beforehand is how far a few
steps at a constant rate move the held-out accuracy. So rates of a geometric ladder are tried, each from the given weights, and
the largest that keeps the accuracy is taken. The ladder is bisected: of seven rates three are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, nn

from lustral.core.randomness import child, fork
from lustral.core.records import Objective, OnProgress
from lustral.training import Trainer, TrainingDiverged
from lustral.vision.records import ImageSet
from lustral.vision.repair.selection import accuracy_floor, held_out_accuracy

RateChoice = Literal["found", "given"]
"""A method's learning rate: found on the network, or its trainer's."""

LADDER = (8.0, 4.0, 2.0, 1.0, 1 / 2, 1 / 4, 1 / 8)  # of the trainer's rate, falling


@dataclass(frozen=True, kw_only=True)
class FoundRate:
    """What a range test found.

    Attributes:
        trainer: the recipe at the rate found.
        asked: the rate of the recipe that was given.
        tried: (rate, held-out accuracy after its steps) in the order tried; NaN where the training diverged.
        holds: whether the accuracy was kept at that rate; False: at none that was tried, and it is the lowest.
    """

    trainer: Trainer
    asked: float
    tried: tuple[tuple[float, float], ...]
    holds: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user: where the rate is another than the recipe's."""
        found = self.trainer.learning_rate
        if not self.holds:
            return (f"No learning rate held the clean accuracy for a few steps; the lowest, {found:.1e}, was taken.",)
        if found == self.asked:
            return ()
        return (f"The learning rate was {found:.1e}, found on the held-out images, instead of {self.asked:.1e}.",)


def first_passing(count: int, passes: Callable[[int], bool]) -> int:
    """Return the least index that passes, where all behind one that passes do too; ``count`` where none does. Bisects.

    >>> first_passing(7, lambda index: index >= 5), first_passing(7, lambda index: False)
    (5, 7)
    """
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle + 1, high)
    return low


def find_rate(
    model: nn.Module,
    trainer: Trainer,
    fit: ImageSet,
    held_out: ImageSet,
    *,
    make_objective: Callable[[], Objective] | None = None,
    generator: Generator,
    steps: int = 20,
    bound: float = 0.05,
    ladder: Sequence[float] = LADDER,
    on_progress: OnProgress | None = None,
) -> FoundRate:
    """Find the largest rate of a ladder at which a few steps keep the held-out accuracy.

    The cost is that of ``steps`` steps of the method for each rate tried, and one pass of ``held_out``; of 2**n - 1 rates n are
    tried. A ``CostMeter`` around the given model counts them. Every rate sees the same batches and draws.

    Args:
        model: start, unchanged.
        trainer: the method's recipe; tried at a constant rate, with its batches, optimizer and augmentation.
        fit: the images it will train on.
        held_out: images it will not.
        make_objective: makes the method's loss, for each try its own, for it may count its calls; None is cross-entropy.
        generator: CPU stream; one number is drawn.
        steps: of each try; momentum needs ten to reach its full size.
        bound: most that the accuracy may fall, as a fraction, and one standard error. What falls by more in so few steps, before
            the rate comes down, does not come back.
        ladder: factors of the trainer's rate, falling.
        on_progress: called a few times a second.

    Returns:
        The recipe at the rate found, and what was tried.
    """
    if steps < 1 or not ladder or list(ladder) != sorted(set(ladder), reverse=True) or ladder[-1] <= 0:
        raise ValueError(f"expected steps >= 1 and a ladder of falling factors > 0; got {steps} and {tuple(ladder)}")
    floor = accuracy_floor(model, held_out, bound)
    seed = int(torch.randint(2**31, (), generator=generator))
    batch = min(trainer.batch_size, len(fit))
    epochs = math.ceil(steps / max(len(fit) // batch, 1))
    chosen = torch.randperm(len(fit), generator=child(seed, "images"))[: batch * math.ceil(steps / epochs)]
    tried: list[tuple[float, float]] = []

    def passes(index: int) -> bool:
        rate = trainer.learning_rate * ladder[index]
        brief = replace(trainer, epochs=epochs, batch_size=batch, learning_rate=rate, schedule="constant")
        try:
            moved = brief.fit(
                model,
                fit.subset(chosen),
                generator=child(seed, "steps"),
                objective=None if make_objective is None else make_objective(),
                on_progress=on_progress,
                stage="finding a learning rate",
            )
            accuracy = held_out_accuracy(moved, held_out)
        except TrainingDiverged:
            accuracy = math.nan
        tried.append((rate, accuracy))
        return accuracy >= floor

    index = first_passing(len(ladder), passes)
    rate = trainer.learning_rate * ladder[min(index, len(ladder) - 1)]
    return FoundRate(
        trainer=replace(trainer, learning_rate=rate),
        asked=trainer.learning_rate,
        tried=tuple(tried),
        holds=index < len(ladder),
    )


def at_rate(
    choice: RateChoice,
    model: nn.Module,
    trainer: Trainer,
    fit: ImageSet,
    held_out: ImageSet,
    make_objective: Callable[[], Objective] | None,
    generator: Generator,
    on_progress: OnProgress | None = None,
) -> tuple[Trainer, tuple[str, ...]]:
    """Return a recipe at the rate that a method asks for, and notes on it; "given" leaves the recipe and draws nothing.

    The other arguments are those of ``find_rate``.
    """
    if choice == "given":
        return trainer, ()
    found = find_rate(
        model,
        trainer,
        fit,
        held_out,
        make_objective=make_objective,
        generator=fork(generator, "rate"),
        on_progress=on_progress,
    )
    return found.trainer, found.notes
