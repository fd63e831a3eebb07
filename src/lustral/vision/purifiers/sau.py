"""SAU: unlearn the adversarial examples that the model shares with the backdoored one (Wei, Zhang, Zha, Wu, "Shared Adversarial
Unlearning: Backdoor Mitigation by Unlearning Shared Adversarial Examples", NeurIPS 2023, arXiv 2307.10562).

A triggered image is an adversarial example of the backdoored model g, and of the repaired model f as long as f has the
backdoor: both call it the same wrong class. With p, q the softmax of f and g, in turn for each batch

    delta = argmin  w_adv L_adv + w_js L_js                          (a perturbation that both models share)
        L_adv = -1/2B [ sum over f not yet flipped CE(f(x + d), y) + sum over g not yet flipped CE(g(x + d), y) ]
        L_js  =  1/B  sum over not yet shared JS(p(x + d) || q(x + d))
    theta = argmin  w_cl CE(f(x), y) + w_sh L_sh
        L_sh  =  1/B  sum over images that d flips in g  -log(1 - p_{argmax g(x + d)}(x + d))

Where the authors' code and the paper's abstract leave a choice, this follows the code: the batch divides L_sh, not the number
of flipped images; perturbed pixels are not clipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, frozen
from lustral.vision.images import check_holdout
from lustral.vision.records import DefenderView, Purified
from lustral.vision.repair.perturbation import Norm, project, steepest
from lustral.vision.repair.rates import RateChoice
from lustral.vision.repair.run import PurifyRun, check_relative_rate, rate_cap_note

Start = Literal["max", "min", "zero", "random"]


def shared_loss(
    f: Tensor, g: Tensor, labels: Tensor, f_clean: Tensor, g_clean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return L_adv, L_js and which images are shared already.

    Args:
        f, g: (B, K) float32 logits of both models on perturbed images.
        labels: (B,) true labels.
        f_clean, g_clean: (B,) labels that the models predict without perturbation.

    Returns:
        (scalar, scalar, (B,) bool).
    """
    f_flipped, g_flipped = f.argmax(1) != f_clean, g.argmax(1) != g_clean
    shared = f_flipped & g_flipped & (f.argmax(1) == g.argmax(1))
    f_errors, g_errors = (F.cross_entropy(logits, labels, reduction="none") for logits in (f, g))
    batch = len(labels)
    adversarial = -(f_errors * ~f_flipped + g_errors * ~g_flipped).sum() / (2 * batch)
    apart = (jensen_shannon(f, g) * ~shared).sum() / batch
    return adversarial, apart, shared


