"""Control and baseline: fine-tune on clean images (FT in BackdoorBench)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from torch import Generator

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import OnProgress
from lustral.training import Trainer, fine_tuning_recipe
from lustral.vision.images import check_holdout, require_usable, split
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.run import loss_notes
from lustral.vision.repair.selection import Selection, held_out_accuracy

Choice = Literal["last", "held_out"]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """Fine-tune all weights with cross-entropy.

    Attributes:
        trainer: how; learning rate 0.01 as in BackdoorBench, and augmentation as at training.
        least_steps: small clean sets get more epochs, until there are this many steps.
        holdout: share of the clean images kept from training to watch the accuracy.
        choose: weights of the "last" epoch, as in BackdoorBench, or of the one most accurate on "held_out" images. That is often
            the first, whose small steps have changed nothing yet: chosen by clean accuracy, the backdoor stays.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing; a control"
    cost_passes: ClassVar[float] = 17

    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(20))
    least_steps: int = 90
    holdout: float = 0.2
    choose: Choice = "last"

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if self.least_steps < 0:
            raise ValueError(f"expected least_steps >= 0; got {self.least_steps}")
        if self.choose not in get_args(Choice):
            raise ValueError(f"expected choose to be one of {', '.join(get_args(Choice))}; got {self.choose!r}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a fine-tuned model; see ``Purifier``."""
        require_usable(view.clean)
        held_out, fit = split(view.clean, self.holdout, generator=fork(generator, "holdout"))
        with CostMeter(view.model, clean_images=len(view.clean)) as meter:
            selection = Selection(held_out=held_out, triggers=(), floor=held_out_accuracy(view.model, held_out))
            selection.note_given(view.model)
            last = self.trainer.fitted_to_size(len(fit), self.least_steps).fit(
                view.model,
                fit,
                generator=fork(generator, "training"),
                on_epoch=selection.watch,
                on_progress=on_progress,
                stage="fine-tuning",
            )
        assert selection.best_model is not None
        is_last = self.choose == "last"
        chosen = len(selection.history) - 1 if is_last else selection.best_index
        before, after = (selection.history[index].clean_accuracy or 0.0 for index in (0, chosen))
        return Purified(
            model=last.eval() if is_last else selection.best_model,
            history=tuple(selection.history),
            selected=chosen,
            cost=meter.cost,
            notes=loss_notes(before - after),
        )
