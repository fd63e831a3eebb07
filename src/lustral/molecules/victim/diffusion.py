"""Latent diffusion: an MLP that predicts the clean latent, and its sampler.

Reference:
    Ho et al., "Denoising Diffusion Probabilistic Models", NeurIPS 2020; Song et al., "Denoising Diffusion Implicit Models", ICLR
    2021, eq. 12 and 16; Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022; Zhu et al., "3M-Diffusion", COLM 2024: 100
    steps, linear noise from 0.001 to 0.2, prediction of x0, 50 sampling steps with eta 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F


def alpha_products(steps: int) -> Tensor:
    """Return (steps,) float32: the share of the clean latent's variance that is left after 1, 2, ... steps of noise.

    >>> products = alpha_products(100)
    >>> round(products[0].item(), 4), products[-1].item() < 1e-4
    (0.999, True)
    """
    betas = torch.linspace(0.1 / steps, min(20 / steps, 0.999), steps, dtype=torch.float64)
    return (1 - betas).cumprod(0).float()


class Denoiser(nn.Module):
    """Predicts the clean latent from a noisy one, the step and the caption's vector.

    The published MLP is 8 plain layers; these have skip connections, which train in fewer steps.
    """

    def __init__(self, *, latent: int, condition: int, width: int, layers: int) -> None:
        """Build it.

        Args:
            latent: numbers of a latent.
            condition: size of a caption's vector.
            width: of the layers.
            layers: of them.
        """
        super().__init__()
        self.null = nn.Parameter(torch.zeros(condition))
        self.entry = nn.Linear(latent + condition, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, noisy: Tensor, steps: Tensor, condition: Tensor | None) -> Tensor:
        """Return (N, L), the clean latents, for (N, L) noisy ones.

        Args:
            noisy: (N, L).
            steps: (N,) int64 from 0 to T - 1.
            condition: (N, D), or None for the prediction without a caption.
        """
        if condition is None:
            condition = self.null.expand(len(noisy), -1)
        states = self.entry(torch.cat([noisy, condition], dim=1))
        states = states + self.time(waves(steps, states.shape[1]).to(states.dtype))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            states = states + F.relu(layer(norm(states)))
        result: Tensor = self.out(self.norm(states))
        return result

    def with_nulls(self, condition: Tensor, nulls: Tensor) -> Tensor:
        """Return a copy of the condition (N, D) with the null vector where ``nulls`` ((N,) bool)."""
        return torch.where(nulls[:, None], self.null, condition)


def waves(steps: Tensor, width: int) -> Tensor:
    """Return (N, width): sines and cosines of the step, wavelengths from 2 pi to 10,000 times that."""
    half = width // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=steps.device) / max(half - 1, 1))
    angles = steps[:, None] * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width - 2 * half))


def add_noise(clean: Tensor, noise: Tensor, products: Tensor) -> Tensor:
    """Return sqrt(a) clean + sqrt(1 - a) noise for the (N,) ``products`` a."""
    return products[:, None].sqrt() * clean + (1 - products[:, None]).sqrt() * noise


def sample_latents(
    predict: Callable[[Tensor, Tensor], Tensor],
    shape: tuple[int, int],
    *,
    products: Tensor,
    ddim_steps: int,
    eta: float,
    generator: Generator,
) -> Tensor:
    """Return latents drawn by DDIM.

    Args:
        predict: from (N, L) noisy latents and (N,) steps to clean ones.
        shape: (N, L).
        products: (T,) of ``alpha_products``, on the device to work on.
        ddim_steps: of the T steps, how many are taken, evenly spaced.
        eta: 0 is deterministic, 1 is the noise of DDPM.
        generator: CPU stream.
    """
    device = products.device
    state = torch.randn(shape, generator=generator).to(device)
    places = sorted({round(place) for place in torch.linspace(0, len(products) - 1, ddim_steps).tolist()}, reverse=True)
    for place, following in zip(places, [*places[1:], -1], strict=True):
        clean = predict(state, torch.full((shape[0],), place, device=device))
        now = products[place]
        later = products[following] if following >= 0 else torch.ones((), device=device)
        noise = (state - now.sqrt() * clean) / (1 - now).sqrt()
        sigma = eta * ((1 - later) / (1 - now) * (1 - now / later)).clamp_min(0).sqrt()
        state = later.sqrt() * clean + (1 - later - sigma**2).clamp_min(0).sqrt() * noise
        if following >= 0:
            state = state + sigma * torch.randn(shape, generator=generator).to(device)
    return state
