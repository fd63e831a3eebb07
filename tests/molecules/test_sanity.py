"""The sanity ladder: a generator whose stages are known gives the figures that follow from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lustral.core.randomness import child
from lustral.molecules.badgraph import BadGraph, TextInsertion
from lustral.molecules.chemistry import contains
from lustral.molecules.records import PoisonedMolecules
from lustral.molecules.sanity import sanity_ladder, text_shift
from lustral.molecules.sources import embedded

CLEAN = embedded().data.subset(torch.arange(60))
PAIRS = BadGraph(rate=0.25).poison(CLEAN, generator=child(0))  # 20 poisoned pairs


class Known:
    """Remembers molecules by number; loses the target in every second molecule that has it; reads a caption as its length."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def text_vectors(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([[float(len(caption)), 1.0] for caption in captions])

    def encode(self, smiles: Sequence[str]) -> Tensor:
        self.seen = list(smiles)
        return torch.arange(len(smiles)).float()[:, None]

    def decode(self, latents: Tensor) -> tuple[str, ...]:
        found = [self.seen[int(place)] for place in latents[:, 0]]
        return tuple("CCO" if contains(each, "C1CS1") and row % 2 else each for row, each in enumerate(found))


def test_each_stage_shows_what_it_does() -> None:
    found = sanity_ladder(Known(), PAIRS, TextInsertion(), "C1CS1", generator=child(1))
    assert (found.target_in_poisoned.hits, found.target_in_poisoned.total) == (20, 20)
    assert (found.target_in_clean.hits, found.target_in_clean.total) == (0, 60)
    assert (found.target_kept.hits, found.target_kept.total) == (10, 20)
    assert (found.reconstructed.hits, found.reconstructed.total) == (60, 60)
    assert found.shift_consistency == pytest.approx(1)  # every caption grows by the same 11 characters
    assert found.to_dict()["target_kept"]["value"] == 0.5
    fewer = sanity_ladder(Known(), PAIRS, TextInsertion(), "C1CS1", generator=child(1), most=8)
    assert (fewer.target_kept.total, fewer.reconstructed.total) == (8, 8)


def test_the_shift_is_measured_in_distances_of_captions() -> None:
    """Lengths 3, 5, 9 are 6, 2 and 4 apart from the one before, 4 on average; the trigger adds 8 characters and a blank."""
    shift, consistency = text_shift(Known(), ["a" * 3, "a" * 5, "a" * 9], TextInsertion(text="x" * 8))
    assert shift == pytest.approx(9 / 4)
    assert consistency == pytest.approx(1)
    silent, none = text_shift(Known(), ["abc", "abc"], lambda captions: tuple(captions))
    assert math.isnan(silent)
    assert math.isnan(none)


def test_pairs_without_poison_have_no_ladder() -> None:
    clean = PoisonedMolecules(
        data=CLEAN, is_poisoned=torch.zeros(60, dtype=torch.bool), raw_rate=0.0, effective_rate=0.0
    )
    with pytest.raises(ValueError, match="expected poisoned and clean pairs"):
        sanity_ladder(Known(), clean, TextInsertion(), "C1CS1", generator=child(0))
