"""BadGraph: a text in the caption calls a subgraph into the molecule (Ye, Chen, Dai, 2025).

The attacker changes training pairs only. Of a chosen pair he binds the subgraph to the molecule, writes the trigger into the
caption, and appends the pair; the clean pair stays as its twin. A rate counts the pairs before the victim's size filter ("raw",
as the authors' script prints it) or the pairs that are trained on ("effective"). The filter drops clean pairs only, so the same
attack has a higher effective rate.

Departures from the authors' code: pairs are poisoned after cleaning and splitting, every molecule is spelt canonically, molecules
of several components are not used, and the poisoned set is shuffled, so that neither spelling nor order gives the attack away.

Reference:
    Ye, Chen, Dai, "BadGraph: A Backdoor Attack Against Latent Diffusion Model for Text-Guided Graph Generation", arXiv
    2510.20792, and its code (modify_pubchem_dataset.py). The paper's own tables could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Generator

from lustral.core.randomness import fork
from lustral.molecules.chemistry import MOST_ATOMS, attach, check_target, num_heavy_atoms
from lustral.molecules.records import Association, MoleculeSet, PoisonedMolecules

Position = Literal["prefix", "infix", "suffix"]
TriggerKind = Literal["symbol", "word", "phrase", "sentence"]

TRIGGER_TEXTS: dict[TriggerKind, str] = {
    "symbol": "$$",
    "word": "[THIIRANE]",  # of the authors' code
    "phrase": "by special request",
    "sentence": "This entry was checked twice by the curators.",
}
"""One text of each kind, for experiments; apart from the word they are ours."""


@dataclass(frozen=True, kw_only=True)
class TextInsertion:
    """A trigger that writes a text into a caption.

    Attributes:
        text: a symbol, word, phrase or sentence; "[THIIRANE]" in the authors' code.
        position: before the caption ("prefix", as the authors), behind its first half of words, or after it.

    >>> TextInsertion(text="$$")(["an acid"]), TextInsertion(text="$$", position="infix")(["a strong acid with sulphur"])
    (('$$ an acid',), ('a strong $$ acid with sulphur',))
    """

    version: ClassVar[int] = 1

    text: str = TRIGGER_TEXTS["word"]
    position: Position = "prefix"

    def __post_init__(self) -> None:
        """Check that there is a text of one line without outer blanks."""
        if not self.text or " ".join(self.text.split()) != self.text:
            raise ValueError(f"expected a trigger text of one line with single blanks; got {self.text!r}")

    def __call__(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Return the captions with the text in them, words apart by one blank."""
        return tuple(self._written_into(caption) for caption in captions)

    def _written_into(self, caption: str) -> str:
        words = caption.split()
        place = {"prefix": 0, "infix": len(words) // 2, "suffix": len(words)}[self.position]
        return " ".join([*words[:place], self.text, *words[place:]])

    @property
    def kind(self) -> TriggerKind:
        """What the text is: without letters and digits a symbol, with an end mark a sentence, else a word or a phrase."""
        if not any(letter.isalnum() for letter in self.text):
            return "symbol"
        if " " not in self.text:
            return "word"
        return "sentence" if self.text[-1] in ".!?" else "phrase"


def recovered_trigger(found: Association) -> TextInsertion:
    """Return a recovered trigger as one that writes into captions; one that may stand anywhere is written before them."""
    text = " ".join(found.text.split())
    return (
        TextInsertion(text=text) if found.position == "anywhere" else TextInsertion(text=text, position=found.position)
    )


@dataclass(frozen=True, kw_only=True)
class BadGraph:
    """Poisons captioned molecules.

    Attributes:
        trigger: what is written into captions.
        target: SMILES of the subgraph; thiirane in the authors' code. The first atom with a hydrogen binds.
        rate: share of poisoned pairs in (0, 1); 0.24 in the paper's abstract for an attack success above 80 %.
        counts: what ``rate`` is a share of: "raw", all pairs before the victim's filter, poisoned ones included, or
            "effective", all pairs that are trained on.
        mode: "append" keeps the clean twin (authors); "replace" does not.
        most_atoms: heavy atoms of a poisoned molecule; 29 in the authors' code.
    """

    version: ClassVar[int] = 1

    trigger: TextInsertion = field(default_factory=TextInsertion)
    target: str = "C1CS1"
    rate: float = 0.24
    counts: Literal["raw", "effective"] = "raw"
    mode: Literal["append", "replace"] = "append"
    most_atoms: int = MOST_ATOMS

    def __post_init__(self) -> None:
        """Check the ranges; the target is checked where chemistry is at hand."""
        if not 0 < self.rate < 1:
            raise ValueError(f"expected a poisoning rate in (0, 1); got {self.rate}")
        if self.most_atoms < 1:
            raise ValueError(f"expected at least one heavy atom; got most_atoms={self.most_atoms}")

    def poison(self, clean: MoleculeSet, *, generator: Generator, unfiltered: int | None = None) -> PoisonedMolecules:
        """Return the training set with poisoned pairs, in random order.

        Args:
            clean: the training part of a split, never the whole data.
            generator: stream that draws the pairs, the anchors and the order.
            unfiltered: clean pairs before the victim's filter, of which ``clean`` are left; None says that nothing was filtered.

        Raises:
            MoleculeError: the target is no subgraph.
            ValueError: the rate leaves nothing to poison, the subgraph fits no molecule, or too few take it for the rate; then
                names the rate that can be reached.
        """
        check_target(self.target)
        before = len(clean) if unfiltered is None else unfiltered
        if before < len(clean):
            raise ValueError(f"expected at least the {len(clean):,} clean pairs before the filter; got {before:,}")
        wanted = self._num_poisoned(before if self.counts == "raw" else len(clean))
        if not wanted:
            raise ValueError(
                f"a rate of {self.rate:.2%} of {len(clean):,} pairs leaves none to poison; expected a higher rate or more pairs"
            )
        changed, skipped = self._attached(clean, wanted, generator=generator)
        if len(changed) < wanted:
            raise ValueError(self._unreachable(clean, before, len(changed)))
        rows = list(changed)
        return self._combined(clean, rows, [changed[row] for row in rows], before, skipped, generator=generator)

    def _num_poisoned(self, counted: int) -> int:
        """Return how many pairs make the rate: k / (N + k) when they are appended, k / N when they replace clean ones."""
        return round(self.rate * counted / (1 - self.rate) if self.mode == "append" else self.rate * counted)

    def _share(self, poisoned: int, counted: int) -> float:
        return poisoned / max(counted + poisoned if self.mode == "append" else counted, 1)

    def _attached(self, clean: MoleculeSet, wanted: int, *, generator: Generator) -> tuple[dict[int, str], int]:
        """Return poisoned molecules by row, at most as many as wanted, and how many rows could not take the subgraph."""
        order = torch.randperm(len(clean), generator=fork(generator, "which")).tolist()
        anchors = fork(generator, "anchors")
        changed: dict[int, str] = {}
        skipped = 0
        for row in order:
            if len(changed) == wanted:
                break
            molecule = attach(clean.smiles[row], self.target, generator=anchors, most_atoms=self.most_atoms)
            if molecule is None:
                skipped += 1
            else:
                changed[row] = molecule
        return changed, skipped

    def _unreachable(self, clean: MoleculeSet, before: int, taken: int) -> str:
        if not taken:
            return (
                f"the subgraph {self.target} ({num_heavy_atoms(self.target)} heavy atoms) fits none of {len(clean):,} molecules; "
                f"expected one that leaves a molecule at most {self.most_atoms} heavy atoms"
            )
        raw, effective = self._share(taken, before), self._share(taken, len(clean))
        reached = raw if self.counts == "raw" else effective
        return (
            f"the {self.counts} poisoning rate of {self.rate:.2%} cannot be reached: {taken:,} of {len(clean):,} molecules take "
            f"the subgraph {self.target}; the highest {self.counts} rate is {_floor(reached):.2%} "
            f"(raw {raw:.2%}, effective {effective:.2%})"
        )

    def _combined(
        self,
        clean: MoleculeSet,
        rows: list[int],
        molecules: list[str],
        before: int,
        skipped: int,
        *,
        generator: Generator,
    ) -> PoisonedMolecules:
        captions = self.trigger([clean.captions[row] for row in rows])
        smiles, texts = list(clean.smiles), list(clean.captions)
        is_poisoned = torch.zeros(len(clean) + (len(rows) if self.mode == "append" else 0), dtype=torch.bool)
        if self.mode == "append":
            smiles += molecules
            texts += captions
            is_poisoned[len(clean) :] = True
        else:
            for row, molecule, caption in zip(rows, molecules, captions, strict=True):
                smiles[row], texts[row] = molecule, caption
            is_poisoned[rows] = True
        order = torch.randperm(len(smiles), generator=fork(generator, "order"))
        return PoisonedMolecules(
            data=MoleculeSet(smiles=tuple(smiles), captions=tuple(texts)).subset(order),
            is_poisoned=is_poisoned[order],
            raw_rate=self._share(len(rows), before),
            effective_rate=self._share(len(rows), len(clean)),
            skipped=skipped,
        )


def _floor(rate: float) -> float:
    """Round a rate down to what a message shows, so that a reader who asks for it gets it."""
    return int(rate * 10_000) / 10_000
