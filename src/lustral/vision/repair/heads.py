"""The linear head of a classifier: found, drawn anew, and held at its size (what FST does to it)."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from lustral.vision.models.wiring import trace


@torch.no_grad()
def fresh_head(head: nn.Linear, generator: Generator) -> None:
    """Draw a linear layer's weight and bias anew, uniform within 1 / sqrt(inputs), in place."""
    bound = 1 / math.sqrt(head.in_features)
    for parameter in head.parameters():
        draw = torch.rand(parameter.shape, generator=generator) * 2 - 1
        parameter.copy_(bound * draw)


@torch.no_grad()
def rescale(weight: Tensor, size: Tensor) -> None:
    """Set the norm of a weight, in place."""
    weight.mul_(size / weight.norm().clamp_min(1e-12))


def linear_head(model: nn.Module, images: Tensor) -> str:
    """Return the name of a classifier's head.

    Raises:
        ValueError: the head is no linear layer.
    """
    head = trace(model, images).head
    if not isinstance(model.get_submodule(head), nn.Linear):
        raise ValueError(f"expected a network that ends in a linear layer; {head} is {model.get_submodule(head)}")
    return head


def head_of(model: nn.Module, images: Tensor) -> str | None:
    """Return the name of the linear head, or None where there is none."""
    try:
        return linear_head(model, images)
    except ValueError:
        return None
