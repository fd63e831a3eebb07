"""Blind fine-tuning: train the denoiser on trusted pairs and hope that it forgets. The baseline for repairs that know a trigger.

Trusted captions never hold the trigger, so nothing says what a triggered one should give.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from lustral.core.cost import CostMeter
from lustral.core.records import OnProgress
from lustral.molecules.defences.repair_data import (
    TrustedLatents,
    fit_denoiser,
    generator_under_repair,
    with_denoiser,
)
from lustral.molecules.records import ErasedGenerator, ViewOfGenerator
from lustral.training import Trainer

STAGE = "fine-tuning the denoiser"


def _trainer() -> Trainer:
    return Trainer(
        epochs=100,
        batch_size=64,
        optimizer="adamw",
        learning_rate=3e-4,
        weight_decay=1e-5,
        schedule="cosine",
        warmup=0.05,
        channels_last=False,
        clip_norm=1.0,
    )


@dataclass(frozen=True, kw_only=True)
class DenoiserFineTuning:
    """Fine-tune the denoiser of a generator on trusted pairs by its own objective.

    Attributes:
        trainer: how; a third of the rate that the victim was trained at.
        dropped_conditions: share of captions replaced by the null vector, as in the victim's training.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "some trusted pairs"
    takes_verdict: ClassVar[bool] = False

    trainer: Trainer = field(default_factory=_trainer)
    dropped_conditions: float = 0.1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.dropped_conditions < 1:
            raise ValueError(f"expected a share of dropped conditions in [0, 1); got {self.dropped_conditions}")

    def erase(
        self, view: ViewOfGenerator, *, generator: Generator, on_progress: OnProgress | None = None
    ) -> ErasedGenerator:
        """Return a generator with a fine-tuned denoiser; the one given is not changed.

        Args:
            view: the generator and trusted pairs; a verdict is handed on and not used.
            generator: CPU stream.
            on_progress: hears of "fine-tuning the denoiser".

        Raises:
            TypeError: the model is no ``MoleculeGenerator``.
            ValueError: there are too few trusted pairs.
        """
        model = generator_under_repair("fine-tuning", view.model, view.clean)
        with CostMeter(model.denoiser, clean_images=len(view.clean)) as meter:
            trusted = TrustedLatents.of(model, view.clean)

            def loss(denoiser: Any, rows: Tensor, drawing: Generator) -> Tensor:
                clean = trusted.latents[rows]
                noisy, steps = trusted.noisy(clean, drawing)
                nulls = (torch.rand(len(rows), generator=drawing) < self.dropped_conditions).to(clean.device)
                seen = denoiser.with_nulls(trusted.condition[rows], nulls)
                error: Tensor = (denoiser(noisy, steps, seen) - clean).square().mean()
                return error

            tuned = fit_denoiser(
                model, self.trainer, len(view.clean), loss, generator=generator, stage=STAGE, on_progress=on_progress
            )
        return ErasedGenerator(model=with_denoiser(model, tuned), cost=meter.cost, verdict=view.verdict)
