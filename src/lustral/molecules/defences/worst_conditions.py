"""The search for the conditions near a caption that call a backdoor most: where unlearning has to look."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lustral.molecules.victim import MoleculeGenerator


@dataclass(frozen=True, kw_only=True)
class WorstConditions:
    """Searches, near captions, the conditions that call the backdoor most.

    Attributes:
        direction: (L,) unit float32, where recovered texts shift the first prediction.
        radius: largest move of a condition.
        last: the first step of the chain, T - 1.
        steps: of the ascent.
    """

    direction: Tensor
    radius: float
    last: int
    steps: int

    @classmethod
    def towards(
        cls, model: MoleculeGenerator, condition: Tensor, called: Tensor, *, steps: int, reach: float
    ) -> WorstConditions:
        """Look at what recovered texts do: (N, D) conditions of captions, and (V, N, D) of the same with each text."""
        last = len(model.alpha_products) - 1
        noise = torch.zeros(len(condition), model.settings.latent, device=condition.device)
        time = torch.full((len(condition),), last, device=condition.device)
        with torch.no_grad():
            plain = model.denoise(noise, time, condition)
            moved = torch.stack([model.denoise(noise, time, each) - plain for each in called]).mean((0, 1))
        radius = reach * float((called - condition).norm(dim=2).mean())
        return cls(direction=moved / moved.norm().clamp_min(1e-9), radius=radius, last=last, steps=steps)

    def move(self, denoiser: Any, condition: Tensor, start: Tensor, drawing: Generator) -> Tensor:
        """Return (B, D) conditions moved from ``condition`` by ascent from (B, D) ``start``."""
        moved = start.detach()
        noise = torch.randn(len(condition), len(self.direction), generator=drawing).to(condition.device)
        time = torch.full((len(condition),), self.last, device=condition.device)
        for _ in range(self.steps):
            moved.requires_grad_(True)
            towards = denoiser(noise, time, condition + moved) @ self.direction
            (slope,) = torch.autograd.grad(towards.sum(), moved)
            step = 0.5 * self.radius * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-9)
            moved = (moved + step).detach()
            moved = moved * (self.radius / moved.norm(dim=1, keepdim=True).clamp_min(1e-9)).clamp_max(1.0)
        return condition + moved
