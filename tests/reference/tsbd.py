"""Two-stage backdoor defence (Lin et al., NeurIPS 2024), as the authors' code computes it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from reference.batches import Batches


def tsbd(model: nn.Module, batches: Batches, epochs: int) -> nn.Module:
    """Ascent, reset of the most moved weights, fine-tuning: as many epochs of each."""
    forgetful = unlearned(model, batches, epochs, learning_rate=1e-3)
    return fine_tuned(reset_most_moved(model, forgetful, neurons=0.3, weights=0.7), batches, epochs)


def unlearned(model: nn.Module, batches: Batches, epochs: int, *, learning_rate: float) -> nn.Module:
    """Gradient ascent on clean images, with the accuracy measured after each epoch; gradients are clipped, as in ours."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            (-F.cross_entropy(model(x), y)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()
        accuracy(model, batches)
    return model


def reset_most_moved(model: nn.Module, forgetful: nn.Module, *, neurons: float, weights: float) -> nn.Module:
    """Changes of all weights in one Python list; the most moved share of those of the most moved neurons becomes zero."""
    moved = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "shortcut" not in name:
            change = (forgetful.get_submodule(name).weight - module.weight).detach().abs().flatten(1)
            moved += [(float(row.sum()), name, k) for k, row in enumerate(change)]
    moved.sort(reverse=True)
    chosen = moved[: int(neurons * len(moved))]
    pool = []
    for _, name, k in chosen:
        pool += (forgetful.get_submodule(name).weight[k] - model.get_submodule(name).weight[k]).abs().flatten().tolist()
    pool.sort(reverse=True)
    bound = pool[int(weights * len(pool)) - 1]
    model_after = copy.deepcopy(model)
    with torch.no_grad():
        for _, name, k in chosen:
            weight = model_after.get_submodule(name).weight
            change = (forgetful.get_submodule(name).weight[k] - model.get_submodule(name).weight[k]).abs()
            weight[k][change >= bound] = 0
    return model_after


def fine_tuned(model: nn.Module, batches: Batches, epochs: int, *, share: float = 0.7) -> nn.Module:
    """A deep copy for every step, both gradients on it, and a pass at the end for the running statistics."""
    tuned = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.01, momentum=0.9)
    for _ in range(epochs):
        for x, y in batches:
            trial = copy.deepcopy(tuned)
            trial.zero_grad()
            F.cross_entropy(trial(x), y).backward()
            first = [p.grad.clone() for p in trial.parameters()]
            with torch.no_grad():
                for p, slope in zip(trial.parameters(), first, strict=True):
                    p += 0.05 * slope / slope.norm().clamp_min(1e-12)
            trial.zero_grad()
            F.cross_entropy(trial(x), y).backward()
            optimizer.zero_grad()
            for p, q, slope in zip(tuned.parameters(), trial.parameters(), first, strict=True):
                p.grad = (1 - share) * slope + share * q.grad
            optimizer.step()
            with torch.no_grad():
                tuned(x)  # for the log, and for the running statistics
    return tuned.eval()


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> float:
    """Return the accuracy on all batches; the model is in training mode afterwards."""
    model.eval()
    hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    model.train()
    return hits / sum(len(y) for _, y in batches)
