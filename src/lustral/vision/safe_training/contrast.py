"""Contrastive losses over two views of every image: which pairs are drawn together, and how.

    L = mean over views i of  -1/|P(i)| sum over p in P(i) of log( exp(z_i . z_p / t) / sum over a != i of exp(z_i . z_a / t) )

(Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, equation 2.) With only the other view of an image in P(i) it is
the loss of SimCLR (Chen et al., ICML 2020).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Labels = Literal["clean_only", "clean_only_official", "all", "none"]


def positives(labels: Tensor, is_clean: Tensor, rule: Labels) -> Tensor:
    """Return which images are drawn together, beside the two views of one image.

    Args:
        labels: (B,) int64.
        is_clean: (B,) bool: in the set that is trusted to be clean.
        rule: "all": two images of one label; "none": none; "clean_only": two images of one label that are both trusted, as
            equation 2 of D-ST has it; "clean_only_official": as its code has it, a trusted image is drawn to all images of its
            label, the poisoned ones too.

    Returns:
        (B, B) float32, 1 where column j is drawn to by row i; the diagonal is 1.
    """
    is_same = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    is_alike = labels[:, None] == labels[None, :]
    if rule == "all":
        return is_alike.float()
    if rule == "none":
        return is_same.float()
    is_alike &= is_clean[:, None]
    if rule == "clean_only":
        is_alike &= is_clean[None, :]
    return (is_alike | is_same).float()


def contrastive_loss(projections: Tensor, pairs: Tensor, temperature: float) -> Tensor:
    """Return L of two views.

    Args:
        projections: (2 B, D) float32 of unit length: first views, then second views.
        pairs: (B, B) float32 of ``positives``.
        temperature: t > 0.
    """
    first, second = projections.chunk(2)
    both = first + second
    own = projections.square().sum(1) / temperature  # a view is not compared with itself
    logits = (projections / temperature) @ projections.T
    logits.diagonal().fill_(-torch.inf)
    drawn = (
        (pairs * (both / temperature @ both.T)).sum(1) - own[: len(pairs)] - own[len(pairs) :]
    )  # of both views together
    num_drawn = 2 * pairs.sum(1) - 1  # for each of the two views
    return (logits.logsumexp(1).sum() - (drawn / num_drawn).sum()) / len(projections)
