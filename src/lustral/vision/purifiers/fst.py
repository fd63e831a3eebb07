"""FST: shift the features by training a new head away from the old one (Min, Qin, Shen, Cheng, "Towards Stable Backdoor
Purification through Feature Shift Tuning", NeurIPS 2023, arXiv 2310.01875).

The head W starts anew and all weights minimise CE + a <W, W_given>, with ||W|| set back to ||W_given|| after every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, fine_tuning_recipe
from lustral.vision.images import check_holdout
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.heads import fresh_head, linear_head, rescale
from lustral.vision.repair.run import PurifyRun

MANY_CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class FST:
    """Train a new head away from the given one, and all other weights along.

    Attributes:
        alpha: weight of the inner product with the given head; None: 0.1, and 0 from 100 classes on, as the authors advise.
        trainer: 10 epochs of SGD at 0.01, cosine, in the authors' code, with 1,000 images.
        least_steps: small clean sets get more epochs, until there are this many steps.
        holdout: share of the clean images kept to watch the accuracy; the last weights are returned.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "a linear head"
    cost_passes: ClassVar[float] = 17

    alpha: float | None = None
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(20))
    least_steps: int = 150
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if self.alpha is not None and self.alpha < 0:
            raise ValueError(f"expected alpha >= 0; got {self.alpha}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the shifted model; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            name = linear_head(view.model, next(repair.fit.batches(1)).inputs)
            model = repair.copy()
            head = model.get_submodule(name)
            assert isinstance(head, nn.Linear)
            given = head.weight.detach().clone()
            size = given.norm()
            fresh_head(head, fork(generator, "head"))
            alpha = (0.1 if view.clean.num_classes < MANY_CLASSES else 0.0) if self.alpha is None else self.alpha

            def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
                x, y = batch.inputs, batch.labels
                weight = student.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                rescale(weight, size)
                return F.cross_entropy(student(x).float(), y) + alpha * (weight * given).sum()

            trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
            model = repair.train(model, trainer, objective=objective, stage="feature shift tuning")
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            rescale(weight, size)
        return repair.result(model)
