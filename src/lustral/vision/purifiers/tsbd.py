"""TSBD: reset the weights that clean unlearning moves most, then fine-tune against sharpness (Lin, Liu, Wei, Li, Xiong,
"Unveiling and Mitigating Backdoor Vulnerabilities based on Unlearning Weight Changes and Backdoor Activeness", NeurIPS 2024,
arXiv 2405.20291).

Stage 1 unlearns clean images by gradient ascent and ranks neurons by how far their weights moved,

    NWC_k = sum_i |W_unlearned[k, i] - W_given[k, i]|            (neuron weight change; k: an output channel)

then sets to zero, in the *given* model, the most moved weights of the most moved neurons. Stage 2 fine-tunes with

    L = CE + lambda ||grad CE||,   whose gradient is about (1 - a) g(theta) + a g(theta + r g / ||g||),   lambda = a r.

How many neurons to reset decides everything, and the published code picks it by the test set. Here it is the largest share
after which the repaired model keeps its held-out accuracy, found by bisection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.history import HistoryEntry, Part
from lustral.core.randomness import fork
from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, fine_tuning_recipe
from lustral.vision.images import check_holdout
from lustral.vision.models.wiring import trace
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.clean_unlearning import unlearn_clean, unlearning_note
from lustral.vision.repair.rates import RateChoice
from lustral.vision.repair.run import PurifyRun
from lustral.vision.repair.selection import accuracy_floor
from lustral.vision.repair.shifted_weights import TINY, Shift, interpolated_loss


def weight_changes(given: nn.Module, unlearned: nn.Module, layers: tuple[str, ...]) -> dict[str, Tensor]:
    """Return |W_unlearned - W_given| of each layer as (neurons, weights per neuron)."""
    return {name: (weight_of(unlearned, name) - weight_of(given, name)).detach().abs().flatten(1) for name in layers}


def weight_of(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a convolution or linear layer."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def most_moved(changes: Mapping[str, Tensor], neuron_ratio: float, weight_ratio: float) -> dict[str, Tensor]:
    """Choose the weights to reset: the most moved share of the weights of the most moved share of all neurons.

    Args:
        changes: (neurons, weights) by layer.
        neuron_ratio: n, share of all neurons of all layers, ranked in one list by the sum of their changes.
        weight_ratio: m, share of the chosen neurons' weights, ranked in one list.

    Returns:
        (neurons, weights) bool by layer.

    >>> moved = {"a": torch.tensor([[3.0, 0.0], [0.5, 0.5]]), "b": torch.tensor([[2.0, 1.5]])}
    >>> {name: chosen.int().tolist() for name, chosen in most_moved(moved, 0.67, 0.5).items()}
    {'a': [[1, 0], [0, 0]], 'b': [[1, 0]]}
    """
    totals = torch.cat([change.sum(1) for change in changes.values()])
    count = int(neuron_ratio * len(totals))
    chosen = torch.zeros_like(totals, dtype=torch.bool)
    chosen[totals.argsort(descending=True, stable=True)[:count]] = True
    rows = dict(zip(changes, torch.split(chosen, [len(change) for change in changes.values()]), strict=True))
    pooled = torch.cat([change[rows[name]].flatten() for name, change in changes.items()])
    keep = int(weight_ratio * len(pooled))
    if not keep:
        return {name: torch.zeros_like(change, dtype=torch.bool) for name, change in changes.items()}
    bound = pooled.sort(descending=True).values[keep - 1]
    return {name: (change >= bound) & rows[name][:, None] for name, change in changes.items()}


@torch.no_grad()
def reset(model: nn.Module, chosen: Mapping[str, Tensor]) -> None:
    """Set the chosen weights of each layer to zero, in place."""
    for name, mask in chosen.items():
        weight = weight_of(model, name)
        weight.masked_fill_(mask.view_as(weight), 0.0)


def unit_steps(radius: float) -> Shift:
    """Return the shift r g / ||g|| of every tensor by itself, as in the authors' code."""

    def shift(weights: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: radius * slope / slope.norm().clamp_min(TINY) for name, slope in slopes.items()}

    return shift


