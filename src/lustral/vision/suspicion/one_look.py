"""Sifters that look once at the plainly trained model, and score what they saw: all but the score is the same."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Generator

from lustral.core.records import OnProgress
from lustral.training import Trainer
from lustral.vision.records import Sifted, TrainingView
from lustral.vision.suspicion.looking import Looked, counted_model, look_at_both
from lustral.vision.suspicion.scores import Scores
from lustral.vision.suspicion.scoring_model import estimated_passes


class OneLook(ABC):
    """A ``Sifter`` that is its ``score``; no dataclass, so that a method's fields are its own and in its order."""

    @property
    @abstractmethod
    def trainer(self) -> Trainer | None:
        """Trains the model to look at, where the view has none; None is the recipe for a set of that size."""

    @abstractmethod
    def score(self, untrusted: Looked, clean: Looked | None = None) -> Scores:
        """Score images that a model has looked at."""

    def estimated_passes(self, num_images: int) -> float:
        """Return how many passes a set of so many images takes, where a model has to be trained."""
        return estimated_passes(num_images, trainer=self.trainer)

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        """Return a score for each image of ``view.untrusted``; see ``Sifter``."""
        with counted_model(view, generator=generator, trainer=self.trainer, on_progress=on_progress) as (model, meter):
            scores = self.score(*look_at_both(model, view, on_progress=on_progress))
        return scores.sifted(meter.cost)
