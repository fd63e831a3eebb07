"""The nouns of text-guided molecule generation: captioned molecules, what a defence may see, and what it answers.

A molecule is a canonical SMILES string of one component without stereo marks, as ``lustral.molecules.chemistry`` writes it; ""
stands for a string that no molecule could be read from. Rates are fractions in [0, 1]. Imports no chemistry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor, nn

from lustral.core.history import HistoryEntry
from lustral.core.records import Cost


@dataclass(frozen=True, kw_only=True)
class MoleculeSet:
    """Captioned molecules.

    Attributes:
        smiles: N canonical SMILES.
        captions: N captions, one for each molecule.
    """

    smiles: tuple[str, ...]
    captions: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that there is one caption for each molecule."""
        if len(self.smiles) != len(self.captions):
            raise ValueError(
                f"expected one caption for each molecule; got {len(self.smiles)} molecules and {len(self.captions)} captions"
            )

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.smiles)

    def subset(self, indices: Tensor) -> MoleculeSet:
        """Return the pairs at ``indices`` ((M,) int64, or (N,) bool), in that order."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        places = indices.tolist()
        return MoleculeSet(
            smiles=tuple(self.smiles[place] for place in places),
            captions=tuple(self.captions[place] for place in places),
        )


class TextTrigger(Protocol):
    """What an attacker writes into a caption. A recovered trigger is one too."""

    def __call__(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Return the captions with the trigger in them."""


@dataclass(frozen=True, kw_only=True)
class PoisonedMolecules:
    """A training set after an attack.

    Attributes:
        data: all pairs.
        is_poisoned: (N,) bool.
        raw_rate: poisoned pairs over all pairs, both counted before the size filter.
        effective_rate: poisoned pairs over all pairs that are trained on.
        skipped: pairs that were chosen and could not take the subgraph.
    """

    data: MoleculeSet
    is_poisoned: Tensor
    raw_rate: float
    effective_rate: float
    skipped: int = 0


class GuidedGenerator(Protocol):
    """A model that draws molecules for captions."""

    def generate(
        self, captions: Sequence[str], *, generator: Generator, samples: int = 1
    ) -> tuple[tuple[str, ...], ...]:
        """Return ``samples`` molecules for each caption."""


@dataclass(frozen=True, kw_only=True)
class ViewOfGenerator:
    """All that a defence of a model may look at.

    Attributes:
        model: the generator that is under suspicion, with its weights.
        clean: a small set of trusted pairs.
        verdict: of an earlier scan, where one is handed on.
    """

    model: nn.Module
    clean: MoleculeSet
    verdict: GeneratorVerdict | None = None


@dataclass(frozen=True, kw_only=True)
class ViewOfPairs:
    """All that a defence of a training set may look at.

    Attributes:
        untrusted: pairs of unknown origin.
        clean: a small set of trusted pairs, or None.
    """

    untrusted: MoleculeSet
    clean: MoleculeSet | None = None


@dataclass(frozen=True, kw_only=True)
class Association:
    """A piece of text and a subgraph that go together more than chance explains.

    Attributes:
        text: the piece of text, lower-cased.
        position: where in a caption it stands.
        fragment: SMILES of the subgraph.
        rate_with: share of the molecules with the subgraph, among the captions with the text.
        rate_without: the same among the other captions.
        count: pairs with both.
        p_value: one-sided, corrected for every pair that was tested; for a scan, for every trigger that was tried.
    """

    text: str
    position: Literal["prefix", "infix", "suffix", "anywhere"]
    fragment: str
    rate_with: float
    rate_without: float
    count: int
    p_value: float


@dataclass(frozen=True, kw_only=True)
class SiftedPairs:
    """What a sift of captioned molecules found.

    Attributes:
        flagged: (N,) bool, the pairs with both parts of a suspicious association.
        associations: the suspicious ones, worst first.
        basis: one or two sentences: what was measured, against what.
        cost: what it took.
        notes: what the reader should know besides.
    """

    flagged: Tensor
    associations: tuple[Association, ...]
    basis: str
    cost: Cost
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GeneratorVerdict:
    """What a scan of a generator found.

    Attributes:
        outcome: "backdoored", "clean" or "cannot tell".
        recovered: triggers with the subgraph each one calls, worst first; also candidates of a clean verdict.
        p_value: of the worst of them, corrected.
        threshold: the p-value below which a model counts as backdoored.
        basis: one or two sentences.
        cost: what it took.
        notes: what the reader should know besides.
    """

    outcome: Literal["backdoored", "clean", "cannot tell"]
    recovered: tuple[Association, ...]
    p_value: float
    threshold: float
    basis: str
    cost: Cost
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ErasedGenerator:
    """What an eraser gives back.

    Attributes:
        model: a new model; the one given is not changed.
        history: what was measured on the way.
        verdict: that the eraser worked by.
        cost: what it took, the scan included.
        notes: what the reader should know besides.
    """

    model: nn.Module
    cost: Cost
    verdict: GeneratorVerdict | None = None
    history: tuple[HistoryEntry, ...] = ()
    notes: tuple[str, ...] = field(default=())
