"""What repairs of a denoiser train on: trusted pairs as latents and conditions, by row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Generator, Tensor, nn

from lustral.core.records import Batch, OnProgress
from lustral.molecules.records import MoleculeSet
from lustral.molecules.victim import MoleculeGenerator
from lustral.molecules.victim.diffusion import add_noise
from lustral.molecules.victim.ragged import RowNumbers
from lustral.training import EpochReport, Trainer

LEAST_PAIRS = 16


@dataclass(frozen=True, kw_only=True)
class TrustedLatents:
    """Trusted pairs as the denoiser sees them.

    Attributes:
        latents: (N, L) float32, of the molecules.
        condition: (N, D) float32, of the captions.
        products: (T,) float32, the signal's share at each step.
    """

    latents: Tensor
    condition: Tensor
    products: Tensor

    @classmethod
    def of(cls, model: MoleculeGenerator, pairs: MoleculeSet) -> TrustedLatents:
        """Encode pairs with the generator's own encoders."""
        return cls(
            latents=model.encode(pairs.smiles).clone(),
            condition=model.text_vectors(pairs.captions).clone(),
            products=model.alpha_products,
        )

    def noisy(self, clean: Tensor, drawing: Generator) -> tuple[Tensor, Tensor]:
        """Return (B, L) latents under the noise of random steps, and the (B,) int64 steps."""
        steps = torch.randint(len(self.products), (len(clean),), generator=drawing).to(clean.device)
        noise = torch.randn(clean.shape, generator=drawing).to(clean.device)
        return add_noise(clean, noise, self.products[steps]), steps


def generator_under_repair(method: str, model: nn.Module, pairs: MoleculeSet) -> MoleculeGenerator:
    """Return the model as the generator that repairs know how to train.

    Raises:
        TypeError: it is another kind of model.
        ValueError: there are too few trusted pairs.
    """
    if not isinstance(model, MoleculeGenerator):
        raise TypeError(f"{method} trains the denoiser of a MoleculeGenerator; got {type(model).__name__}")
    if len(pairs) < LEAST_PAIRS:
        raise ValueError(f"{method} needs at least {LEAST_PAIRS} trusted pairs; got {len(pairs)}")
    return model


def with_denoiser(model: MoleculeGenerator, denoiser: nn.Module) -> MoleculeGenerator:
    """Return a copy of a generator with another denoiser, in evaluation mode."""
    repaired = copy.deepcopy(model)
    repaired.denoiser.load_state_dict(denoiser.state_dict())
    return repaired.eval()


def fit_denoiser(
    model: MoleculeGenerator,
    trainer: Trainer,
    rows: int,
    loss: Callable[[Any, Tensor, Generator], Tensor],
    *,
    generator: Generator,
    stage: str,
    on_epoch: Callable[[EpochReport], bool | None] | None = None,
    on_progress: OnProgress | None = None,
) -> nn.Module:
    """Train a copy of a generator's denoiser on row numbers, and return it.

    Args:
        model: the generator; it is not changed.
        trainer: how.
        rows: number of trusted pairs.
        loss: maps (denoiser, (B,) int64 rows, stream) to a scalar.
        generator: CPU stream.
        stage: name in progress reports.
        on_epoch: see ``Trainer.fit``.
        on_progress: called a few times a second.
    """

    def objective(denoiser: nn.Module, batch: Batch, drawing: Generator) -> Tensor:
        return loss(cast(Any, denoiser), batch.inputs, drawing)

    return trainer.fit(
        model.denoiser,
        RowNumbers(torch.zeros(rows, dtype=torch.int64)),
        generator=generator,
        objective=objective,
        on_epoch=on_epoch,
        on_progress=on_progress,
        stage=stage,
    )
