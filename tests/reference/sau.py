"""Shared adversarial unlearning (Wei et al., NeurIPS 2023), as the authors' code computes it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from reference.batches import Batches


def sau(
    model: nn.Module, batches: Batches, epochs: int, *, learning_rate: float = 1e-4, start: float = 0.2
) -> nn.Module:
    """Five steps for every batch, clean predictions anew in each, gradients to every weight."""
    model, reference = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, amsgrad=True)
    for _ in range(epochs):
        for x, y in batches:
            delta = torch.full_like(x, start, requires_grad=True)
            for _ in range(5):
                f, g = model(x + delta), reference(x + delta)
                f_clean, g_clean = model(x).argmax(1), reference(x).argmax(1)
                f_flipped, g_flipped = f.argmax(1) != f_clean, g.argmax(1) != g_clean
                shared = f_flipped & g_flipped & (f.argmax(1) == g.argmax(1))
                f_loss = (F.cross_entropy(f, y, reduction="none") * ~f_flipped).sum()
                g_loss = (F.cross_entropy(g, y, reduction="none") * ~g_flipped).sum()
                p, q = f.softmax(1).clamp_min(1e-8), g.softmax(1).clamp_min(1e-8)
                middle = ((p + q) / 2).log()
                apart = ((p * (p.log() - middle)).sum(1) + (q * (q.log() - middle)).sum(1)) / 2
                loss = -0.01 * (f_loss + g_loss) / (2 * len(x)) + (apart * ~shared).sum() / len(x)
                if bool(shared.all()):
                    break
                delta.grad = None
                loss.backward()
                delta = (delta - 0.2 * delta.grad.sign()).clamp(-0.2, 0.2).detach().requires_grad_(True)
            delta = delta.detach()
            optimizer.zero_grad()
            clean, moved = model(torch.cat([x, x + delta])).split(len(x))
            fooled, own = reference(x + delta).argmax(1), reference(x).argmax(1)
            counted = (fooled != y) & (fooled != own)
            p = moved.softmax(1)
            wrong = p.gather(1, fooled[:, None])[:, 0]
            rest = p.sum(1) - wrong
            risk = -((1e-6 + rest.clamp_max(0.999)).log() + (1 + 1e-6 - wrong.clamp_min(0.001)).log()) / 2
            (F.cross_entropy(clean, y) + (risk * counted).sum() / len(x)).backward()
            optimizer.step()
    return model
