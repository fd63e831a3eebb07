"""MESA's retraining: show the model samples of the recovered trigger distribution under their true labels.

Qiao, Yang, Li, "Defending Neural Backdoors via Generative Distribution Modeling", NeurIPS 2019 (arXiv 1910.04749), third step:
ten epochs on the clean images, each of which carries a freshly drawn trigger with probability 1 %, label unchanged. No ascent,
no regulariser.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, fine_tuning_recipe
from lustral.vision.images import check_holdout, require_usable, split
from lustral.vision.inverters.max_entropy import MaxEntropy
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.rates import RateChoice, at_rate
from lustral.vision.repair.run import NOTHING_TO_ERASE, returned_unchanged
from lustral.vision.repair.selection import Selection, accuracy_floor, retry_at_lower_rates, retry_notes


@dataclass(frozen=True, kw_only=True)
class Mesa:
    """Retrain on clean images, some of them triggered, all with their true labels.

    Attributes:
        inverter: recovers the distribution of a label that the verdict names without a trigger.
        trigger_rate: probability that an image is triggered; 0.01 in the paper, which has 8,000 images.
        trainer: how; the paper uses 10 epochs of SGD at 1e-3 without augmentation. Where no epoch holds the accuracy it starts
            anew at a quarter of the rate, twice at most.
        rate: "given": the trainer's; "found": the largest near it that a short range test on the held-out images bears
            (``lustral.vision.repair.rates``), for networks unlike the one that it was chosen on.
        least_steps: small clean sets get more epochs, until there are this many steps.
        accuracy_loss: loss of held-out accuracy, as a fraction, beyond which weights are not kept, give or take one
            standard error.
        holdout: share of the clean images kept from retraining, to choose the epoch on.
    """

    version: ClassVar[int] = 3
    needs: ClassVar[str] = "a backdoor whose trigger can be searched"
    cost_passes: ClassVar[float] = 62
    takes_verdict: ClassVar[bool] = True

    inverter: MaxEntropy = field(default_factory=MaxEntropy)
    trigger_rate: float = 0.2
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(10, weight_decay=0.0))
    rate: RateChoice = "given"
    least_steps: int = 150
    accuracy_loss: float = 0.02
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.trigger_rate <= 1:
            raise ValueError(f"expected a trigger rate in (0, 1]; got {self.trigger_rate}")
        check_holdout(self.holdout)

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a model retrained on the labels that ``view.verdict`` names; see ``Purifier``."""
        require_usable(view.clean)
        verdict = view.require_verdict()
        labels, bank = verdict.suspect_labels, verdict.triggers
        held_out, fit = split(view.clean, self.holdout, generator=fork(generator, "holdout"))
        with CostMeter(view.model, clean_images=len(view.clean)) as meter:
            if not labels:
                return returned_unchanged(view, meter.cost, NOTHING_TO_ERASE)
            if set(labels) != {trigger.target_label for trigger in bank}:
                bank = tuple(
                    self.inverter.invert(
                        DefenderView(model=view.model, clean=fit),
                        labels,
                        held_out=held_out,
                        generator=fork(generator, "recover"),
                        on_progress=on_progress,
                    )
                )

            def objective(model: nn.Module, batch: Batch, stream: Generator) -> Tensor:
                x, y = batch.inputs, batch.labels
                trigger = bank[int(torch.randint(len(bank), (), generator=stream))]
                chosen = (torch.rand(len(x), generator=stream) < self.trigger_rate).to(x.device)[:, None, None, None]
                mixed = torch.where(chosen, trigger(x, generator=stream), x)
                return F.cross_entropy(model(mixed).float(), y)

            floor = accuracy_floor(view.model, held_out, self.accuracy_loss)
            selection = Selection(held_out=held_out, triggers=bank, floor=floor, parts={"round": 1})
            selection.note_given(view.model)
            trainer = self.trainer.fitted_to_size(len(fit), self.least_steps)
            trainer, notes = at_rate(
                self.rate, view.model, trainer, fit, held_out, lambda: objective, generator, on_progress
            )

            def retrain(divisor: float) -> None:
                replace(trainer, learning_rate=trainer.learning_rate / divisor).fit(
                    view.model,
                    fit,
                    generator=fork(generator, "training"),
                    objective=objective,
                    on_epoch=selection.watch,
                    on_progress=on_progress,
                    stage="retraining",
                )

            divisor = retry_at_lower_rates(selection, retrain)
        assert selection.best_model is not None
        return Purified(
            model=selection.best_model,
            history=tuple(selection.history),
            selected=selection.best_index,
            cost=meter.cost,
            verdict=verdict,
            notes=(*notes, *retry_notes(selection, divisor, self.accuracy_loss)),
        )
