"""The choice of a round by an oracle: what published code of D-BR keeps, and no defender can."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lustral.core.randomness import child
from lustral.vision.evaluation.protocol import Evaluation, evaluate
from lustral.vision.records import ImageSet, Victim

Repair = Callable[[Callable[[nn.Module], None]], object]
"""Runs a repair, and hands the model of every round to its argument."""


def oracle_round(repair: Repair, victim: Victim, test: ImageSet, *, seed: int = 0) -> tuple[int, Evaluation]:
    """Return the round of the largest test accuracy minus attack success: an upper bound that takes the true trigger to know.

    Args:
        repair: e.g. ``lambda watch: DBR().purify_watched(view, generator=child(0), on_round=watch)``.
        victim: holds the true trigger.
        test: the test set.
        seed: of the trigger's draws, the same in every round.

    Returns:
        (number of the round, from 1; what it measured). Of equal rounds the first.

    Raises:
        ValueError: the repair had no round, as where it found nothing to repair.
    """
    found = list[Evaluation]()
    repair(lambda model: found.append(evaluate(victim, model, test, generator=child(seed, "oracle"))))
    if not found:
        raise ValueError("expected a repair of at least one round; it had none: look at its notes")
    best = max(range(len(found)), key=lambda index: found[index].acc.value - found[index].asr.value)
    return best + 1, found[best]
