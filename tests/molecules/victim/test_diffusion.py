"""Noise, the sampler, and the losses of the stages."""

from __future__ import annotations

import math

import pytest
import torch

from lustral.core.randomness import child
from lustral.molecules.victim.alignment import contrastive_loss, top1
from lustral.molecules.victim.autoencoder import kl_divergence
from lustral.molecules.victim.diffusion import Denoiser, add_noise, alpha_products, sample_latents


def test_the_noise_of_the_paper() -> None:
    products = alpha_products(100)
    assert products[0].item() == pytest.approx(0.999)
    assert (products[-1] / products[-2]).item() == pytest.approx(0.8)
    assert products[1].item() == pytest.approx(0.999 * (1 - 0.001 - 0.199 / 99))


def test_noise_keeps_the_variance_of_latents_of_variance_one() -> None:
    clean, noise = (torch.randn(4000, 2, generator=child(0, name)) for name in ("clean", "noise"))
    noisy = add_noise(clean, noise, torch.full((4000,), 0.3))
    assert noisy.std().item() == pytest.approx(1, abs=0.05)
    assert (noisy * clean).mean().item() == pytest.approx(math.sqrt(0.3), abs=0.05)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("ddim_steps", [10, 100])
def test_the_sampler_draws_the_law_that_the_denoiser_knows(eta: float, ddim_steps: int) -> None:
    products = alpha_products(100)
    centre, spread = 3.0, 0.5

    def ideal(noisy: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        kept = products[steps][:, None]  # mean of N(3, 0.25), seen through noise
        gain = kept.sqrt() * spread**2 / (kept * spread**2 + 1 - kept)
        return centre + gain * (noisy - kept.sqrt() * centre)

    drawn = sample_latents(
        ideal, (4000, 1), products=products, ddim_steps=ddim_steps, eta=eta, generator=child(0, "draw")
    )
    assert drawn.mean().item() == pytest.approx(centre, abs=0.05)
    assert drawn.std().item() == pytest.approx(spread, abs=0.2 if ddim_steps == 10 else 0.05)


def test_the_condition_is_not_changed_where_the_null_vector_is_put_in() -> None:
    denoiser = Denoiser(latent=4, condition=3, width=8, layers=1)
    torch.nn.init.ones_(denoiser.null)
    condition = torch.zeros(2, 3)
    mixed = denoiser.with_nulls(condition, torch.tensor([True, False]))
    assert mixed.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert not condition.any()
    torch.nn.init.normal_(denoiser.out.weight)
    noisy, steps = torch.randn(1, 4), torch.tensor([5])
    torch.testing.assert_close(denoiser(noisy, steps, None), denoiser(noisy, steps, denoiser.null[None]))
    assert denoiser(noisy[:1], steps[:1], condition[:1]).shape == (1, 4)  # a batch of one keeps its dimension


def test_alignment_and_kl_by_hand() -> None:
    text = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    graph = torch.tensor([[0.1, 0.0], [3.0, 0.0]])
    expected = (-math.log(0.5) + -math.log(0.5) + -math.log(math.e / (1 + math.e)) - math.log(1 / (1 + math.e))) / 4
    assert contrastive_loss(text, graph, temperature=1.0).item() == pytest.approx(expected)
    assert top1(text, text) == 1
    assert top1(text, text.flip(0)) == 0
    mean, log_variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, -2.0]])
    second = 0.5 * (math.exp(-2) - 1 + 2)
    assert kl_divergence(mean, log_variance, free=0.0).item() == pytest.approx(0.5 + second)
    assert kl_divergence(mean, log_variance, free=0.6).item() == pytest.approx(1.2)
