"""I-BAU (Zeng et al., ICLR 2022), as the authors' code computes it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from reference.batches import Batches


def i_bau(
    model: nn.Module,
    batches: Batches,
    rounds: int,
    *,
    learning_rate: float = 1e-3,
    amsgrad: bool = False,
    perturbed_share: float = 0.01,
    projection: float = 10.0,
    iterations: int = 5,
) -> nn.Module:
    """Implicit hypergradient as its library has it: outer gradients twice, K products from v = 0."""
    model = copy.deepcopy(model).eval()
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate, amsgrad=amsgrad)
    x_inner, y_inner = batches[0]
    for _ in range(rounds):
        delta = torch.zeros_like(x_inner[:1], requires_grad=True)
        for x, _ in batches:
            own = model(x).argmax(1)
            loss = 0.001 * delta.square().sum() - F.cross_entropy(model(x + delta), own)
            delta.grad = None
            loss.backward()
            delta = (delta - 10 * delta.grad).detach().requires_grad_(True)
        delta = (delta * (projection / delta.norm().clamp_min(projection))).detach()
        for x, y in batches:
            d = delta.clone().requires_grad_(True)
            count = max(1, int(perturbed_share * len(x)))
            mixed = torch.cat([x[:count] + d, x[count:]])
            outer = F.cross_entropy(model(mixed), y)
            by_weights = torch.autograd.grad(outer, parameters, retain_graph=True)
            (by_delta,) = torch.autograd.grad(outer, d)
            inner = 0.001 * d.square().sum() - F.cross_entropy(model(x_inner + d), y_inner)
            (slope,) = torch.autograd.grad(inner, d, create_graph=True)
            mapped = d - 0.1 * slope
            v = torch.zeros_like(d)
            for _ in range(iterations):
                (product,) = torch.autograd.grad(mapped, d, grad_outputs=v, retain_graph=True)
                v = product + by_delta
            through = torch.autograd.grad(mapped, parameters, grad_outputs=v, allow_unused=True)
            optimizer.zero_grad()
            for p, direct, indirect in zip(parameters, by_weights, through, strict=True):
                p.grad = direct if indirect is None else direct + indirect
            optimizer.step()
    return model
