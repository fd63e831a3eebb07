"""Channels behind batch normalisation: masking them, learning the masks, cutting them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lustral.models.wiring import Wiring
from lustral.purifiers.repair import Repair
from lustral.purifiers.selection import held_out_accuracy


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
def silence(norm: nn.Module, chosen: Tensor) -> None:
    """Set weight and bias of the chosen channels, (C,) bool, to zero, in place: they say nothing more."""
    assert isinstance(norm, _BatchNorm)
    norm.weight.masked_fill_(chosen, 0.0)
    norm.bias.masked_fill_(chosen, 0.0)


class MaskedNorms(nn.Module):
    """A frozen network with a mask in [0, 1] on the weight of every batch-normalised channel, ones at first."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        """Take the network, in evaluation mode and without gradients, and the names of its normalisations."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
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
        self.network.eval()
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


def prune_by_masks(
    repair: Repair, masks: Mapping[str, Tensor], thresholds: Sequence[float], floor: float
) -> tuple[nn.Module, float | None, int]:
    """Cut the channels whose mask is below a threshold: the largest at which the held-out accuracy stays above the floor.

    Returns:
        (the pruned model, the threshold or None where even the smallest costs too much, channels cut).
    """
    kept: tuple[nn.Module, float | None, int] = (repair.copy(), None, 0)
    for threshold in sorted(thresholds):
        model, count = repair.copy(), 0
        for name, mask in masks.items():
            chosen = mask < threshold
            silence(model.get_submodule(name), chosen)
            count += int(chosen.sum())
        if held_out_accuracy(model, repair.held_out) < floor:
            break
        kept = model, threshold, count
    repair.note(kept[0], threshold=kept[1] or 0.0, channels=kept[2])
    return kept


def cutting_note(threshold: float | None, count: int) -> str:
    """Return a sentence on what was cut."""
    if threshold is None:
        return "Even the smallest threshold cost more held-out accuracy than allowed: nothing was cut."
    return f"{count} channels were cut, with masks below {threshold:g}."
