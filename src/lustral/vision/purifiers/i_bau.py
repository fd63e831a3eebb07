"""I-BAU: unlearn the worst universal perturbation, and account for how it would answer (Zeng, Chen, Park, Mao, Jin, Jia,
"Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022, arXiv 2110.03735).

    theta* = argmin_theta max_{||d|| <= C}  (1/n) sum_i CE(f_theta(x_i + d), y_i)

The perturbation d depends on theta. With the inner update Phi(d, theta) = d - a grad_d L_in(d, theta), the gradient of the
outer loss through d comes from the fixed point

    v <- (dPhi/dd)^T v + dL_out/dd,   K times from v = 0;   g = dL_out/dtheta + (dPhi/dtheta)^T v.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.records import Batch, OnProgress
from lustral.training import Trainer, autocast, frozen
from lustral.vision.images import check_holdout
from lustral.vision.models.frozen_norms import norms_as_products
from lustral.vision.records import DefenderView, ImageSet, Purified
from lustral.vision.repair.perturbation import lengths, project
from lustral.vision.repair.rates import RateChoice
from lustral.vision.repair.run import PurifyRun, check_relative_rate, rate_cap_note
from lustral.vision.repair.shifted_weights import trainable, with_gradients

CONVERGED = 1e-10  # change of v below which the fixed point is reached


def inner_loss(logits: Tensor, labels: Tensor, delta: Tensor, penalty: float) -> Tensor:
    """Return L_in = -CE(f(x + d), y) + penalty ||d||^2: what the perturbation minimises."""
    return penalty * delta.square().sum() - F.cross_entropy(logits, labels)


def hypergradient(
    inner: Tensor, outer: Tensor, delta: Tensor, weights: dict[str, Tensor], *, step_size: float, iterations: int
) -> dict[str, Tensor]:
    """Return g, the gradient of the outer loss in the weights, the answer of the perturbation included.

    Args:
        inner: L_in(d, theta), a scalar.
        outer: L_out(d, theta), a scalar.
        delta: d, a leaf that takes a gradient.
        weights: theta by name.
        step_size: a.
        iterations: K; 0 leaves the answer of the perturbation out.
    """
    names = list(weights)
    found = torch.autograd.grad(outer, [delta, *weights.values()], allow_unused=True)
    outer_delta = torch.zeros_like(delta) if found[0] is None else found[0]
    slopes = {name: slope for name, slope in zip(names, found[1:], strict=True) if slope is not None}
    if iterations < 1 or not bool(outer_delta.any()):
        return slopes
    (inner_delta,) = torch.autograd.grad(inner, delta, create_graph=True)
    v = outer_delta  # the first iteration, from v = 0
    for _ in range(iterations - 1):
        (curved,) = torch.autograd.grad(inner_delta, delta, grad_outputs=v, retain_graph=True)
        following = v - step_size * curved + outer_delta
        change = (following - v).norm()
        v = following
        if float(change) < CONVERGED:
            break
    mixed = torch.autograd.grad(inner_delta, list(weights.values()), grad_outputs=v, allow_unused=True)
    for name, slope in zip(names, mixed, strict=True):
        if slope is not None:
            slopes[name] = slopes.get(name, torch.zeros_like(slope)) - step_size * slope
    return slopes


@dataclass(frozen=True, kw_only=True)
class IBAU:
    """Unlearn a universal perturbation by its implicit hypergradient.

    Attributes:
        rounds: of a new perturbation and a pass of unlearning; 5 in the authors' code.
        trainer: outer optimiser; its epochs are ``rounds``. Adam at 1e-3 with batches of 100 in the authors' code, AMSGrad at
            1e-4 and 256 in BackdoorBench; 3e-4 erased two victims as 1e-3 did and cost less accuracy. Batch-norm statistics
            are frozen in all. Second derivatives of convolutions are slower in channels-last memory; in bfloat16 they are as
            good and half as dear.
        iterations: K; 5 in the authors' code.
        inner_step_size: a; 0.1 there.
        delta_learning_rate: of gradient descent on d; 10 there.
        penalty: of ||d||^2; 0.001 there.
        projection: C, largest L2 norm of d at 32x32 pixels, in proportion to the root of their number elsewhere; 10 in the
            authors' notebooks. None leaves d to the penalty alone, as their scripts do.
        perturbed_share: of a batch that gets d in the outer loss, at least one image; 0.01 in the authors' code.
        rate: "given": the trainer's; "found": the largest near it that a short range test on the held-out images bears
            (``lustral.vision.repair.rates``), for networks unlike the one that it was chosen on.
        relative_rate: caps the learning rate by the network (``Trainer.with_rate_cap``); None: none. 0.7 is
            what BackdoorBench's 1e-4 is on its PreAct-ResNet18 with fresh weights. The 3e-4, chosen on one a quarter as wide,
            took the wide one to chance within a round.
        least_steps: small clean sets get more rounds, until there are this many outer steps.
        holdout: share of the clean images kept to watch the accuracy; the last weights are returned.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "second derivatives"
    cost_passes: ClassVar[float] = 14

    rounds: int = 5
    trainer: Trainer = field(
        default_factory=lambda: Trainer(
            batch_size=100,
            optimizer="adam",
            learning_rate=3e-4,
            schedule="constant",
            weight_decay=0.0,
            channels_last=False,
            batch_norm="frozen",
        )
    )
    iterations: int = 5
    inner_step_size: float = 0.1
    delta_learning_rate: float = 10.0
    penalty: float = 0.001
    projection: float | None = 10.0
    perturbed_share: float = 0.01
    rate: RateChoice = "given"
    relative_rate: float | None = 0.7
    least_steps: int = 100
    holdout: float = 0.2

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_holdout(self.holdout)
        if self.rounds < 1 or self.iterations < 0 or self.inner_step_size <= 0 or self.delta_learning_rate <= 0:
            raise ValueError(
                "expected rounds >= 1, iterations >= 0 and positive step sizes; got "
                f"{self.rounds}, {self.iterations}, {self.inner_step_size} and {self.delta_learning_rate}"
            )
        if not 0 < self.perturbed_share <= 1 or self.penalty < 0:
            raise ValueError(
                f"expected a perturbed share in (0, 1] and a penalty >= 0; got {self.perturbed_share} and {self.penalty}"
            )
        if self.projection is not None and self.projection <= 0:
            raise ValueError(f"expected a projection > 0, or None for none; got {self.projection}")
        check_relative_rate(self.relative_rate)

    def published(self) -> IBAU:
        """Return BackdoorBench's settings: five rounds of AMSGrad at 1e-4 in float32, the perturbation left to its penalty."""
        trainer = replace(self.trainer, batch_size=256, optimizer="amsgrad", learning_rate=1e-4, precision="float32")
        return replace(
            self, rounds=5, trainer=trainer, projection=None, rate="given", relative_rate=None, least_steps=0
        )

    def purify(self, view: DefenderView, *, generator: Generator, on_progress: OnProgress | None = None) -> Purified:
        """Return a model on which the worst universal perturbation does less; see ``Purifier``."""
        with PurifyRun(view=view, holdout=self.holdout, generator=generator, on_progress=on_progress) as repair:
            trainer = self.recipe(len(repair.fit)).with_rate_cap(view.model, self.relative_rate)
            capped, tried = rate_cap_note(self.trainer, trainer), trainer
            trainer, notes = repair.with_rate(self.rate, trainer, lambda: _Unlearning(self, repair.fit, tried))
            objective = _Unlearning(self, repair.fit, trainer)
            model = repair.train(view.model, trainer, objective=objective, stage="unlearning")
        return repair.result(model, *(notes or capped))

    def recipe(self, num_images: int) -> Trainer:
        """Return the outer trainer for a set, its rounds as epochs."""
        return replace(self.trainer, epochs=self.rounds).fitted_to_size(num_images, self.least_steps)

    def universal(self, model: nn.Module, data: ImageSet, batch_size: int) -> Tensor:
        """Return d, (1, C, H, W): gradient descent from zero, in one pass over the set, away from what the model says."""
        delta = torch.zeros(1, *data.image_shape, device=data.device)
        with frozen(model), torch.enable_grad():
            for x, *_ in data.batches(batch_size):
                delta.requires_grad_(True)
                with autocast(x.device, self.trainer.precision):
                    with torch.no_grad():
                        own = model(x).argmax(1)
                    loss = inner_loss(model(x + delta).float(), own, delta, self.penalty)
                (slope,) = torch.autograd.grad(loss, delta)
                delta = delta.detach() - self.delta_learning_rate * slope
        if self.projection is not None:
            radius = self.projection * (delta.numel() / (3 * 32 * 32)) ** 0.5
            delta = project(delta, "l2", radius)
        assert lengths(delta, "l2").isfinite().all()
        return delta.detach()


