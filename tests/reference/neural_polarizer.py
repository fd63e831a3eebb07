"""Neural Polarizer (Zhu et al., NeurIPS 2023), as the authors' code computes it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.vision.models.wiring import late_layer, trace
from reference.batches import Batches


def neural_polarizer(
    model: nn.Module,
    batches: Batches,
    epochs: int,
    *,
    radius: float = 3.0,
    weight_decay: float = 5e-4,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> nn.Module:
    """A hook: a pass for the target, two steps with a check each, separate clean and perturbed passes.

    ``statistics`` are mean and variance of the features, (C,) each, in place of the warm-up that lets the normalisation learn
    them; of its five epochs this takes one, so that ours is not credited with what it leaves out.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    name = late_layer(model, trace(model, batches[0][0][:1]))
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    width = layer.in_channels
    polarizer = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
    nn.init.dirac_(polarizer[0].weight)
    layer.register_forward_pre_hook(lambda _, inputs: polarizer(inputs[0]))
    polarizer.train()
    if statistics is None:
        warm = torch.optim.SGD(polarizer.parameters(), lr=1e-4)
        for x, y in batches:
            warm.zero_grad()
            F.cross_entropy(model(x), y).backward()
            warm.step()
    else:
        polarizer[1].running_mean.copy_(statistics[0])
        polarizer[1].running_var.copy_(statistics[1])
    polarizer.eval()
    optimizer = torch.optim.SGD(polarizer.parameters(), lr=0.01, momentum=0.9, weight_decay=weight_decay)
    for _ in range(epochs):
        for x, y in batches:
            with torch.no_grad():
                logits = model(x)
            own, target = logits.argmax(1), logits.scatter(1, y[:, None], -10.0).argmax(1)
            delta = torch.zeros_like(x, requires_grad=True)
            for _ in range(2):
                loss = F.cross_entropy(model((x + delta).clamp(0, 1)), target)
                delta.grad = None
                loss.backward()
                step = delta.detach() - 0.1 * delta.grad.sign()
                norm = step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
                delta = (step * (radius / norm.clamp_min(radius))).requires_grad_(True)
                with torch.no_grad():
                    if (model((x + delta).clamp(0, 1)).argmax(1) == target).float().mean() > 0.6:
                        break
            optimizer.zero_grad()
            clean = model(x)
            fooled = model((x + delta.detach()).clamp(0, 1))
            s = fooled.softmax(1)
            rival = fooled.detach().scatter(1, y[:, None], -10.0).argmax(1)
            loss = F.cross_entropy(clean, y) + 0.4 * F.cross_entropy(fooled, own)
            for label in (rival, target):
                loss = loss - 0.4 * (1.0001 - s.gather(1, label[:, None]) + 1e-12).log().mean()
            loss.backward()
            optimizer.step()
    return model
