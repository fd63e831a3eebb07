"""Fine-Pruning: cut the features that clean images hardly use, then fine-tune (Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending
Against Backdooring Attacks on Deep Neural Networks", RAID 2018, arXiv 1805.12185).

Features are the inputs of the head, as in BackdoorBench. Those of least mean activation on clean images are cut one after the
other, until the held-out accuracy has fallen by the tolerance; BackdoorBench measures that on the test set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, autocast, fine_tuning_recipe, frozen
from lustral.vision.images import check_holdout
from lustral.vision.models.wiring import trace
from lustral.vision.records import DefenderView, ImageSet, Purified
from lustral.vision.repair.run import PurifyRun


@torch.no_grad()
def head_inputs(model: nn.Module, head: str, data: ImageSet) -> Tensor:
    """Return what enters the head for every image, (N, F) float32."""
    seen: list[Tensor] = []
    handle = model.get_submodule(head).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    try:
        with frozen(model):
            for x, *_ in data.batches(256):
                with autocast(x.device):
                    model(x.contiguous(memory_format=torch.channels_last))
    finally:
        handle.remove()
    return torch.cat([features.flatten(1) for features in seen])


def prune_count(accuracies: Tensor, floor: float) -> int:
    """Return how many features to cut: the most before the accuracy first falls below the floor.

    Args:
        accuracies: (F,) accuracy after cutting 0, 1, ... F - 1 features.
        floor: least accuracy.

    >>> prune_count(torch.tensor([0.9, 0.9, 0.7, 0.9]), 0.8)
    1
    """
    below = (accuracies < floor).nonzero()[:, 0]
    return max(int(below[0]) - 1, 0) if len(below) else len(accuracies) - 1


@dataclass(frozen=True, kw_only=True)
class FinePruning:
    """Cut the least active features of the head, then fine-tune; what was cut stays cut.

    Attributes:
        tolerance: share of the held-out accuracy that pruning may cost; 0.1 in BackdoorBench.
        trainer: fine-tuning; 100 epochs of SGD at 0.01, cosine, there.
        least_steps: small clean sets get more epochs, until there are this many steps.
        holdout: share of the clean images kept to decide how much to cut.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "a linear head"
    cost_passes: ClassVar[float] = 17

    tolerance: float = 0.1
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(20))
    least_steps: int = 90
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"expected a tolerance in [0, 1); got {self.tolerance}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the pruned and fine-tuned model; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            model = repair.copy()
            name = trace(model, next(repair.fit.batches(1)).inputs).head
            head = model.get_submodule(name)
            if not isinstance(head, nn.Linear):
                raise ValueError(f"Fine-Pruning cuts inputs of a linear head; {name} is {head}: use another method")
            order = head_inputs(model, name, repair.fit).abs().mean(0).argsort()
            accuracies = self.after_cutting(head, head_inputs(model, name, repair.held_out), repair.held_out, order)
            count = prune_count(accuracies, (1 - self.tolerance) * float(accuracies[0]))
            cut = order[:count]
            cut_columns(head.weight, cut)

            def objective(student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
                x, y = batch.inputs, batch.labels
                weight = student.get_submodule(name).weight
                assert isinstance(weight, Tensor)
                cut_columns(weight, cut)
                return F.cross_entropy(student(x).float(), y)

            trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
            model = repair.train(model, trainer, objective=objective, stage="fine-tuning")
            weight = model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            cut_columns(weight, cut)
        return repair.result(model, f"{count} of {head.in_features} features were cut.")

    @staticmethod
    @torch.no_grad()
    def after_cutting(head: nn.Linear, features: Tensor, held_out: ImageSet, order: Tensor) -> Tensor:
        """Return the accuracy after cutting 0, 1, ... F - 1 features in an order: the head is linear, so each cut is a sum."""
        logits = F.linear(features, head.weight, head.bias)
        accuracies = []
        for feature in order.tolist():
            accuracies.append((logits.argmax(1) == held_out.labels).float().mean())
            logits = logits - features[:, feature, None] * head.weight[:, feature]
        return torch.stack(accuracies)


@torch.no_grad()
def cut_columns(weight: Tensor, columns: Tensor) -> None:
    """Set columns of a weight to zero, in place."""
    weight[:, columns] = 0
