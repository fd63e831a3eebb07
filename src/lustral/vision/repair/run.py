"""Repairing a model by training on clean images, with a part of them held out to watch what that costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from torch import Generator, nn

from lustral.core.cost import CostMeter
from lustral.core.history import HistoryEntry, Part
from lustral.core.randomness import fork
from lustral.core.records import Cost, Objective, OnProgress, Progress
from lustral.training import EpochReport, Trainer
from lustral.vision.images import require_usable, split
from lustral.vision.records import DefenderView, ImageSet, Purified
from lustral.vision.repair.rates import RateChoice, at_rate
from lustral.vision.repair.selection import held_out_accuracy

NOTHING_TO_ERASE = "The scan named no label, so the model was returned unchanged."
ACCEPTED_LOSS = 0.03  # of held-out accuracy; more is said in a note


def check_relative_rate(rate: float | None) -> None:
    """Raise ``ValueError`` unless the rate is positive, or None."""
    if rate is not None and not rate > 0:
        raise ValueError(f"expected a relative rate > 0, or None for the trainer's own rate; got {rate}")


def loss_notes(lost: float) -> tuple[str, ...]:
    """Return a note on held-out accuracy lost, as a fraction; none where it is within ``ACCEPTED_LOSS``."""
    if lost <= ACCEPTED_LOSS:
        return ()
    return (
        f"Held-out accuracy fell by {100 * lost:.1f} points: measure it on images of your own before you use this model.",
    )


def returned_unchanged(view: DefenderView, cost: Cost, note: str) -> Purified:
    """Return a copy of the given model, and a note that says why nothing was done."""
    same = copy.deepcopy(view.model).eval()
    return Purified(model=same, history=(), selected=None, cost=cost, verdict=view.verdict, notes=(note,))


def rate_cap_note(asked: Trainer, used: Trainer) -> tuple[str, ...]:
    """Return a note on a learning rate that ``relative_rate`` lowered; none where it did not."""
    if used.learning_rate >= asked.learning_rate:
        return ()
    lowered = f"{used.learning_rate:.1e} instead of {asked.learning_rate:.1e}"
    return (f"The learning rate was {lowered}, the most that `relative_rate` allows for weights like these.",)


@dataclass(kw_only=True)
class PurifyRun:
    """One run of a purifier: splits the clean images, counts the cost, keeps the history. Use it in a ``with`` block.

    Attributes:
        view: what the defence was given.
        holdout: share of the clean images kept from training.
        generator: stream of the run.
        on_progress: called by every training.
        history: one entry per epoch or round.
    """

    view: DefenderView
    holdout: float
    generator: Generator
    on_progress: OnProgress | None = None
    history: list[HistoryEntry] = field(default_factory=list)
    held_out: ImageSet = field(init=False)
    fit: ImageSet = field(init=False)
    before: float = field(init=False)
    _meter: CostMeter = field(init=False)

    def __post_init__(self) -> None:
        """Check the clean set and split it."""
        require_usable(self.view.clean)
        self.held_out, self.fit = split(self.view.clean, self.holdout, generator=fork(self.generator, "holdout"))
        self._meter = CostMeter(self.view.model, clean_images=len(self.view.clean))

    def __enter__(self) -> Self:
        """Start counting."""
        with ExitStack() as stack:
            stack.enter_context(self._meter)
            self.before = held_out_accuracy(self.view.model, self.held_out)
            stack.pop_all()  # all is well: the block goes on
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        self._meter.__exit__(kind, error, trace)

    @property
    def cost(self) -> Cost:
        """What was used so far; after the block, all of it."""
        return self._meter.cost

    def follow(self, model: nn.Module) -> nn.Module:
        """Count the passes of a copy of the given model too, and return it."""
        CostMeter.follow(self.view.model, model)
        return model

    def copy(self) -> nn.Module:
        """Return a copy of the given model in evaluation mode, with its passes counted."""
        return self.follow(copy.deepcopy(self.view.model).eval())

    def note(self, model: nn.Module, entry: HistoryEntry) -> float:
        """Add a history entry, completed with the held-out accuracy, and return that."""
        accuracy = held_out_accuracy(model, self.held_out)
        self.history.append(replace(entry, clean_accuracy=accuracy))
        return accuracy

    def report(self, stage: str, done: int = 1, total: int = 1) -> None:
        """Report how far a stage is that trains nothing: as done, if nothing else is said."""
        if self.on_progress is not None:
            self.on_progress(Progress(stage=stage, done=done, total=total))

    def train(
        self,
        model: nn.Module,
        trainer: Trainer,
        *,
        stage: str,
        objective: Objective | None = None,
        parts: tuple[tuple[Part, float], ...] = (),
    ) -> nn.Module:
        """Return the model after the last epoch of training on ``fit``; each epoch is noted.

        Args:
            model: start, unchanged.
            trainer: how.
            stage: name in progress reports and of the stream.
            objective: loss; None is cross-entropy.
            parts: of the history entries.
        """

        def note(report: EpochReport) -> None:
            self.note(report.model, HistoryEntry(count=report.epoch, parts=parts, loss=report.loss))

        return trainer.fit(
            model,
            self.fit,
            generator=fork(self.generator, stage),
            objective=objective,
            on_epoch=note,
            on_progress=self.on_progress,
            stage=stage,
        )

    def with_rate(
        self,
        choice: RateChoice,
        trainer: Trainer,
        make_objective: Callable[[], Objective] | None = None,
        *,
        model: nn.Module | None = None,
    ) -> tuple[Trainer, tuple[str, ...]]:
        """Return a recipe at the rate that a method asks for, and notes on it.

        Args:
            choice: "given" leaves the recipe as it is and draws nothing.
            trainer: the recipe, fitted to the size of ``fit``.
            make_objective: as for ``find_rate``.
            model: what will be trained; None is the given model.
        """
        start = self.view.model if model is None else model
        return at_rate(
            choice, start, trainer, self.fit, self.held_out, make_objective, self.generator, self.on_progress
        )

    def result(self, model: nn.Module, *notes: str, kept: int = -1) -> Purified:
        """Return the record of the run; call it after the block.

        The history begins with the given model, as epoch 0 or as no channel cut, if nothing noted it already.

        Args:
            model: the one to return.
            notes: sentences for the user.
            kept: index of its entry in the history; the last, if nothing else is said.
        """
        history = tuple(self.history)
        kept = kept % len(history) if history else 0
        accuracy = history[kept].clean_accuracy if history else None
        lost = 0.0 if accuracy is None else self.before - accuracy
        if history and not history[0].is_given:
            history = (HistoryEntry(count=0, unit=history[0].unit, clean_accuracy=self.before), *history)
            kept += 1
        return Purified(
            model=model.eval(),
            history=history,
            selected=kept if history else None,
            cost=self._meter.cost,
            notes=(*notes, *loss_notes(lost)),
        )
