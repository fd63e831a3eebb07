"""Choosing weights without an oracle: what a defender can measure on the held-out part of his clean set."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lustral.inverters.max_entropy import firing_rate
from lustral.protocols import ImageSet, RecoveredTrigger
from lustral.training import EpochReport, autocast, frozen

ASR_TIE = 0.005  # recovered success rates closer than this are equal; accuracy decides


@torch.no_grad()
def held_out_accuracy(model: nn.Module, held_out: ImageSet) -> float:
    """Return the clean accuracy on held-out images, in evaluation mode."""
    hits = torch.zeros((), dtype=torch.int64, device=held_out.device)
    with frozen(model):
        for x, labels in held_out.batches(256):
            with autocast(held_out.device):
                out = model(x.contiguous(memory_format=torch.channels_last))
            hits += (out.argmax(1) == labels).sum()
    return int(hits) / len(held_out)


@dataclass(kw_only=True)
class Selection:
    """Watches a training and keeps the weights that a defender would choose.

    Among epochs whose held-out accuracy is at least ``floor``, the one on which recovered triggers fire least; rates
    within half a point are ties, broken by accuracy. Without any such epoch, the most accurate.

    Attributes:
        held_out: clean images that the training does not see.
        triggers: recovered triggers, or none to choose by accuracy alone.
        floor: least held-out accuracy.
        extra: columns added to every history entry, e.g. the round.
        history: one entry per epoch seen.
    """

    held_out: ImageSet
    triggers: Sequence[RecoveredTrigger]
    floor: float
    extra: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    best: tuple[float, ...] | None = None
    best_index: int = -1
    best_model: nn.Module | None = None

    def watch(self, report: EpochReport) -> None:
        """Measure an epoch (an ``on_epoch`` callback)."""
        self.measure(report.model, epoch=report.epoch, loss=report.loss)

    def measure(self, model: nn.Module, **columns: Any) -> None:
        """Measure a model and keep a copy if it is the best so far."""
        accuracy = held_out_accuracy(model, self.held_out)
        rates = [firing_rate(model, self.held_out, trigger) for trigger in self.triggers]
        worst = max(rates, default=0.0)
        self.history.append({**self.extra, **columns, "clean_accuracy": accuracy, "recovered_asr": worst})
        admissible = accuracy >= self.floor
        key = (1.0, -float(round(worst / ASR_TIE)), accuracy) if admissible else (0.0, accuracy, -worst)
        if self.best is None or key > self.best:
            self.best, self.best_index = key, len(self.history) - 1
            self.best_model = copy.deepcopy(model).eval()
