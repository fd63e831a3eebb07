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


def with_gradients(weights: Mapping[str, Tensor], slopes: Mapping[str, Tensor]) -> Tensor:
    """Return a zero whose gradient in each weight is the slope given for it."""
    terms = [(weights[name] * slope.detach()).sum() for name, slope in slopes.items()]
    total = torch.stack(terms).sum()
    return total - total.detach()
