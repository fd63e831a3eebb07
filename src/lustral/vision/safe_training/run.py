"""One run of a safe trainer: the network it trains, what that costs, and what each epoch measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import torch
from torch import Generator, nn

from lustral.core.cost import CostMeter
from lustral.core.history import HistoryEntry, Part
from lustral.core.randomness import fork
from lustral.core.records import Objective, OnProgress, TrainingSet
from lustral.training import EpochReport, Trainer
from lustral.vision.evaluation.metrics import clean_accuracy
from lustral.vision.records import Sifted, Trained, TrainingView


def require_trainable(view: TrainingView) -> None:
    """Raise ``ValueError`` unless the untrusted set holds at least two images, of at least two classes."""
    data = view.untrusted
    if len(data) < 2:
        raise ValueError(f"expected at least 2 images to learn from; the untrusted set has {len(data)}")
    if len(torch.unique(data.labels)) < 2:
        raise ValueError(
            f"the untrusted set of {len(data)} images holds a single class; give images of at least two classes"
        )


@dataclass(kw_only=True)
class TrainingRun:
    """One run of a safe trainer: counts the cost, keeps the history. Use it in a ``with`` block.

    Attributes:
        view: what the trainer was given.
        generator: stream of the run.
        on_progress: called by every training.
        given: a classifier that training goes on from; None: an untrained one is built.
        history: one entry per epoch.
        start: the classifier that training begins with.
    """

    view: TrainingView
    generator: Generator
    on_progress: OnProgress | None = None
    given: nn.Module | None = None
    history: list[HistoryEntry] = field(default_factory=list)
    start: nn.Module = field(init=False)
    _meter: CostMeter = field(init=False)

    def __post_init__(self) -> None:
        """Check the untrusted set and build the network."""
        require_trainable(self.view)
        weights = fork(self.generator, "weights")
        self.start = self.view.build_model(weights) if self.given is None else self.given
        clean = self.view.clean
        self._meter = CostMeter(self.start, clean_images=0 if clean is None else len(clean))

    def __enter__(self) -> Self:
        """Start counting."""
        self._meter.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        self._meter.__exit__(kind, error, trace)

    @property
    def device(self) -> torch.device:
        """Return where the network is."""
        return next(self.start.parameters()).device

    def watch(self, model: nn.Module) -> nn.Module:
        """Count the passes of another module too, e.g. one that wraps the network, and return it."""
        self._meter.watch(model)
        return model

    def note(self, model: nn.Module | None, entry: HistoryEntry) -> None:
        """Add a history entry, with the accuracy of the model on the clean images where there are both."""
        clean = self.view.clean
        if model is not None and clean is not None and len(clean):
            entry = replace(entry, clean_accuracy=clean_accuracy(model, clean).value)
        self.history.append(entry)

    def measure(self, model: nn.Module) -> None:
        """Add the accuracy on the clean images, where there are any, to the last entry."""
        if self.history:
            self.note(model, self.history.pop())

    def train(
        self,
        model: nn.Module,
        trainer: Trainer,
        data: TrainingSet,
        *,
        stage: str,
        objective: Objective | None = None,
        parts: tuple[tuple[Part, float], ...] = (),
        classifier: Callable[[nn.Module], nn.Module | None] = lambda model: model,
        ends: Callable[[EpochReport], bool] = lambda report: False,
    ) -> nn.Module:
        """Return the model after the last epoch; each epoch is noted.

        Args:
            model: start, unchanged.
            trainer: how.
            data: what to learn from.
            stage: name in progress reports and of the stream.
            objective: loss; None is cross-entropy.
            parts: of the history entries.
            classifier: gives what classifies images, of the model that is trained; None where nothing does yet.
            ends: says after an epoch whether training ends with it.
        """

        def note(report: EpochReport) -> bool:
            entry = HistoryEntry(
                count=report.epoch, parts=parts, loss=report.loss, images_per_second=report.images_per_second
            )
            self.note(classifier(report.model), entry)
            return ends(report)

        return trainer.fit(
            model,
            data,
            generator=fork(self.generator, stage),
            objective=objective,
            on_epoch=note,
            on_progress=self.on_progress,
            stage=stage,
        )

    def result(self, model: nn.Module, *notes: str, sifted: Sifted | None = None) -> Trained:
        """Return the record of the run, with the cost of the sifting; call it after the block."""
        cost = self._meter.cost if sifted is None else sifted.cost + self._meter.cost
        return Trained(model=model.eval(), history=tuple(self.history), cost=cost, sifted=sifted, notes=notes)
