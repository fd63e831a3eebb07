"""Early loss: poisoned images are learnt first (Li, Lyu, Koren, Lyu, Li, Ma, "Anti-Backdoor Learning: Training Clean Models on
Poisoned Data", NeurIPS 2021, arXiv 2110.11571; the isolation of its first stage, section 3).

    L_LGA = sign(CE - gamma) CE

A loss below gamma climbs again: the task is held there, while images with a trigger, which are learnt within an epoch, have next
to no gradient left to climb by. After a few epochs the images of the least loss are the suspicious ones.

The paper writes the sign inside the mean, image by image. The authors' code takes it of a batch's mean, and so does this file by
default: image by image, poisoned images are held at gamma like all others. With the batch's mean, the gradient is that of
flooding, |CE - gamma|, the other loss of the code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import Batch, Objective, OnProgress
from lustral.training import Trainer
from lustral.vision.models.features import gather
from lustral.vision.records import LabelledImages, Sifted, TrainingView
from lustral.vision.suspicion.lines import draw_line

STAGE = "learning what is learnt first"


def lga_objective(gamma: float, *, per_image: bool = False) -> Objective:
    """Return the objective L_LGA with the sign of the batch's mean loss, or of each image's."""

    def objective(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        return lga(F.cross_entropy(model(batch.inputs).float(), batch.labels, reduction="none"), gamma, per_image)

    return objective


def lga(losses: Tensor, gamma: float, per_image: bool = False) -> Tensor:
    """Return sign(l - gamma) l of losses (B,): of their mean, or the mean of it.

    >>> losses = torch.tensor([0.1, 0.7])
    >>> round(lga(losses, 0.5).item(), 6), round(lga(losses, 0.5, per_image=True).item(), 6)
    (-0.4, 0.3)
    """
    if not per_image:
        losses = losses.mean()
    return (torch.sign(losses.detach() - gamma) * losses).mean()


def log_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the logarithms of the cross-entropies (N,): finite and distinct where the loss itself would round to zero.

    Args:
        logits: (N, K) float32.
        labels: (N,) int64.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    below = others - own  # CE = log(1 + exp(below)), which is exp(below) where that is tiny
    return torch.where(below < -15, below, F.softplus(below).log())


@dataclass(frozen=True, kw_only=True)
class EarlyLoss:
    """Train a few epochs with the loss held up, and suspect what is fitted best.

    Attributes:
        gamma: the loss that the task is held at; 0.5 in the paper.
        per_image: take the sign image by image, as the paper writes it, instead of batch by batch, as its code does.
        trainer: SGD at 0.1 with batches of 64 for 20 epochs in the paper, 10 in its code, with crops and flips; here 4, without.
        least_steps: small sets get more epochs, until there are this many steps.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 4.3

    gamma: float = 0.5
    per_image: bool = False
    trainer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=4, batch_size=64, learning_rate=0.1, schedule="constant", weight_decay=1e-4
        )
    )
    least_steps: int = 600

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.gamma < 0 or self.least_steps < 0:
            raise ValueError(f"expected gamma >= 0 and least_steps >= 0; got {self.gamma} and {self.least_steps}")

    @classmethod
    def published(cls) -> Self:
        """Return the settings of the paper: 20 epochs."""
        return cls(trainer=Trainer(epochs=20, batch_size=64, learning_rate=0.1, schedule="constant", weight_decay=1e-4))

    def estimated_passes(self, num_images: int) -> float:
        """Return how many passes a set of so many images takes."""
        return num_images * (self.trainer.fitted_to_size(num_images, self.least_steps).epochs + 1 / 3)

    def sift(self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None) -> Sifted:
        """Return minus the logarithm of each image's loss; see ``Sifter``."""
        return self.isolate(view, generator=generator, on_progress=on_progress)[1]

    def isolate(
        self, view: TrainingView, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> tuple[nn.Module, Sifted]:
        """Return the model after the first stage of ABL, from which its unlearning goes on, and what was found with it.

        Args:
            view: the untrusted set, and an untrained model; a trained one is of no use here.
            generator: stream of the run.
            on_progress: called on the way.
        """
        data = view.untrusted
        require_images(data)
        model = view.build_model(fork(generator, "weights"))
        with CostMeter(model, clean_images=0 if view.clean is None else len(view.clean)) as meter:
            model = self.trainer.fitted_to_size(len(data), self.least_steps).fit(
                model,
                data,
                generator=fork(generator, "training"),
                objective=lga_objective(self.gamma, per_image=self.per_image),
                on_progress=on_progress,
                stage=STAGE,
            )
            score = scorer(model, on_progress)
            scores = score(data)
            line = draw_line(scores, None if view.clean is None else score(view.clean))
        basis = (
            f"The score is minus the logarithm of an image's loss while the loss of the task is held at {self.gamma:g}: images "
            f"with a trigger are learnt first. {line.sentence}"
        )
        sifted = Sifted(scores=scores, flagged=line.flagged, threshold=line.threshold, basis=basis, cost=meter.cost)
        return model, sifted


def require_images(data: LabelledImages) -> None:
    """Raise ``ValueError`` where there is nothing to tell apart."""
    if len(data) < 2:
        raise ValueError(f"expected at least 2 images to sift; the set has {len(data)}")


def scorer(model: nn.Module, on_progress: OnProgress | None) -> Callable[[LabelledImages], Tensor]:
    """Return a function from a set to minus the logarithms of its losses, (N,) float32 on the CPU."""

    def score(data: LabelledImages) -> Tensor:
        _, logits = gather(model, data, on_progress=on_progress, stage="losses")
        return -log_losses(logits, data.labels.cpu())

    return score
