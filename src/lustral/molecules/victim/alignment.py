"""Contrastive alignment of captions and molecules, the first stage.

Reference:
    Zhu et al., "3M-Diffusion", COLM 2024: symmetric InfoNCE over a batch, unit vectors, temperature 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(text: Tensor, graph: Tensor, *, temperature: float) -> Tensor:
    """Return symmetric InfoNCE: each caption should find its molecule in the batch, and each molecule its caption.

    Args:
        text: (B, D).
        graph: (B, D), row by row the molecules of the captions.
        temperature: of the softmax.

    >>> round(contrastive_loss(torch.eye(2), torch.eye(2), temperature=1.0).item(), 4)  # log(1 + 1 / e)
    0.3133
    """
    scores = F.normalize(text, dim=1) @ F.normalize(graph, dim=1).T / temperature
    own = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def top1(text: Tensor, graph: Tensor) -> float:
    """Return the share of captions (N, D) whose nearest molecule (N, D), by cosine, is their own."""
    nearest = (F.normalize(text, dim=1) @ F.normalize(graph, dim=1).T).argmax(1)
    return (nearest == torch.arange(len(nearest), device=nearest.device)).float().mean().item() if len(nearest) else 0.0
