"""The authors' own defence: find prefixes that call a fragment, then keep the generator from writing it.

Step 1 reads the training pairs. For every prefix p of 1 to 3 words and every fragment f,

    d = P(f | p) - P(f | not p);       (p, f) is flagged if P(f | p) >= 0.9 and d >= 0.5

Step 2 changes no weight. Of every flagged fragment it bars the words of the decoder that contain it; the authors set the bias
of the motifs to -1e9.

What differs: pairs are counted once, by one sparse product; the authors' loop is quadratic. Fragments are those of
``chemistry.fragments`` and not of the victim's decoder. The decoder's words are compared as molecules, where the authors look
for one text inside another. A decoder may still build the fragment from smaller words, so molecules that hold it are drawn
again.

Reference:
    Ye, Chen, Dai, "BadGraph", arXiv 2510.20792, and the authors' code (detect_backdoor_fragment.py,
    denoising_diffusion_noise.py).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Generator, nn

from lustral.core.cost import CostMeter
from lustral.core.randomness import fork
from lustral.core.records import OnProgress
from lustral.molecules.chemistry import contains
from lustral.molecules.defences.cooccurrence import (
    Cooccurrence,
    Incidence,
    TextPattern,
    corrected_tail,
    count_together,
    incidence,
    prefixes,
)
from lustral.molecules.defences.pair_counting import fragments_of
from lustral.molecules.records import Association, GuidedGenerator, SiftedPairs, ViewOfPairs

SAME_ROWS = 0.95  # share of the rows of a longer prefix that a shorter one has, for the longer one to be left out


@dataclass(frozen=True, kw_only=True)
class FragmentCheck:
    """Flag prefixes that nearly always come with a fragment.

    Attributes:
        longest: words of the longest prefix; 3 in the authors' code.
        min_prefix: pairs with a prefix for it to be counted; 100 there.
        min_pairs: pairs with both; 10 there.
        flag_rate: least P(f | p); 0.9 there.
        flag_difference: least P(f | p) - P(f | not p); 0.5 there.
        most: flagged pairs that are kept; 20 there.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing"

    longest: int = 3
    min_prefix: int = 100
    min_pairs: int = 10
    flag_rate: float = 0.9
    flag_difference: float = 0.5
    most: int = 20

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.longest, self.min_prefix, self.min_pairs, self.most) < 1:
            raise ValueError(
                "expected longest, min_prefix, min_pairs and most >= 1; got "
                f"{self.longest}, {self.min_prefix}, {self.min_pairs} and {self.most}"
            )
        if not 0 < self.flag_rate <= 1 or not 0 <= self.flag_difference <= 1:
            raise ValueError(
                f"expected a rate in (0, 1] and a difference in [0, 1]; got {self.flag_rate} and {self.flag_difference}"
            )

    def sift(self, view: ViewOfPairs, *, generator: Generator, on_progress: OnProgress | None = None) -> SiftedPairs:
        """Return the flagged associations and the pairs with both parts of one. Trusted pairs are of no use here.

        Args:
            view: the untrusted pairs.
            generator: not used; nothing here is random.
            on_progress: hears of "cutting molecules into fragments".

        Raises:
            ValueError: the set is empty.
        """
        data = view.untrusted
        if not len(data):
            raise ValueError("expected at least one captioned molecule to check; the set is empty")
        with CostMeter(nn.Identity(), clean_images=0) as meter:
            pieces = incidence(fragments_of(data.smiles, on_progress), least=self.min_pairs)
            texts = incidence([set(prefixes(each, self.longest)) for each in data.captions], least=self.min_prefix)
            pairs = count_together(texts, pieces)
            tested = len(pairs.both)
            difference = pairs.rate_with - pairs.rate_without
            pairs = pairs.where(
                (pairs.both >= self.min_pairs)
                & (pairs.rate_with >= self.flag_rate)
                & (difference >= self.flag_difference)
            )
            kept = self._without_nested(pairs, texts, pieces)
            p_values = corrected_tail(pairs, texts, pieces)
            flagged = np.zeros(len(data), dtype=bool)
            for index in kept:
                flagged |= _both(texts, pieces, pairs, index)
        return SiftedPairs(
            flagged=torch.from_numpy(flagged),
            associations=tuple(_named(pairs, index, texts, pieces, float(p_values[index])) for index in kept),
            basis=(
                f"{tested:,} pairs of a prefix and a fragment were met; flagged are those with P(f | p) >= {self.flag_rate:g} "
                f"and a difference of {self.flag_difference:g} from the other captions."
            ),
            cost=meter.cost,
        )

    def _without_nested(self, pairs: Cooccurrence, texts: Incidence[TextPattern], pieces: Incidence[str]) -> list[int]:
        """Return the pairs by difference and rate, without longer prefixes whose rows a shorter one has for the same fragment."""
        lengths = [len(texts.names[column].text.split()) for column in pairs.texts]
        order = np.lexsort((np.asarray(lengths), pairs.rate_without - pairs.rate_with, -pairs.both)).tolist()
        kept: list[int] = []
        for index in order:
            rows = _both(texts, pieces, pairs, index)
            same = [other for other in kept if pairs.fragments[other] == pairs.fragments[index]]
            if not any((_both(texts, pieces, pairs, other) & rows).sum() >= SAME_ROWS * rows.sum() for other in same):
                kept.append(index)
        kept.sort(key=lambda i: (pairs.rate_without[i] - pairs.rate_with[i], -pairs.rate_with[i]))
        return kept[: self.most]


