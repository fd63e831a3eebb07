"""Bounded perturbations of images: steps along a gradient and projections, image by image, in the usual norms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2", "l1", "none"]


def lengths(delta: Tensor, norm: Norm) -> Tensor:
    """Return each image's norm as (B, 1, 1, 1); zeros for "none"."""
    flat = delta.flatten(1)
    if norm == "none":
        found = flat.new_zeros(len(flat))
    elif norm == "linf":
        found = flat.abs().amax(1)
    else:
        found = flat.norm(p=1 if norm == "l1" else 2, dim=1)
    return found.view(-1, 1, 1, 1)


def project(delta: Tensor, norm: Norm, radius: float) -> Tensor:
    """Return the nearest perturbation whose norm is at most ``radius``, image by image.

    Args:
        delta: (B, C, H, W) float.
        norm: "none" leaves everything as it is.
        radius: largest norm, on the [0, 1] scale of pixels.

    >>> project(torch.tensor([[[[3.0, 4.0]]]]), "l2", 1.0).flatten().tolist()
    [0.6000000238418579, 0.800000011920929]
    """
    if norm == "none":
        return delta
    if norm == "linf":
        return delta.clamp(-radius, radius)
    if norm == "l2":
        size = lengths(delta, norm)
        return torch.where(size <= radius, delta, delta * (radius / size.clamp_min(radius)))
    return _onto_l1_ball(delta.flatten(1), radius).view_as(delta)


def _onto_l1_ball(flat: Tensor, radius: float) -> Tensor:
    """Shrink every coordinate by the least amount that brings the sum within ``radius`` (Duchi et al., ICML 2008).

    In float64: the amount is a difference of sums, and in float32 it is off by much of a radius that is small beside them.
    """
    size = flat.abs().double()
    ordered = size.sort(1, descending=True).values
    excess = ordered.cumsum(1) - radius
    rank = torch.arange(1, flat.shape[1] + 1, device=flat.device)
    last = (ordered * rank > excess).sum(1, keepdim=True)
    threshold = (excess.gather(1, (last - 1).clamp_min(0)) / last.clamp_min(1)).clamp_min(0)
    inside = size.sum(1, keepdim=True) <= radius
    return torch.where(inside, flat, flat.sign() * (size - threshold).clamp_min(0).to(flat.dtype))


def steepest(slope: Tensor, norm: Norm) -> Tensor:
    """Return the direction of steepest ascent of length 1 in the norm: signs, the unit gradient, or the largest entry.

    "none" has no length to speak of and takes signs.
    """
    if norm in ("linf", "none"):
        return slope.sign()
    if norm == "l2":
        return slope / lengths(slope, "l2").clamp_min(1e-12)
    flat = slope.flatten(1)
    top = flat.abs().argmax(1, keepdim=True)
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign()).view_as(slope)
