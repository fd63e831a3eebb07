"""CNPD: a neural polarizer for each class, chosen by what the backdoored network says first (Zhu, Wei, Zha, Wu,
"Class-Conditional Neural Polarizer: A Lightweight and Effective Backdoor Defense by Purifying Poisoned Features",
arXiv 2502.18520; its variant r-CNPD, one replica of the layer per class).

The network F is frozen. An image that F calls c is answered by F with polarizer P_c before a late layer. P_c has only two things
to do, then: to leave images of class c alone, and to give back their own class to images that something drove to c. The
something is a perturbation that drives F itself to a class t drawn for each image, x~ = clip(x + d) with ||d||_2 <= radius: what
the backdoor made easy is what such a perturbation finds. The polarizers minimise

    w_clean CE(F_{F(x)}(x), y) + w_restore CE(F_t(x~), y) - w_margin log(1 - s_m) - w_target log(1 - s_t),    s = softmax F_t(x~)

with F_c the network filtered by P_c and m the most probable class of x~ but y. So no label of the attacker need be guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer
from lustral.vision.images import check_holdout
from lustral.vision.models import Classifier, Conditioned
from lustral.vision.models.wiring import trace
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.perturbation import project
from lustral.vision.repair.polarizing import (
    Start,
    avoidance_loss,
    begin,
    check_polarizing,
    feature_statistics,
    polarizer_layer,
    runner_up,
)
from lustral.vision.repair.run import PurifyRun


def condition(model: nn.Module, name: str, num_classes: int) -> nn.Module:
    """Return ``model`` with a polarizer for each class before a layer: inside of a ``Classifier``, around anything else."""
    if isinstance(model, Classifier):
        model.network = Conditioned(model.network, name.removeprefix("network."), num_classes)
        return model
    return Conditioned(model, name, num_classes)


def conditioned_part(model: nn.Module) -> Conditioned:
    """Return the network that ``condition`` put in."""
    return next(module for module in model.modules() if isinstance(module, Conditioned))


def other_labels(labels: Tensor, num_classes: int, generator: Generator) -> Tensor:
    """Return a label for each image that is drawn evenly from all but its own, (B,) int64."""
    shift = torch.randint(1, num_classes, labels.shape, generator=generator).to(labels.device)
    return (labels + shift) % num_classes


@dataclass(frozen=True, kw_only=True)
class CNPD:
    """Train a linear layer for each class, and let the network's first answer choose among them.

    Attributes:
        initial: "identity" leaves the network as it is at first; "standardised" feeds it standardised features. "auto" is
            "standardised" where that keeps ``MIN_ACCURACY_KEPT`` of the held-out accuracy; elsewhere "identity", at
            ``IDENTITY_RATE_FACTOR`` times the rate.
        layer: name of the layer that the polarizers go before; None: as for the Neural Polarizer, the first layer with weights
            of the last block (``lustral.vision.models.wiring.late_layer``).
        trainer: a class's polarizer sees only its share of a batch, hence the rate: 0.01 for a single polarizer; falling, because
            a constant one ends wherever it happens to be.
        clean_weight: as for the Neural Polarizer, 1.
        restore_weight: likewise, 0.4.
        margin_weight: likewise, 0.4.
        target_weight: likewise, 0.4.
        radius: largest L2 norm of the perturbation at 3x32x32 pixels on the [0, 1] scale, in proportion to the root of their
            number elsewhere; 3 as there.
        step_size: of a signed step, 0.1 as there.
        steps: number of steps, 2 as there.
        least_steps: small clean sets get more epochs, until there are this many steps.
        holdout: share of the clean images kept to watch the accuracy; the last weights are returned.
    """

    version: ClassVar[int] = 2  # 2: the statistics have the trainer's precision
    needs: ClassVar[str] = "a convolution or linear layer before the head; changes the architecture"
    cost_passes: ClassVar[float] = 95

    initial: Start = "auto"
    layer: str | None = None
    trainer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=30, batch_size=128, learning_rate=0.2, schedule="cosine", warmup=0.1, weight_decay=0.0
        )
    )
    clean_weight: float = 1.0
    restore_weight: float = 0.4
    margin_weight: float = 0.4
    target_weight: float = 0.4
    radius: float = 3.0
    step_size: float = 0.1
    steps: int = 2
    least_steps: int = 300
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        weights = (self.clean_weight, self.restore_weight, self.margin_weight, self.target_weight)
        check_polarizing(self.radius, self.step_size, self.steps, *weights)

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return the model with a polarizer for each class, a ``Conditioned`` network; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            model = repair.copy()
            wiring = trace(model, next(repair.fit.batches(1)).inputs)
            name = polarizer_layer(model, wiring, self.layer)
            recipe = self.trainer
            mean, variance = feature_statistics(model, name, repair.fit, recipe.batch_size, recipe.precision)
            needed = [parameter.requires_grad for parameter in model.parameters()]
            model.requires_grad_(False)
            model = repair.follow(condition(model, name, view.clean.num_classes))
            polarizers = conditioned_part(model).polarizers

            def set_statistics(identity: bool) -> None:
                polarizers.set_statistics(mean, variance.sqrt(), identity=identity)

            trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps)
            trainer, started = begin(repair, model, self.initial, set_statistics, trainer)
            trained = repair.train(model, trainer, objective=self.objective, stage="polarizing")
            for parameter, need in zip(conditioned_part(trained).network.parameters(), needed, strict=True):
                parameter.requires_grad_(need)
        return repair.result(
            trained,
            f"The network inside is the given one; a polarizer for each class filters what enters {name}. An answer takes two "
            "passes, and the file opens with lustral alone.",
            *filter(None, (started,)),
        )

    def objective(self, model: nn.Module, batch: Batch, generator: Generator) -> Tensor:
        """Return the loss of a batch; the network stays in evaluation mode."""
        x, y = batch.inputs, batch.labels
        model.eval()
        network = conditioned_part(model)
        with network.routed(None):
            moved, said, target = self.aim(model, x, y, generator)
        with network.routed(torch.cat([said, target])):
            clean, driven = model(torch.cat([x, moved])).float().split(len(x))
        s = driven.softmax(1)
        rival = runner_up(driven.detach(), y)
        fits = self.clean_weight * F.cross_entropy(clean, y) + self.restore_weight * F.cross_entropy(driven, y)
        return fits + self.margin_weight * avoidance_loss(s, rival) + self.target_weight * avoidance_loss(s, target)

    def aim(self, model: nn.Module, x: Tensor, y: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x~, what the model says of x, target): a perturbation of each image towards a class drawn for it.

        The pass over the clean images gives what the model says and the first slope at once.
        """
        radius = self.radius * (x[0].numel() / (3 * 32 * 32)) ** 0.5
        moved, said, target = x, y, y
        for step in range(self.steps):
            moved = moved.detach().requires_grad_(True)
            logits = model(moved).float()
            if step == 0:
                said = logits.detach().argmax(1)
                target = other_labels(y, logits.shape[1], generator)
            (slope,) = torch.autograd.grad(F.cross_entropy(logits, target), moved)
            delta = project(moved.detach() - self.step_size * slope.sign() - x, "l2", radius)
            moved = (x + delta).clamp(0, 1)
        return moved.detach(), said, target
