"""Sift first: list the suspicious images, leave them out, and train plainly on the rest. So the papers of Spectral Signatures
(NeurIPS 2018, section 3) and Activation Clustering (SafeAI 2019, section 5) use their lists; here the default sifter makes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator

from lustral.core.randomness import fork
from lustral.core.records import OnProgress
from lustral.training import Trainer, default_trainer
from lustral.vision.records import Trained, TrainingView
from lustral.vision.safe_training.run import TrainingRun, require_trainable
from lustral.vision.sifters import Combined

LARGE_SHARE = 0.2  # of the images left out, from which a note is due


@dataclass(frozen=True, kw_only=True)
class SiftFirst:
    """Leave out what the default sifter lists, and learn from the other images by their labels.

    Attributes:
        sifter: makes the list.
        trainer: of the model; None is ``default_trainer`` for as many images as are left.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing; clean images draw the line, where there are some"
    cost_passes: ClassVar[float] = 14.8

    sifter: Combined = field(default_factory=Combined)
    trainer: Trainer | None = None

    def estimated_passes(self, num_images: int) -> float:
        """Return about how many image passes training on a set of that size takes."""
        recipe = self.trainer or default_trainer(flip=False, num_images=num_images)
        return self.sifter.estimated_passes(num_images) + num_images * recipe.epochs

    def train(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Trained:
        """Return the model; see ``SafeTrainer``. Where nothing is listed, it is that of plain training.

        Raises:
            ValueError: what is left shows fewer than two classes.
        """
        require_trainable(view)
        sifted = self.sifter.sift(view, generator=fork(generator, "sifting"), on_progress=on_progress)
        left = view.untrusted.subset(~sifted.flagged)
        if len(torch.unique(left.labels)) < 2:
            raise ValueError(
                f"the sifter lists {int(sifted.flagged.sum()):,} of {len(view.untrusted):,} images, and what is left shows fewer "
                "than two classes: look at its list with `lustral sift`, or take another method"
            )
        recipe = self.trainer or default_trainer(flip=view.flip, num_images=len(left))
        with TrainingRun(view=view, generator=generator, on_progress=on_progress) as run:
            model = run.train(run.start, recipe, left, stage="training on the rest")
        return run.result(model, *self.notes(sifted.flagged.sum().item(), len(view.untrusted)), sifted=sifted)

    @staticmethod
    def notes(listed: float, count: int) -> tuple[str, ...]:
        """Say how many images were left out, and whether that is many."""
        if not listed:
            return ("No image is listed as poisoned, so the model learnt from all of them.",)
        many = " That is much: look at the list before you trust the model." if listed > LARGE_SHARE * count else ""
        return (f"The model learnt from {count - listed:,.0f} images; {listed:,.0f} were left out.{many}",)
