"""The loss on the straight line from the given to the erased weights (Goodfellow, Vinyals, Saxe, ICLR 2015).

    theta(s) = (1 - s) theta_given + s theta_erased,    s in [0, 1]

Buffers, as the statistics of batch normalisation, are mixed likewise, so that both ends are the two models themselves.

Reference:
    Goodfellow, Vinyals, Saxe: Qualitatively Characterizing Neural Network Optimization Problems, ICLR 2015, section 2.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.training.modes import frozen
from lustral.vision.records import ImageSet

POINTS = 9
BATCH = 128


@dataclass(frozen=True, kw_only=True)
class WeightLine:
    """Losses on the way from the given to the new weights.

    Attributes:
        shares: of the way, rising from 0, the given model, to 1, the new one.
        clean: mean cross-entropy of clean images, one for each share; may be infinite or NaN.
        triggered: likewise of triggered images, by their true classes; empty where no trigger is known.
    """

    shares: tuple[float, ...]
    clean: tuple[float, ...]
    triggered: tuple[float, ...] = ()


def weight_line(
    given: nn.Module, new: nn.Module, clean: ImageSet, triggered: ImageSet | None, points: int = POINTS
) -> WeightLine:
    """Measure the losses at evenly spaced points of the line.

    Args:
        given: classifier.
        new: classifier with the same tensors, see ``has_line``.
        clean: images without trigger.
        triggered: images with it, by their true classes; None where no trigger is known.
        points: how many, both ends included.

    Raises:
        ValueError: fewer than two points, or networks that have no line between them.
    """
    if points < 2:
        raise ValueError(f"expected at least 2 points, which are the two models; got {points}")
    if not has_line(given, new):
        raise ValueError("expected two networks with the same tensors; these have none in common or others")
    shares = tuple(i / (points - 1) for i in range(points))
    model = copy.deepcopy(given)
    losses = []
    for share in shares:
        set_share(model, given, new, share)
        losses.append([mean_loss(model, images) for images in (clean, triggered) if images is not None])
    columns = [tuple(column) for column in zip(*losses, strict=True)]
    return WeightLine(shares=shares, clean=columns[0], triggered=columns[1] if triggered is not None else ())


def has_line(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two networks have the same tensors but for their values."""
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (one, other)]
    return shapes[0] == shapes[1] and bool(shapes[0])


def differ(one: nn.Module, other: nn.Module) -> bool:
    """Say whether any tensor of two networks differs."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() != theirs.keys() or any(not torch.equal(mine[name], theirs[name]) for name in mine)


@torch.no_grad()
def set_share(model: nn.Module, given: nn.Module, new: nn.Module, share: float) -> None:
    """Give a network of the same tensors the weights at a share of the way, in place; integers are those of the nearer end."""
    start, end = given.state_dict(), new.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and 0 < share < 1:
            tensor.copy_(torch.lerp(start[name].float(), end[name].float(), share))
        else:
            tensor.copy_(start[name] if share < 0.5 else end[name])


def mean_loss(model: nn.Module, data: ImageSet) -> float:
    """Return the mean cross-entropy of a set, in evaluation mode and full precision."""
    device = next((parameter.device for parameter in model.parameters()), data.device)
    losses: list[Tensor] = []
    with frozen(model), torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for batch in data.batches(BATCH):
            logits = model(batch.inputs.to(device)).float()
            losses.append(F.cross_entropy(logits, batch.labels.to(device), reduction="sum").cpu())
    return float(torch.stack(losses).sum()) / len(data) if losses else float("nan")
