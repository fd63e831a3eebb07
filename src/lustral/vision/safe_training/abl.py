"""ABL: what is learnt first is isolated and unlearnt at the end (Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training
Clean Models on Poisoned Data", NeurIPS 2021, arXiv 2110.11571, section 3).

1. A few epochs with the loss held up (``lustral.vision.sifters.early_loss``); the share p of the least losses is isolated: D_b.
2. Training goes on with all other images.
3. Ascent on the isolated ones:  L = -mean over D_b of CE(f(x), y).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import EpochReport, Trainer, default_trainer
from lustral.vision.models.features import gather
from lustral.vision.records import Trained, TrainingView
from lustral.vision.safe_training.run import TrainingRun, require_trainable
from lustral.vision.sifters.early_loss import EarlyLoss


def ascent(logits: Tensor, labels: Tensor, most: float) -> Tensor:
    """Return minus the mean cross-entropy of logits (B, K), where the loss of an image counts up to ``most`` log K.

    >>> ascent(torch.tensor([[0.0, 0.0], [0.0, 99.0]]), torch.tensor([0, 0]), 3.0)  # log 2 and 3 log 2
    tensor(-1.3863)
    """
    losses = F.cross_entropy(logits.float(), labels, reduction="none")
    return -losses.clamp_max(most * math.log(logits.shape[1])).mean()


def isolated(scores: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return the positions of the share of largest scores (N,), at least one, and all others; both ascending."""
    order = scores.argsort(descending=True, stable=True)
    count = max(int(share * len(scores) + 1e-9), 1)
    return order[:count].sort().values, order[count:].sort().values


@dataclass(frozen=True, kw_only=True)
class ABL:
    """Learn, and unlearn what was learnt suspiciously early.

    Attributes:
        sifter: the first stage.
        isolation: p, the share that is isolated; 0.01 in the paper.
        trainer: of the second stage; None is ``default_trainer`` for a set of that size. 60 epochs in the paper's code.
        unlearner: of the third; 20 epochs of SGD at 5e-4 in the paper's code.
        stop_at_chance: end the third stage as soon as the isolated images are called by their label no more often than by
            chance, 1 / K. The published code goes on, and the model forgets more than the trigger.
        loss_cap: of an isolated image in the third stage, from which it is let be; times log K, the loss of guessing. Without
            a cap the ascent has no end: on 14 isolated images it diverged within 44 steps.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 17

    sifter: EarlyLoss = field(default_factory=EarlyLoss)
    isolation: float = 0.01
    trainer: Trainer | None = None
    unlearner: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=20, batch_size=64, optimizer="heavy_ball", learning_rate=5e-4, schedule="constant"
        )
    )
    stop_at_chance: bool = True
    loss_cap: float = 2.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.isolation < 1:
            raise ValueError(f"expected an isolated share in (0, 1); got {self.isolation}")
        if self.loss_cap <= 0:
            raise ValueError(f"expected a cap of the loss > 0; got {self.loss_cap}")

    def estimated_passes(self, num_images: int) -> float:
        """Return about how many image passes training on a set of that size takes."""
        recipe = self.trainer or default_trainer(flip=False, num_images=num_images)
        return num_images * (self.sifter.cost_passes + recipe.epochs + self.isolation * self.unlearner.epochs)

    def train(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Trained:
        """Return the model; see ``SafeTrainer``."""
        require_trainable(view)
        data = view.untrusted
        early, sifted = self.sifter.isolate(view, generator=fork(generator, "isolating"), on_progress=on_progress)
        suspects, others = isolated(sifted.scores, self.isolation)
        flagged = torch.zeros(len(data), dtype=torch.bool)
        flagged[suspects] = True
        sifted = replace(
            sifted,
            flagged=flagged,
            threshold=float(sifted.scores[suspects].min()),
            basis=f"{sifted.basis} ABL draws no line: it isolates {100 * self.isolation:g} % of the images, poisoned or not.",
        )
        with TrainingRun(view=view, generator=generator, on_progress=on_progress, given=early) as run:
            recipe = self.trainer or default_trainer(flip=view.flip, num_images=len(others))
            model = run.train(early, recipe, data.subset(others), stage="training on the others", parts=(("stage", 2),))
            model = self.unlearn(run, model, suspects)
        return run.result(model, *sifted.notes, sifted=sifted)

    def unlearn(self, run: TrainingRun, model: nn.Module, suspects: Tensor) -> nn.Module:
        """Return the model after the ascent on the isolated images."""
        data = run.view.untrusted.subset(suspects)

        def is_forgotten(report: EpochReport) -> bool:
            if not self.stop_at_chance:
                return False
            _, logits = gather(report.model, data)
            return float((logits.argmax(1) == data.labels.cpu()).float().mean()) <= 1 / data.num_classes

        def objective(model: nn.Module, batch: Batch, stream: Generator) -> Tensor:
            return ascent(model(batch.inputs), batch.labels, self.loss_cap)

        return run.train(
            model,
            self.unlearner,
            data,
            stage="unlearning the isolated images",
            objective=objective,
            parts=(("stage", 3),),
            ends=is_forgotten,
        )
