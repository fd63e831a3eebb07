"""RNP: unlearn clean images, see which channels recovery does without, and cut those (Li, Lyu, Ma, Koren, Lyu, Ma, Jiang,
"Reconstructive Neuron Pruning for Backdoor Defense", ICML 2023, arXiv 2305.14876).

Gradient ascent on clean images unlearns the task. Then channel masks alone are trained on the unlearned model,

    min_m CE(f(x; m w_unlearned), y),       m in [0, 1],

and channels whose mask falls are cut in the given model: they served something other than the task. Dozens of masks end at
exactly zero; which of them go first is told by the mean of a mask over the epochs, the lower the sooner it fell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from lustral.vision.repair.clean_unlearning import unlearn_clean, unlearning_note
from lustral.vision.repair.run import PurifyRun
from lustral.vision.repair.selection import accuracy_floor


@dataclass(frozen=True, kw_only=True)
class RNP:
    """Unlearn, recover by masks, cut what did not recover.

    Attributes:
        unlearner: gradient ascent; SGD at 0.01 with batches of 128 in the authors' code.
        share_left: ascent stops when this much of the accuracy above chance is left; at an accuracy of 0.1 there.
        recoverer: of the masks; 20 epochs of SGD at 0.2 on a fifth of the loss there, which is 0.04 on the whole.
        least_steps: small clean sets get more epochs of recovery, until there are this many steps.
        step: share of the channels cut at a time.
        highest_mask: channels of a higher mean mask stay.
        accuracy_loss: loss of held-out accuracy, as a fraction, that cutting may cost, give or take one standard error.
        holdout: share of the clean images kept to choose how many channels to cut.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "batch normalisation"
    cost_passes: ClassVar[float] = 18

    unlearner: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=30, batch_size=128, learning_rate=1e-3, schedule="constant", weight_decay=0.0, clip_norm=10.0
        )
    )
    share_left: float = 0.05
    recoverer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=20, batch_size=128, learning_rate=0.04, schedule="constant", weight_decay=0.0
        )
    )
    least_steps: int = 200
    step: float = 0.01
    highest_mask: float = 0.9
    accuracy_loss: float = 0.03
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        check_cutting(self.step, self.highest_mask)
        if not 0 <= self.share_left < 1:
            raise ValueError(f"expected share_left in [0, 1); got {self.share_left}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the pruned model; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            names = require_norms("RNP", view.model)
            unlearned, left, epochs = unlearn_clean(
                view.model,
                repair.fit,
                self.unlearner.fitted_to_size(len(repair.fit), 0),
                share_left=self.share_left,
                generator=fork(generator, "unlearning"),
                on_progress=on_progress,
            )
            masked = repair.follow(MaskedNorms(unlearned, names))
            seen = [masks_of(masked)]
            self.recoverer.fitted_to_size(len(repair.fit), self.least_steps).fit(
                masked,
                repair.fit,
                generator=fork(generator, "masks"),
                objective=recovery,
                on_epoch=lambda report: seen.append(masks_of(report.model)),
                on_progress=on_progress,
                stage="recovering by masks",
            )
            floor = accuracy_floor(view.model, repair.held_out, self.accuracy_loss)
            model, said = cut_in_order(repair, mean(seen), step=self.step, highest=self.highest_mask, floor=floor)
        first = f"{unlearning_note(left, epochs)}."
        return repair.result(model, first, said)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the masks of a network in training, by name."""
    assert isinstance(model, MaskedNorms)
    return model.by_name()


def mean(seen: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each mask over time, (C,), by name."""
    return {name: torch.stack([masks[name] for masks in seen]).mean(0) for name in seen[0]}


def recovery(model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
    """Return the loss that the masks minimise."""
    assert isinstance(model, MaskedNorms)
    model.clip()
    return F.cross_entropy(model(batch.inputs).float(), batch.labels)