def jensen_shannon(f: Tensor, g: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of two sets of logits, (B, K) each, in nats: (B,)."""
    p, q = f.softmax(1).clamp_min(1e-8), g.softmax(1).clamp_min(1e-8)
    middle = ((p + q) / 2).log()
    return ((p * (p.log() - middle)).sum(1) + (q * (q.log() - middle)).sum(1)) / 2


def shared_risk(logits: Tensor, fooled: Tensor, counted: Tensor) -> Tensor:
    """Return L_sh: the mean over the batch of -log(1 - p of the class that fooled the reference), over images counted.

    The authors' code averages two clamped forms of the logarithm, which bounds the gradient; so does this.

    Args:
        logits: (B, K) float32 of the repaired model on perturbed images.
        fooled: (B,) class that the reference predicts on them.
        counted: (B,) bool.
    """
    p = logits.softmax(1)
    wrong = p.gather(1, fooled[:, None])[:, 0]
    rest = p.sum(1) - wrong
    risk = -((1e-6 + rest.clamp_max(0.999)).log() + (1 + 1e-6 - wrong.clamp_min(0.001)).log()) / 2
    return (risk * counted).sum() / len(logits)


@dataclass(frozen=True, kw_only=True)
class SAU:
    """Unlearn adversarial examples shared with the backdoored model.

    Attributes:
        norm: of the perturbation; "linf" in the paper. "none" is bounded by the number of steps alone.
        radius: largest norm, pixels on the [0, 1] scale; 0.2 in the paper.
        step_size: of a perturbation step; 0.2 in the paper, so that two steps cross the ball.
        steps: perturbation steps per batch; 5 in the paper. Fewer where every image of a batch is shared already.
        initial: perturbation to start from; "max" in the authors' code: +radius everywhere; "min", "zero", "random".
        clip: keep perturbed images in [0, 1]; not in the authors' code.
        clean_weight: 1 in the paper.
        shared_weight: 1 in the paper.
        adversarial_weight: 0.01 in the paper.
        agreement_weight: of the Jensen-Shannon divergence; 1 in the paper.
        trainer: AMSGrad at 1e-4 for 100 rounds with batches of 256 and frozen batch-norm statistics in the authors' code;
            here 12 epochs of Adam at 3e-4, falling. Its ``batch_norm`` "train" is the authors' switch ``train_mode``.
        rate: "given": the trainer's; "found": the largest near it that a short range test on the held-out images bears
            (``lustral.vision.repair.rates``), for networks unlike the one that it was chosen on.
        relative_rate: caps the learning rate by the network (``Trainer.with_rate_cap``); None: none. 0.7 is
            what the published 1e-4 is on the published network with fresh weights; on one a quarter as wide 3e-4 is below it.
        least_steps: small clean sets get more epochs, until there are this many steps.
        holdout: share of the clean images kept to watch the accuracy; the last weights are returned.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"
    cost_passes: ClassVar[float] = 102

    norm: Norm = "linf"
    radius: float = 0.2
    step_size: float = 0.2
    steps: int = 5
    initial: Start = "max"
    clip: bool = False
    clean_weight: float = 1.0
    shared_weight: float = 1.0
    adversarial_weight: float = 0.01
    agreement_weight: float = 1.0
    trainer: Trainer = field(
        default_factory=lambda: Trainer(
            epochs=12,
            batch_size=128,
            optimizer="adam",
            learning_rate=3e-4,
            schedule="cosine",
            warmup=0.1,
            weight_decay=0.0,
            batch_norm="frozen",
        )
    )
    rate: RateChoice = "given"
    relative_rate: float | None = 0.7
    least_steps: int = 150
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if self.radius <= 0 or self.step_size <= 0 or self.steps < 1:
            raise ValueError(
                f"expected radius > 0, step_size > 0 and steps >= 1; got {self.radius}, {self.step_size} and {self.steps}"
            )
        if min(self.clean_weight, self.shared_weight, self.adversarial_weight, self.agreement_weight) < 0:
            raise ValueError("expected weights of at least 0")
        check_relative_rate(self.relative_rate)

    def published(self) -> SAU:
        """Return the published budget: 100 rounds of AMSGrad at 1e-4, constant."""
        trainer = Trainer(
            epochs=100,
            batch_size=256,
            optimizer="amsgrad",
            learning_rate=1e-4,
            schedule="constant",
            weight_decay=0.0,
            precision="float32",
            batch_norm="frozen",
        )
        return SAU(trainer=trainer, relative_rate=None, least_steps=0)

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a model that no longer shares adversarial examples with the given one; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            reference = repair.copy().requires_grad_(False)

            def objective(model: nn.Module, batch: Batch, stream: Generator) -> Tensor:
                x, y = batch.inputs, batch.labels
                with torch.no_grad():
                    g_clean = reference(x).argmax(1)
                perturbed = x + self.perturb(model, reference, x, y, g_clean, stream)
                if self.clip:
                    perturbed = perturbed.clamp(0, 1)
                with torch.no_grad():
                    fooled = reference(perturbed).argmax(1)
                clean, moved = model(torch.cat([x, perturbed])).float().split(len(x))
                counted = (fooled != y) & (fooled != g_clean)
                risk = shared_risk(moved, fooled, counted)
                return self.clean_weight * F.cross_entropy(clean, y) + self.shared_weight * risk

            trainer = self.trainer.fitted_to_size(len(repair.fit), self.least_steps).with_rate_cap(
                view.model, self.relative_rate
            )
            capped = rate_cap_note(self.trainer, trainer)
            trainer, notes = repair.with_rate(self.rate, trainer, lambda: objective)
            model = repair.train(view.model, trainer, objective=objective, stage="unlearning")
        return repair.result(model, *(notes or capped))

    def perturb(
        self, model: nn.Module, reference: nn.Module, x: Tensor, y: Tensor, g_clean: Tensor, stream: Generator
    ) -> Tensor:
        """Return perturbations (B, C, H, W) that both models share as far as the steps lead.

        What does not change with the perturbation, the predictions on clean images, is computed once. An image that is shared
        contributes nothing to the loss, so it stays where it is: further steps take only the others.
        """
        delta = self._starting(x, stream)
        with frozen(model), torch.enable_grad():
            with torch.no_grad():
                f_clean = model(x).argmax(1)
            apart = torch.arange(len(x), device=x.device)
            for _ in range(self.steps):
                change = delta[apart].requires_grad_(True)
                moved = x[apart] + change
                if self.clip:
                    moved = moved.clamp(0, 1)
                adversarial, disagreement, shared = shared_loss(
                    model(moved).float(), reference(moved).float(), y[apart], f_clean[apart], g_clean[apart]
                )
                if bool(shared.all()):
                    break
                loss = self.adversarial_weight * adversarial + self.agreement_weight * disagreement
                (slope,) = torch.autograd.grad(loss, change)
                delta[apart] = project(
                    change.detach() - self.step_size * steepest(slope, self.norm), self.norm, self.radius
                )
                apart = apart[~shared]
        return delta

    def _starting(self, x: Tensor, stream: Generator) -> Tensor:
        if self.initial == "zero":
            return torch.zeros_like(x)
        if self.initial == "random":
            draw = torch.rand(x.shape, generator=stream).to(x)
            return project(draw, self.norm, self.radius)
        return project(
            torch.full_like(x, self.radius if self.initial == "max" else -self.radius), self.norm, self.radius
        )
