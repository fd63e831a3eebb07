"""Plain training on all images, the suspicious ones too: the control that every safe trainer is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator

from lustral.core.records import OnProgress
from lustral.training import Trainer, default_trainer
from lustral.vision.records import Trained, TrainingView
from lustral.vision.safe_training.run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class PlainTraining:
    """Learn from every image by its label. A backdoor in the set is learnt with it.

    Attributes:
        trainer: how; None is ``default_trainer`` for a set of that size.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 12

    trainer: Trainer | None = None

    def recipe(self, view: TrainingView) -> Trainer:
        """Return how a view is trained on."""
        return self.trainer or default_trainer(flip=view.flip, num_images=len(view.untrusted))

    def estimated_passes(self, num_images: int) -> float:
        """Return about how many image passes training on a set of that size takes."""
        recipe = self.trainer or default_trainer(flip=False, num_images=num_images)
        return float(recipe.epochs * num_images)

    def train(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Trained:
        """Return the model; see ``SafeTrainer``."""
        with TrainingRun(view=view, generator=generator, on_progress=on_progress) as run:
            model = run.train(run.start, self.recipe(view), view.untrusted, stage="training")
        return run.result(model)