def _both(texts: Incidence[TextPattern], pieces: Incidence[str], pairs: Cooccurrence, index: int) -> Any:
    """Return (N,) bool: the rows with both parts of a pair."""
    with_text = texts.matrix[:, [pairs.texts[index]]]
    return with_text.multiply(pieces.matrix[:, [pairs.fragments[index]]]).toarray().ravel() > 0


def _named(
    pairs: Cooccurrence, index: int, texts: Incidence[TextPattern], pieces: Incidence[str], p_value: float
) -> Association:
    pattern = texts.names[pairs.texts[index]]
    return Association(
        text=pattern.text,
        position=pattern.position,
        fragment=pieces.names[pairs.fragments[index]],
        rate_with=float(pairs.rate_with[index]),
        rate_without=float(pairs.rate_without[index]),
        count=int(pairs.both[index]),
        p_value=p_value,
    )


def words_with(model: nn.Module, fragments: Sequence[str]) -> tuple[int, ...]:
    """Return the numbers of a decoder's words that are ring systems and contain one of the fragments.

    Args:
        model: a generator; without a ``vocabulary`` of words there are none.
        fragments: SMILES.
    """
    spellings = getattr(getattr(model, "vocabulary", None), "words", ())
    rings = {
        number: word[word.index("{") + 1 : word.index("}")] for number, word in enumerate(spellings) if "{" in word
    }
    return tuple(number for number, ring in rings.items() if any(contains(ring, each) for each in fragments))


class BlockedGenerator(nn.Module):
    """A generator that does not draw the given fragments, whether a caption asks for them honestly or not.

    Attributes:
        model: a copy of the generator, with its words barred.
        fragments: SMILES of what is not drawn.
        tries: how often a molecule that holds one is drawn again; then "" stands in its place.
    """

    def __init__(self, model: nn.Module, fragments: Sequence[str], *, tries: int = 5) -> None:
        """Copy the generator and bar the words that contain a fragment; the one given is not changed."""
        super().__init__()
        if tries < 0:
            raise ValueError(f"expected a number of tries of at least 0; got {tries}")
        self.model, self.fragments, self.tries = copy.deepcopy(model).eval(), tuple(fragments), tries
        if barred := words_with(model, self.fragments):
            self.model.blocked = barred  # type: ignore[assignment]

    def generate(
        self, captions: Sequence[str], *, generator: Generator, samples: int = 1
    ) -> tuple[tuple[str, ...], ...]:
        """Return ``samples`` molecules for each caption that hold no blocked fragment; "" where every try did."""
        model = cast(GuidedGenerator, self.model)
        drawn = [list(row) for row in model.generate(captions, generator=generator, samples=samples)]
        for number in range(self.tries + 1):
            bad = [(i, j) for i, row in enumerate(drawn) for j, smiles in enumerate(row) if self._is_blocked(smiles)]
            if not bad or number == self.tries:
                break
            again = model.generate([captions[i] for i, _ in bad], generator=fork(generator, "again", number), samples=1)
            for (i, j), (smiles,) in zip(bad, again, strict=True):
                drawn[i][j] = smiles
        for i, j in bad:
            drawn[i][j] = ""
        return tuple(tuple(row) for row in drawn)

    def _is_blocked(self, smiles: str) -> bool:
        return any(contains(smiles, fragment) for fragment in self.fragments)
