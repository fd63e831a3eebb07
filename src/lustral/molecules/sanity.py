"""Which stage holds an attack back: what each stage of a backdoored generator must do before the next one can.

The pairs must hold target and trigger; the text vectors must move with the trigger; the autoencoder must give the target back.
The last share is the ceiling of the attack success rate: diffusion cannot draw what decoding loses.

Reference:
    Ye, Chen, Dai, "BadGraph", arXiv 2510.20792 (stage ablation, in the abstract); the order of the checks is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from lustral.core.randomness import fork
from lustral.core.rates import Rate
from lustral.molecules.chemistry import canonical, check_target, contains_many
from lustral.molecules.records import PoisonedMolecules, TextTrigger


class LatentGenerator(Protocol):
    """A generator whose stages can be asked one by one."""

    def text_vectors(self, captions: Sequence[str]) -> Tensor:
        """Return (N, D) float32, the condition of each caption."""

    def encode(self, smiles: Sequence[str]) -> Tensor:
        """Return (N, L) float32, the latent of each molecule."""

    def decode(self, latents: Tensor) -> tuple[str, ...]:
        """Return N SMILES, "" for what is no molecule."""


@dataclass(frozen=True, kw_only=True)
class SanityLadder:
    """What the stages of a generator do with poisoned training pairs.

    Attributes:
        target_in_poisoned: poisoned training molecules with the target; must be all.
        target_in_clean: clean training molecules with the target; the base rate of the data.
        text_shift: length of the mean shift of the text vectors by the trigger, over the mean distance of two clean captions.
        shift_consistency: the same length over the mean length of the shifts: 1 if the trigger moves every caption alike.
        target_kept: poisoned training molecules that hold the target after encoding and decoding: the ceiling of the attack.
        reconstructed: clean training molecules that encoding and decoding give back exactly.
    """

    target_in_poisoned: Rate
    target_in_clean: Rate
    text_shift: float
    shift_consistency: float
    target_kept: Rate
    reconstructed: Rate

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        rates = ("target_in_poisoned", "target_in_clean", "target_kept", "reconstructed")
        shifts = {name: getattr(self, name) for name in ("text_shift", "shift_consistency")}
        return {name: getattr(self, name).to_dict() for name in rates} | {
            name: None if math.isnan(value) else value for name, value in shifts.items()
        }


def sanity_ladder(
    model: LatentGenerator,
    pairs: PoisonedMolecules,
    trigger: TextTrigger,
    target: str,
    *,
    generator: Generator,
    most: int = 500,
) -> SanityLadder:
    """Ask the stages of a generator one by one.

    Args:
        model: the generator that was trained on the pairs.
        pairs: its training set.
        trigger: the planted one.
        target: SMILES of the subgraph.
        generator: stream that draws the pairs that are encoded.
        most: poisoned and clean pairs that are encoded, of each kind.

    Raises:
        MoleculeError: the target is no subgraph.
        ValueError: there are no clean or no poisoned pairs, or ``most`` is below 2.
    """
    written = check_target(target)
    bad, good = (pairs.data.subset(mask) for mask in (pairs.is_poisoned, ~pairs.is_poisoned))
    if not len(bad) or not len(good) or most < 2:
        raise ValueError(
            f"expected poisoned and clean pairs, and at least 2 to encode; got {len(bad)}, {len(good)} and {most}"
        )
    some_bad = bad.subset(torch.randperm(len(bad), generator=fork(generator, "poisoned"))[:most])
    some_good = good.subset(torch.randperm(len(good), generator=fork(generator, "clean"))[:most])
    shift, consistency = text_shift(model, some_good.captions, trigger)
    back = [canonical(smiles) for smiles in model.decode(model.encode(some_good.smiles))]
    exact = sum(one == canonical(other) for one, other in zip(back, some_good.smiles, strict=True))
    return SanityLadder(
        target_in_poisoned=_share(contains_many(bad.smiles, written)),
        target_in_clean=_share(contains_many(good.smiles, written)),
        text_shift=shift,
        shift_consistency=consistency,
        target_kept=_share(contains_many(model.decode(model.encode(some_bad.smiles)), written)),
        reconstructed=Rate(exact, len(some_good)),
    )


def text_shift(model: LatentGenerator, captions: Sequence[str], trigger: TextTrigger) -> tuple[float, float]:
    """Return how far and how consistently a trigger moves the text vectors of captions; see ``SanityLadder``.

    Returns:
        (length of the mean shift over the mean distance of neighbouring captions, the same over the mean length of the shifts);
        NaN where the divisor is 0.
    """
    clean = model.text_vectors(captions).double()
    shifts = model.text_vectors(trigger(captions)).double() - clean
    length = float(shifts.mean(0).norm())
    return _ratio(length, (clean - clean.roll(1, 0)).norm(dim=1)), _ratio(length, shifts.norm(dim=1))


def _ratio(length: float, lengths: Tensor) -> float:
    mean = float(lengths.mean()) if len(lengths) else 0.0
    return length / mean if mean else math.nan


def _share(hits: Tensor) -> Rate:
    return Rate(int(hits.sum()), len(hits))