@dataclass(frozen=True, kw_only=True)
class TSBD:
    """Reset what clean unlearning moves most, then fine-tune activeness-aware.

    Attributes:
        neuron_ratios: shares n of the neurons to choose from; the authors' code sweeps 0.01 to 0.9. One value: no choice.
        weight_ratio: m; 0.7 in the authors' code.
        unlearner: gradient ascent; SGD at 1e-4, momentum 0.9, for up to 1000 epochs there.
        share_left: ascent stops when this much of the accuracy above chance is left; at an accuracy of 0.1 in the
            authors' code, which is chance for ten classes.
        trainer: fine-tuning; 21 epochs of SGD at 0.01, constant, batches of 256 there.
        rate: "given": the trainer's, of the fine-tuning; "found": the largest near it that a short range test on the held-out
            images bears (``lustral.vision.repair.rates``), for networks unlike the one that it was chosen on.
        least_steps: small clean sets get more epochs, until there are this many steps.
        radius: r; 0.05 there.
        interpolation: a; 0.7 there; 0 is plain fine-tuning.
        accuracy_loss: loss of held-out accuracy, as a fraction, that a share of neurons may cost, give or take one standard
            error.
        holdout: share of the clean images kept to choose the share of neurons on.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 99

    neuron_ratios: tuple[float, ...] = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5)
    weight_ratio: float = 0.7
    unlearner: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=30, batch_size=128, learning_rate=1e-3, schedule="constant", weight_decay=0.0, clip_norm=10.0
        )
    )
    share_left: float = 0.05
    trainer: Trainer = field(default_factory=lambda: fine_tuning_recipe(20, weight_decay=0.0))
    rate: RateChoice = "given"
    least_steps: int = 200
    radius: float = 0.05
    interpolation: float = 0.7
    accuracy_loss: float = 0.02
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if not self.neuron_ratios or not all(0 < ratio <= 1 for ratio in self.neuron_ratios):
            raise ValueError(f"expected shares of neurons in (0, 1]; got {self.neuron_ratios}")
        if not 0 < self.weight_ratio <= 1 or not 0 <= self.interpolation <= 1 or not 0 <= self.share_left < 1:
            raise ValueError(
                "expected weight_ratio in (0, 1], interpolation in [0, 1] and share_left in [0, 1); got "
                f"{self.weight_ratio}, {self.interpolation} and {self.share_left}"
            )
        if self.radius <= 0:
            raise ValueError(f"expected a radius > 0; got {self.radius}")

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the repaired model with the largest admissible share of neurons reset; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            floor = accuracy_floor(view.model, repair.held_out, self.accuracy_loss)
            layers = trace(view.model, next(repair.fit.batches(1)).inputs).layers
            unlearned, left, epochs = unlearn_clean(
                view.model,
                repair.fit,
                self.unlearner.fitted_to_size(len(repair.fit), 0),
                share_left=self.share_left,
                generator=fork(generator, "unlearning"),
                on_progress=on_progress,
            )
            changes = weight_changes(view.model, unlearned, layers)
            trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
            trainer, told = repair.with_rate(self.rate, trainer, lambda: self.objective)
            model, ratio, admissible = replace(self, trainer=trainer)._choose(repair, changes, floor)
        notes = [*told, f"{unlearning_note(left, epochs)}; {ratio:g} of the neurons were reset."]
        if not admissible:
            notes.append(
                f"Even {ratio:g} of the neurons cost more held-out accuracy than allowed: fewer may do (`neuron_ratios`)."
            )
        return repair.result(model, *notes)

    def _choose(self, repair: PurifyRun, changes: Mapping[str, Tensor], floor: float) -> tuple[nn.Module, float, bool]:
        """Bisect for the largest share of neurons whose repaired model is admissible; return (model, share, admissible)."""
        ratios = sorted(self.neuron_ratios)
        low, high = 0, len(ratios) - 1  # the answer, if there is one, is among these
        best: tuple[nn.Module, float, bool] | None = None
        while low <= high:
            middle = (low + high + 1) // 2
            model = self.repaired(repair, changes, ratios[middle])
            accuracy = repair.history[-1].clean_accuracy
            if accuracy is not None and accuracy >= floor:
                best, low = (model, ratios[middle], True), middle + 1
            else:
                if best is None or not best[2]:
                    best = (model, ratios[middle], False)
                high = middle - 1
        assert best is not None
        kept: tuple[tuple[Part, float], ...] = (("neuron_ratio", best[1]),)
        if repair.history[-1].parts != kept:
            epochs = max(entry.count for entry in repair.history if entry.parts == kept)
            repair.note(best[0], HistoryEntry(count=epochs, parts=kept))
        return best

    def objective(self, student: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        """Return the loss of fine-tuning."""
        x, y = batch.inputs, batch.labels
        return interpolated_loss(
            student,
            lambda classify: F.cross_entropy(classify(x).float(), y),
            shift=unit_steps(self.radius),
            share=self.interpolation,
        )

    def repaired(self, repair: PurifyRun, changes: Mapping[str, Tensor], ratio: float) -> nn.Module:
        """Return the given model with a share of its neurons reset, fine-tuned activeness-aware."""
        model = repair.copy()
        reset(model, most_moved(changes, ratio, self.weight_ratio))

        return repair.train(
            model,
            self.trainer.fitted_to_size(len(repair.fit), self.least_steps),
            objective=self.objective,
            stage="fine-tuning",
            parts=(("neuron_ratio", ratio),),
        )
