"""ANP: cut the channels that an adversary would use to make the network fail (Wu, Wang, "Adversarial Neuron Pruning Purifies
Backdoored Deep Models", NeurIPS 2021, arXiv 2110.14430).

Each batch-normalised channel has a mask m in [0, 1] on its weight:

    min_m  a CE(m) + (1 - a) max_{|d|, |e| <= eps} CE((m + d) w, (1 + e) b)

Channels are cut in the order of their masks, as many as the held-out accuracy allows; published benchmarks choose a threshold on
the test set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer
from lustral.vision.images import check_holdout
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.channels import MaskedNorms, check_cutting, cut_in_order, require_norms
from lustral.vision.repair.run import PurifyRun
from lustral.vision.repair.selection import accuracy_floor


@dataclass(frozen=True, kw_only=True)
class ANP:
    """Learn channel masks against adversarial shifts, then cut.

    Attributes:
        trainer: of the masks; 2000 steps of SGD at 0.2, momentum 0.9, batches of 128 in the paper.
        least_steps: small clean sets get more epochs, until there are this many steps.
        epsilon: largest relative shift of weight and bias; 0.4 in the paper.
        alpha: weight of the loss without shifts; 0.2 in the paper.
        step: share of the channels cut at a time.
        highest_mask: channels whose mask ended higher stay; 0.9 is BackdoorBench's largest threshold.
        accuracy_loss: loss of held-out accuracy, as a fraction, that cutting may cost, give or take one standard error.
        holdout: share of the clean images kept to choose how many channels to cut.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "batch normalisation"
    cost_passes: ClassVar[float] = 62

    trainer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=25, batch_size=128, learning_rate=0.2, schedule="constant", weight_decay=0.0
        )
    )
    least_steps: int = 400
    epsilon: float = 0.4
    alpha: float = 0.2
    step: float = 0.01
    highest_mask: float = 0.9
    accuracy_loss: float = 0.03
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        check_cutting(self.step, self.highest_mask)
        if not 0 < self.epsilon <= 1 or not 0 <= self.alpha <= 1:
            raise ValueError(f"expected epsilon in (0, 1] and alpha in [0, 1]; got {self.epsilon} and {self.alpha}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the pruned model; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            names = require_norms("ANP", view.model)
            masked = repair.follow(MaskedNorms(repair.copy(), names))
            trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
            trained = trainer.fit(
                masked,
                repair.fit,
                generator=fork(generator, "masks"),
                objective=self.objective,
                on_progress=on_progress,
                stage="learning masks",
            )
            assert isinstance(trained, MaskedNorms)
            floor = accuracy_floor(view.model, repair.held_out, self.accuracy_loss)
            model, said = cut_in_order(
                repair, trained.by_name(), step=self.step, highest=self.highest_mask, floor=floor
            )
        return repair.result(model, said)

    def objective(self, model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        """Return the loss of a batch: shifts by one signed step from a random start, then both terms."""
        x, y = batch.inputs, batch.labels
        assert isinstance(model, MaskedNorms)
        model.clip()
        shifts = [
            torch.empty(mask.shape)
            .uniform_(-self.epsilon, self.epsilon, generator=generator)
            .to(x.device)
            .requires_grad_()
            for mask in (*model.masks, *model.masks)
        ]
        count = len(model.masks)
        worst = F.cross_entropy(model(x, shifts[:count], shifts[count:]).float(), y)
        slopes = torch.autograd.grad(worst, shifts, allow_unused=True)
        moved = [
            (shift.detach() + self.epsilon * (0 if slope is None else slope.sign())).clamp(-self.epsilon, self.epsilon)
            for shift, slope in zip(shifts, slopes, strict=True)
        ]
        robust = F.cross_entropy(model(x, moved[:count], moved[count:]).float(), y)
        return self.alpha * F.cross_entropy(model(x).float(), y) + (1 - self.alpha) * robust
