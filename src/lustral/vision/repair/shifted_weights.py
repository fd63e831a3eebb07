"""Losses at weights shifted a little from where they are: what sharpness-aware training is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TINY = 1e-12

Shift = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""(weights by name, their gradients by name) -> shifts by name."""


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Let batch normalisation in training mode use batch statistics without updating its running ones."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that take a gradient, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient of a loss in each weight that it depends on."""
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    return {name: slope for name, slope in zip(weights, found, strict=True) if slope is not None}


def adaptive_shift(weights: Mapping[str, Tensor], slopes: Mapping[str, Tensor], *, rho: float) -> dict[str, Tensor]:
    """Return e = rho w^2 g / || |w| g ||, the norm taken over all weights together: large weights are shifted more (FT-SAM)."""
    scaled = {name: weights[name].detach().abs() * slope for name, slope in slopes.items()}
    norm = torch.stack([part.square().sum() for part in scaled.values()]).sum().sqrt().clamp_min(TINY)
    return {name: rho * weights[name].detach().abs() * part / norm for name, part in scaled.items()}


def interpolated_loss(
    model: nn.Module, loss_of: Callable[[Callable[[Tensor], Tensor]], Tensor], *, shift: Shift, share: float
) -> Tensor:
    """Return a scalar whose gradient is (1 - share) g(theta) + share g(theta + shift(theta, g)).

    The running statistics of batch normalisation are updated once, by the pass at theta. The value is the loss at theta.

    Args:
        model: classifier in training mode.
        loss_of: maps a callable that classifies images to the loss of this batch.
        shift: where to look.
        share: 0 is plain training, 1 is sharpness-aware minimisation.
    """
    weights = trainable(model)
    here = loss_of(model)
    slopes = gradients(here, weights)
    shifts = shift(weights, slopes)

    def shifted(images: Tensor) -> Tensor:
        moved = {name: weights[name] + step for name, step in shifts.items()}
        logits: Tensor = torch.func.functional_call(model, moved, (images,))
        return logits

    with running_statistics_kept(model):
        there = loss_of(shifted)
    total = share * (there - there.detach())
    if share < 1:
        total = total + (1 - share) * with_gradients(weights, slopes)
    return total + here.detach()


def loss_part_of_the_way(
    model: nn.Module,
    loss_of: Callable[[Callable[[Tensor], Tensor]], Tensor],
    origin: Mapping[str, Tensor],
    share: float,
) -> Tensor:
    """Return the loss at theta + share (origin - theta), whose gradient there is the gradient given for theta.

    Batch normalisation in training mode uses batch statistics, and its running ones stay.

    Args:
        model: classifier, in any mode.
        loss_of: maps a callable that classifies images to the loss of this batch.
        origin: weights by name, one for each that takes a gradient.
        share: of the way, in [0, 1].
    """
    moved = {name: w + share * (origin[name] - w).detach() for name, w in trainable(model).items()}

    def there(images: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, moved, (images,))
        return logits

    with running_statistics_kept(model):
        return loss_of(there)


def with_gradients(weights: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> Tensor:
    """Return a zero whose gradient in each weight is the slope given for it."""
    terms = [(weights[name] * slope.detach()).sum() for name, slope in slopes.items()]
    total = torch.stack(terms).sum()
    return total - total.detach()
