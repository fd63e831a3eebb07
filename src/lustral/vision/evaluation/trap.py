"""How full the trap of Trap-and-Replace is: what its old head does, and how well its decoder draws clean and triggered images.

An old head with a low attack success rate means that the attack failed, not that the defence works.

Reference:
    Wang et al., Trap and Replace, NeurIPS 2022: the mean squared error stands beside ASR and ACC in table 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn

from lustral.vision.evaluation.metrics import json_number
from lustral.vision.evaluation.protocol import Evaluation, evaluate
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet, Victim

Reconstruct = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) float32 in [0, 1] -> what a decoder draws of them, same shape."""


@dataclass(frozen=True, kw_only=True)
class TrapEvaluation:
    """What the old head and the decoder do on a test set.

    Attributes:
        old_head: the network before its head was replaced.
        clean_error: mean squared error of the reconstruction of clean images, per element on the [0, 1] scale; None without
            a decoder.
        triggered_error: the same of triggered images whose label the attacker changes, against the triggered images; NaN of none.
    """

    version: ClassVar[int] = 1

    old_head: Evaluation
    clean_error: float | None
    triggered_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything for JSON; what is no number is None."""
        errors = {"clean_error": self.clean_error, "triggered_error": self.triggered_error}
        numbers = {name: None if value is None else json_number(value) for name, value in errors.items()}
        return {"old_head": self.old_head.to_dict(), **numbers}


def reconstruction_error(
    reconstruct: Reconstruct,
    data: ImageSet,
    *,
    transform: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | None = None,
    batch_size: int = 512,
) -> float:
    """Return the mean squared error of reconstructions over a set, per element; NaN of an empty set.

    Args:
        reconstruct: draws batches.
        data: the images.
        transform: applied to each float batch before; its results are what shall be drawn.
        device: where batches go; None: where the set is.
        batch_size: images per pass.
    """
    device = device or data.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        for images, *_ in data.batches(batch_size):
            images = images.to(device)
            if transform is not None:
                images = transform(images)
            total += (reconstruct(images).float() - images).square().sum(dtype=torch.float64)
    count = data.images.numel()
    return float(total) / count if count else float("nan")


def evaluate_trap(
    victim: Victim, trap_model: nn.Module, reconstruct: Reconstruct | None, test: ImageSet, *, generator: Generator
) -> TrapEvaluation:
    """Measure the old head with the true trigger, and the decoder on clean and triggered images.

    Args:
        victim: supplies trigger and label rule.
        trap_model: the network with its old head.
        reconstruct: draws batches; None for a training without a decoder.
        test: clean test set that no defence has seen.
        generator: stream for triggers that draw.
    """
    old_head = evaluate(victim, trap_model, test, generator=generator)
    if reconstruct is None:
        return TrapEvaluation(old_head=old_head, clean_error=None, triggered_error=None)
    device = next((parameter.device for parameter in trap_model.parameters()), test.device)
    is_attackable = victim.relabel(test.labels.cpu(), test.num_classes) != test.labels.cpu()

    def stamp(images: Tensor) -> Tensor:
        return as_float(as_uint8(victim.trigger(images, generator=generator)))

    return TrapEvaluation(
        old_head=old_head,
        clean_error=reconstruction_error(reconstruct, test, device=device),
        triggered_error=reconstruction_error(reconstruct, test.subset(is_attackable), transform=stamp, device=device),
    )
