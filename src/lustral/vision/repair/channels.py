"""Channels behind batch normalisation: masking them, learning the masks, cutting them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lustral.core.history import HistoryEntry
from lustral.vision.models.wiring import Wiring
from lustral.vision.repair.run import PurifyRun
from lustral.vision.repair.selection import held_out_accuracy


def affine_norms(model: nn.Module) -> list[str]:
    """Return the names of the batch normalisations that have a weight."""
    return [name for name, m in model.named_modules() if isinstance(m, _BatchNorm) and m.weight is not None]


def require_norms(method: str, model: nn.Module) -> list[str]:
    """Return ``affine_norms``.

    Raises:
        ValueError: there is none.
    """
    names = affine_norms(model)
    if not names:
        raise ValueError(
            f"{method} prunes channels of batch normalisation, and this network has none; use another method"
        )
    return names


def require_pairs(method: str, model: nn.Module, wiring: Wiring) -> None:
    """Raise ``ValueError`` unless some convolution is followed straight by a batch normalisation."""
    if not any(isinstance(model.get_submodule(name), nn.Conv2d) for name in wiring.normed):
        raise ValueError(
            f"{method} needs convolutions that go straight into batch normalisation; this network has none: use another method"
        )


@torch.no_grad()
def silence(norm: nn.Module, chosen: Tensor, *, with_bias: bool = True) -> None:
    """Set weight and, if wanted, bias of the chosen channels, (C,) bool, to zero, in place: a constant remains, or nothing."""
    assert isinstance(norm, _BatchNorm)
    norm.weight.masked_fill_(chosen, 0.0)
    if with_bias:
        norm.bias.masked_fill_(chosen, 0.0)


class MaskedNorms(nn.Module):
    """A frozen network with a mask in [0, 1] on the weight of every batch-normalised channel, ones at first.

    In training mode its batch normalisations use the statistics of the batch, as in the published code of ANP and RNP, and leave
    the stored ones as they are. With stored ones (a trainer's batch_norm="frozen"), shifts of one layer drive the next out of its
    range, and masks fall that the task needs. Dropout is at work in training mode as it is there.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        """Take the network, without gradients and with its stored statistics kept, and the names of its normalisations."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.momentum = 0.0
        self.names = tuple(names)
        self.masks = nn.ParameterList(torch.ones_like(self._norm(name).weight) for name in names)

    def _norm(self, name: str) -> _BatchNorm:
        norm = self.network.get_submodule(name)
        assert isinstance(norm, _BatchNorm)
        return norm

    def forward(
        self, images: Tensor, weight_shifts: Sequence[Tensor] = (), bias_shifts: Sequence[Tensor] = ()
    ) -> Tensor:
        """Classify images with weights (m + d) w and biases (1 + e) b; shifts d and e, (C,) each, one per normalisation."""
        changed: dict[str, Tensor] = {}
        for index, (name, mask) in enumerate(zip(self.names, self.masks, strict=True)):
            norm = self._norm(name)
            factor = mask + weight_shifts[index] if weight_shifts else mask
            changed[f"{name}.weight"] = factor * norm.weight
            if bias_shifts:
                changed[f"{name}.bias"] = (1 + bias_shifts[index]) * norm.bias
        logits: Tensor = torch.func.functional_call(self.network, changed, (images,))
        return logits

    @torch.no_grad()
    def clip(self) -> None:
        """Bring the masks back into [0, 1], in place."""
        for mask in self.masks:
            mask.clamp_(0, 1)

    def by_name(self) -> dict[str, Tensor]:
        """Return the masks, (C,) each, by the name of their normalisation."""
        return {name: mask.detach().clamp(0, 1) for name, mask in zip(self.names, self.masks, strict=True)}


def check_cutting(step: float, highest_mask: float) -> None:
    """Raise ``ValueError`` unless the share of channels cut at a time is in (0, 1] and the highest mask in [0, 1]."""
    if not 0 < step <= 1:
        raise ValueError(f"expected a share of the channels to cut at a time, in (0, 1]; got {step}")
    if not 0 <= highest_mask <= 1:
        raise ValueError(f"expected highest_mask in [0, 1]; got {highest_mask}")


def cut_in_order(
    repair: PurifyRun, scores: Mapping[str, Tensor], *, step: float, highest: float, floor: float
) -> tuple[nn.Module, str]:
    """Cut channels, the lowest score first, until more would bring the held-out accuracy below the floor.

    As with a mask of zero, the weight of a cut channel becomes zero and its bias stays. Cutting by number is finer than by
    published thresholds, 0.05 apart: many masks lie below the first of these.

    Args:
        repair: the run.
        scores: of each channel, (C,), by the name of its normalisation.
        step: share of all channels cut at a time.
        highest: channels of a higher score stay.
        floor: least held-out accuracy.

    Returns:
        (the pruned model, a sentence on what was cut).
    """
    flat = torch.cat([score.cpu() for score in scores.values()])
    order = torch.argsort(flat, stable=True)
    most, stride, count, more = int((flat <= highest).sum()), max(1, round(step * len(flat))), 0, ""
    model = repair.copy()
    repair.history.append(HistoryEntry(count=count, unit="channels", clean_accuracy=repair.before))
    while count < most:
        tried = min(count + stride, most)
        accuracy = held_out_accuracy(cut(model, scores, order[count:tried]), repair.held_out)
        if accuracy < floor:
            model = cut(repair.copy(), scores, order[:count])
            more = f"; {tried - count} more would have cost more held-out accuracy than allowed"
            break
        count = tried
        repair.history.append(HistoryEntry(count=count, unit="channels", clean_accuracy=accuracy))
        repair.report("cutting channels", count, most)
    repair.report("cutting channels", max(most, 1), max(most, 1))
    return model, f"{count} of {len(flat)} channels were cut{more}."


def cut(model: nn.Module, scores: Mapping[str, Tensor], chosen: Tensor) -> nn.Module:
    """Set the weights of channels to zero, in place, and return the model; ``chosen`` counts through all scores, (n,) int64."""
    sizes = [len(score) for score in scores.values()]
    is_cut = torch.zeros(sum(sizes), dtype=torch.bool).index_fill(0, chosen, True)
    for (name, score), part in zip(scores.items(), torch.split(is_cut, sizes), strict=True):
        silence(model.get_submodule(name), part.to(score.device), with_bias=False)
    return model