class _Unlearning:
    """The outer objective; finds a new perturbation at the start of each round."""

    def __init__(self, settings: IBAU, data: ImageSet, trainer: Trainer) -> None:
        self.settings, self.data, self.batch_size = settings, data, trainer.batch_size
        self.steps_per_round = max(len(data) // trainer.batch_size, 1)
        self.inner = next(data.batches(trainer.batch_size))  # the same images always, as in the authors' code
        self.done = 0
        self.delta = torch.zeros(())

    def __call__(self, model: nn.Module, batch: Batch, stream: Generator) -> Tensor:
        x, y = batch.inputs, batch.labels
        settings = self.settings
        model.eval()
        if self.done % self.steps_per_round == 0:
            self.delta = settings.universal(model, self.data, self.batch_size)
        self.done += 1
        delta = self.delta.clone().requires_grad_(True)
        count = max(1, round(settings.perturbed_share * len(x)))
        chosen = torch.zeros(len(x), device=x.device)
        chosen[torch.randperm(len(x), generator=stream)[:count].to(x.device)] = 1
        with norms_as_products(model):
            outer = F.cross_entropy(model(x + chosen[:, None, None, None] * delta).float(), y)
            inner = inner_loss(model(self.inner.inputs + delta).float(), self.inner.labels, delta, settings.penalty)
        weights = trainable(model)
        slopes = hypergradient(
            inner, outer, delta, weights, step_size=settings.inner_step_size, iterations=settings.iterations
        )
        return outer.detach() + with_gradients(weights, slopes)
