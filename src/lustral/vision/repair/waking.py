"""Can a few images bring an erased backdoor back? The re-activation audit of a defender, who has recovered triggers only.

After Min, Qin, Zhang, Shen, Cheng, NeurIPS 2024 (arXiv 2410.09838): tune a copy on the clean images and five poisoned ones. The
evaluator's audit, with the true trigger and its controls, is ``lustral.vision.evaluation.Reactivation``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, nn

from lustral.core.randomness import fork
from lustral.core.records import OnProgress
from lustral.training import Augment, Trainer, TrainingDiverged
from lustral.vision.evaluation.reactivation import joined
from lustral.vision.images import as_float, as_uint8
from lustral.vision.inverters.max_entropy import firing_rate
from lustral.vision.records import ImageSet, RecoveredTrigger


def default_tuning() -> Trainer:
    """Return the published retuning: 5 epochs of SGD at 0.01, batches of 128."""
    return Trainer(
        epochs=5, batch_size=128, learning_rate=0.01, schedule="constant", augment=Augment(crop_padding=2, flip=False)
    )


@dataclass(frozen=True, kw_only=True)
class Waking:
    """The audit.

    Attributes:
        poisoned_images: with a recovered trigger and its label, among the clean ones; 5 in the paper.
        trainer: the retuning.
    """

    version: ClassVar[int] = 1

    poisoned_images: int = 5
    trainer: Trainer = field(default_factory=default_tuning)

    def __post_init__(self) -> None:
        """Check the range."""
        if self.poisoned_images < 1:
            raise ValueError(f"expected at least one poisoned image; got {self.poisoned_images}")

    def rates(
        self,
        model: nn.Module,
        triggers: Sequence[RecoveredTrigger],
        *,
        fit: ImageSet,
        held_out: ImageSet,
        generator: Generator,
        on_progress: OnProgress | None = None,
    ) -> tuple[float, float]:
        """Return how often the worst trigger fires on held-out images, as a fraction: (now, after the retuning).

        The second is NaN where the retuning diverged. Every label of the triggers is retuned in turn, with ``poisoned_images``
        images of other classes.
        """
        now = max(firing_rate(model, held_out, trigger) for trigger in triggers)
        woken = 0.0
        for label in sorted({trigger.target_label for trigger in triggers}):
            own = [trigger for trigger in triggers if trigger.target_label == label]
            others = fit.subset(fit.labels != label)
            order = torch.randperm(len(others), generator=generator)
            few = others.subset(order[: self.poisoned_images])
            stamped = own[0](as_float(few.images), generator=fork(generator, "stamp", label))
            poison = replace(few, images=as_uint8(stamped), labels=torch.full_like(few.labels, label))
            try:
                tuned = self.trainer.fitted_to_size(len(fit), 0).fit(
                    model,
                    joined(fit, poison),
                    generator=fork(generator, "retune", label),
                    on_progress=on_progress,
                    stage="retuning",
                )
            except TrainingDiverged:
                return now, math.nan
            woken = max(woken, *(firing_rate(tuned, held_out, trigger) for trigger in own))
        return now, woken


def waking_note(count: int, now: float, woken: float) -> str:
    """Say what the re-activation audit found.

    >>> waking_note(5, 0.01, 0.253)
    'Tuned on the clean images and 5 with a recovered trigger, the model obeys it on 25.3 % of the others; before, on 1.0 %.'
    """
    if math.isnan(woken):
        return "The re-activation audit says nothing: tuning on a few poisoned images diverged."
    return (
        f"Tuned on the clean images and {count} with a recovered trigger, the model obeys it on {100 * woken:.1f} % of the "
        f"others; before, on {100 * now:.1f} %."
    )
