"""The model that a sifter looks at: the caller's, or one trained plainly on the untrusted set."""

from __future__ import annotations

from torch import Generator, nn

from lustral.core.randomness import fork
from lustral.core.records import OnProgress
from lustral.training import Trainer, default_trainer
from lustral.vision.records import TrainingView

STAGE = "training a model to look at"


def plain_model(
    view: TrainingView, *, generator: Generator, trainer: Trainer | None = None, on_progress: OnProgress | None = None
) -> nn.Module:
    """Return the view's model, or one trained on all of the untrusted set; that one has learnt the backdoor, if there is any.

    Args:
        view: the untrusted set, and a model where the caller has one.
        generator: stream of the weights and the training.
        trainer: how to train; None is the recipe for a set of that size.
        on_progress: called on the way.
    """
    if view.model is not None:
        return view.model
    recipe = trainer or default_trainer(flip=view.flip, num_images=len(view.untrusted))
    return recipe.fit(
        view.build_model(fork(generator, "weights")),
        view.untrusted,
        generator=fork(generator, "training"),
        on_progress=on_progress,
        stage=STAGE,
    )
