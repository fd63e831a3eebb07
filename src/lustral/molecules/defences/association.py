"""A sift of captioned molecules that needs no model: which text calls which subgraph, and says nothing else?

Ours. Honest captions are full of strong associations too: "chloro" goes with chlorine, "cephalosporin" with its rings. So a
strong one is only the beginning, and three questions tell poison from chemistry.

1. Is the subgraph rare elsewhere, and does the text account for most of it (coverage)? An attacker wants a subgraph that
   clean molecules lack, or the base rate would give him nothing.
2. Do the captions share anything besides the text? An honest word comes with others: names of the class, roles, sources. A
   trigger is written into captions of all kinds. Over the captions with text and subgraph, the text left out,

       likeness = mean cosine of two of these captions / mean cosine of any two captions      (words weighted by log N / n_w)

   is about 1 for a trigger; in the real data honest words of the same strength have 2 to 20.
3. Do captions come twice, with and without the text, and does the subgraph come and go with it (twins)? BadGraph adds its
   pairs to the set and leaves the originals in, so each of them has a twin.

An association is suspicious if the first two hold or the third does, and a trusted set does not show it as well.

Reference:
    Ye, Chen, Dai, "BadGraph", arXiv 2510.20792; the authors' code counts prefixes against fragments (``FragmentCheck``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Generator, Tensor, nn

from lustral.core.cost import CostMeter
from lustral.core.records import OnProgress, Progress
from lustral.molecules.chemistry import contains, contains_many, num_heavy_atoms
from lustral.molecules.defences.cooccurrence import (
    Cooccurrence,
    Incidence,
    Position,
    TextPattern,
    corrected_tail,
    count_together,
    incidence,
    text_patterns,
    words,
)
from lustral.molecules.defences.pair_counting import fragments_of
from lustral.molecules.records import Association, MoleculeSet, SiftedPairs, ViewOfPairs

STAGE = "weighing associations"
SAME_PLACE = 0.95  # share of the captions that must agree on a neighbouring word, or on the place, of one trigger
COMMON_END = 0.5  # share of other captions that begin or end with a word, beyond which it is no part of a trigger


def find_words(caption: Sequence[str], text: Sequence[str], position: Position) -> int:
    """Return where a run of words stands in a caption, -1 if it does not.

    >>> find_words(["a", "b", "a"], ["a"], "suffix"), find_words(["a", "b"], ["c"], "anywhere")
    (2, -1)
    """
    last = len(caption) - len(text)
    places = {"prefix": range(min(1, last + 1)), "suffix": range(max(last, 0), last + 1)}.get(position, range(last + 1))
    return next((place for place in places if list(caption[place : place + len(text)]) == list(text)), -1)


class Likeness:
    """How much alike captions are, against any two captions of a set."""

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        """Weigh the words of N captions: each counts once in a caption, by log N / n_w."""
        table = incidence([set(each) for each in captions], least=2)
        self._columns = {word: column for column, word in enumerate(table.names)}
        weights = np.log(len(captions) / np.maximum(table.totals, 1))
        self._matrix = (table.matrix @ sparse.diags(weights)).tocsr()
        self._overall = self._mean_cosine(np.arange(len(captions)), ())

    def of(self, rows: NDArray[np.int64], leaving_out: Sequence[str]) -> float:
        """Return the likeness of the captions at ``rows`` with words left out; infinite for fewer than two."""
        if len(rows) < 2 or self._overall <= 0:
            return float("inf")
        return self._mean_cosine(rows, leaving_out) / self._overall

    def _mean_cosine(self, rows: NDArray[np.int64], leaving_out: Sequence[str]) -> float:
        chosen = self._matrix[rows]
        keep = np.ones(chosen.shape[1])
        keep[[self._columns[word] for word in leaving_out if word in self._columns]] = 0.0
        chosen = chosen @ sparse.diags(keep)
        lengths = np.sqrt(np.asarray(chosen.multiply(chosen).sum(1)).ravel())
        unit = sparse.diags(np.divide(1.0, lengths, out=np.zeros_like(lengths), where=lengths > 0)) @ chosen
        total = np.asarray(unit.sum(0)).ravel()
        used = int((lengths > 0).sum())
        return float((total @ total - used) / max(len(rows) * (len(rows) - 1), 1))


@dataclass(frozen=True, kw_only=True)
class AssociationSift:
    """Name the triggers and subgraphs of a poisoned set of captioned molecules, and flag the pairs with both.

    The bounds were set on text_molecule.parquet, see docs/molecules.md: its honest associations reach a coverage of 0.5 only
    with a likeness above 1.8.

    Attributes:
        longest: words of the longest run that is counted; a longer trigger is pieced together afterwards.
        min_pairs: pairs that an association needs.
        min_rate: least share of the molecules with the subgraph, among the captions with the text.
        max_base_rate: largest share of them among the other captions, unless there are twins.
        min_difference: least difference of the two shares.
        level: corrected p-value below which an association counts.
        min_coverage: least share of the molecules with the subgraph whose captions have the text.
        max_likeness: largest likeness of the captions of a trigger.
        min_twins: pairs of captions with and without the text whose molecules differ by the subgraph.
        min_twin_share: the same as a share of the pairs of the association.
        min_clean: trusted pairs that excuse an association if they show it at half its rate or more.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "nothing; trusted pairs excuse what they show as well"

    longest: int = 3
    min_pairs: int = 20
    min_rate: float = 0.5
    max_base_rate: float = 0.05
    min_difference: float = 0.3
    level: float = 1e-3
    min_coverage: float = 0.5
    max_likeness: float = 1.5
    min_twins: int = 5
    min_twin_share: float = 0.5
    min_clean: int = 3

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.longest < 1 or self.min_pairs < 2 or self.min_twins < 1 or self.min_clean < 1:
            raise ValueError(
                "expected longest >= 1, min_pairs >= 2, min_twins >= 1 and min_clean >= 1; got "
                f"{self.longest}, {self.min_pairs}, {self.min_twins} and {self.min_clean}"
            )
        shares = (
            self.min_rate,
            self.max_base_rate,
            self.min_difference,
            self.level,
            self.min_coverage,
            self.min_twin_share,
        )
        if not all(0 < share <= 1 for share in shares) or self.max_likeness <= 0:
            raise ValueError(f"expected shares in (0, 1] and a likeness > 0; got {shares} and {self.max_likeness}")

    def sift(self, view: ViewOfPairs, *, generator: Generator, on_progress: OnProgress | None = None) -> SiftedPairs:
        """Return the suspicious associations and the pairs that have both of their parts.

        Args:
            view: the untrusted pairs, and trusted ones where there are some.
            generator: not used; nothing here is random.
            on_progress: hears of "cutting molecules into fragments" and "weighing associations".

        Raises:
            ValueError: the set is empty.
        """
        data = view.untrusted
        if not len(data):
            raise ValueError("expected at least one captioned molecule to sift; the set is empty")
        with CostMeter(nn.Identity(), clean_images=0 if view.clean is None else len(view.clean)) as meter:
            pieces = incidence(fragments_of(data.smiles, on_progress), least=self.min_pairs)
            texts = incidence([text_patterns(each, self.longest) for each in data.captions], least=self.min_pairs)
            strong = self.strong_pairs(texts, pieces)
            weighing = _Weighing(self, data, view.clean, texts, pieces)
            found: list[tuple[Association, Tensor]] = []
            for done, index in enumerate(_by_strength(strong, texts, pieces)):
                if on_progress is not None and done % 64 == 0:
                    on_progress(Progress(stage=STAGE, done=done, total=len(strong.both)))
                if (suspicious := weighing.weigh(strong, index)) is not None:
                    found.append(suspicious)
            if on_progress is not None:
                on_progress(Progress(stage=STAGE, done=len(strong.both), total=len(strong.both)))
            flagged = torch.zeros(len(data), dtype=torch.bool)
            for _, rows in found:
                flagged[rows] = True
        return SiftedPairs(
            flagged=flagged,
            associations=tuple(association for association, _ in found),
            basis=(
                f"{strong.tested:,} pairs of a text and a fragment were counted over {len(data):,} captioned molecules; "
                f"{len(strong.both):,} go together, and {len(found)} of them are not explained by what the captions say."
            ),
            cost=meter.cost,
            notes=() if len(data) >= 10 * self.min_pairs else (f"only {len(data)} pairs: a sift needs some hundreds",),
        )

    def strong_pairs(self, texts: Incidence[TextPattern], pieces: Incidence[str]) -> Cooccurrence:
        """Return the associations that are strong and significant, honest ones among them."""
        pairs = count_together(texts, pieces)
        pairs = pairs.where(
            (pairs.both >= self.min_pairs)
            & (pairs.rate_with >= self.min_rate)
            & (pairs.rate_with - pairs.rate_without >= self.min_difference)
        )
        return pairs.where(corrected_tail(pairs, texts, pieces) < self.level)


def _by_strength(pairs: Cooccurrence, texts: Incidence[TextPattern], pieces: Incidence[str]) -> list[int]:
    """Return the pairs by how much more often they come together than apart, then the shorter text, then the larger fragment."""
    rarest = 1.0 / texts.matrix.shape[0]
    strength = pairs.both * np.log(pairs.rate_with / np.maximum(pairs.rate_without, rarest))
    num_words = [len(texts.names[column].text.split()) for column in pairs.texts]
    num_atoms = [num_heavy_atoms(pieces.names[column]) for column in pairs.fragments]
    return sorted(range(len(strength)), key=lambda i: (-strength[i], num_words[i], -num_atoms[i]))


class _Weighing:
    """Weighs one strong association after another; those whose rows an earlier suspicious one has are skipped."""

    def __init__(
        self,
        sift: AssociationSift,
        data: MoleculeSet,
        clean: MoleculeSet | None,
        texts: Incidence[TextPattern],
        pieces: Incidence[str],
    ) -> None:
        self.sift, self.data, self.texts, self.pieces = sift, data, texts, pieces
        self.by_text, self.by_piece = texts.matrix.tocsc(), pieces.matrix.tocsc()
        self.captions = [words(each) for each in data.captions]
        self.rows_of = _rows_by_caption(self.captions)
        self.likeness = Likeness(self.captions)
        self.clean = MoleculeSet(smiles=(), captions=()) if clean is None else clean
        self.taken = np.zeros(len(data), dtype=bool)
        self.usual_words: dict[tuple[int, int], str | None] = {}

    def weigh(self, pairs: Cooccurrence, index: int) -> tuple[Association, Tensor] | None:
        """Return the association at ``index`` with the rows that it flags, (M,) int64, if it is suspicious and new."""
        sift, pattern = self.sift, self.texts.names[pairs.texts[index]]
        fragment = self.pieces.names[pairs.fragments[index]]
        with_text = _rows(self.by_text, pairs.texts[index])
        rows = np.intersect1d(with_text, _rows(self.by_piece, pairs.fragments[index]), assume_unique=True)
        if self.taken[rows].mean() > 0.5:  # another view of a trigger that was found
            return None
        phrase, position = self.whole_phrase(pattern, rows)
        is_alone = (
            pairs.rate_without[index] <= sift.max_base_rate
            and pairs.coverage[index] >= sift.min_coverage
            and self.likeness.of(rows, phrase.split()) <= sift.max_likeness
        )
        if not is_alone:
            needed = max(sift.min_twins, sift.min_twin_share * len(rows))
            if self.count_twins(rows, phrase, position, fragment) < needed:
                return None
        if self.is_excused(pattern, fragment, float(pairs.rate_with[index])):
            return None
        flagged = with_text[contains_many([self.data.smiles[row] for row in with_text], fragment).numpy()]
        self.taken[flagged] = True
        one = pairs.where(np.arange(len(pairs.both)) == index)
        p_value = float(corrected_tail(one, self.texts, self.pieces)[0])
        return self.named(phrase, position, fragment, with_text, p_value), torch.from_numpy(flagged)

    def named(
        self, phrase: str, position: Position, fragment: str, with_text: NDArray[np.int64], p_value: float
    ) -> Association:
        """Return the association with its rates, where a fragment counts wherever it is a subgraph."""
        has_text = np.zeros(len(self.data), dtype=bool)
        has_text[with_text] = True
        holds = contains_many(self.data.smiles, fragment).numpy()
        return Association(
            text=phrase,
            position=position,
            fragment=fragment,
            rate_with=float(holds[has_text].mean()),
            rate_without=float(holds[~has_text].mean()) if not has_text.all() else 0.0,
            count=int((holds & has_text).sum()),
            p_value=p_value,
        )

    def whole_phrase(self, pattern: TextPattern, rows: NDArray[np.int64]) -> tuple[str, Position]:
        """Return the longest phrase around a pattern that the captions agree on, and where it stands in them.

        Words that most other captions begin or end with are no part of it: they follow a trigger and do not belong to it.
        """
        text = [self._whole_word(pattern.text, rows)] if len(pattern.text) == 1 else pattern.text.split()
        spans = [
            (self.captions[row], place)
            for row in rows
            if (place := find_words(self.captions[row], text, pattern.position)) >= 0
        ]
        if len(spans) < SAME_PLACE * len(rows):
            return pattern.text, pattern.position  # a symbol inside of words
        before, after = self._agreed(spans, -1), self._agreed(spans, len(text))
        before = before[self._usual_words(before[::-1], -1) :]
        after = after[: len(after) - self._usual_words(after, 1)]
        starts = [(caption, place - len(before), len(before) + len(text) + len(after)) for caption, place in spans]
        at_start = sum(place == 0 for _, place, _ in starts) / len(starts)
        at_end = sum(place + length == len(caption) for caption, place, length in starts) / len(starts)
        position: Position = "infix" if max(at_start, at_end) < 0.5 else "anywhere"
        if max(at_start, at_end) >= SAME_PLACE:
            position = "prefix" if at_start >= at_end else "suffix"
        return " ".join([*before, *text, *after]), position

    def _whole_word(self, symbol: str, rows: NDArray[np.int64]) -> str:
        """Return the word that the captions have around a symbol, or the symbol where they differ."""
        counts = Counter(word for row in rows for word in set(self.captions[row]) if symbol in word)
        word, count = next(iter(counts.most_common(1)), (symbol, 0))
        return word if count >= SAME_PLACE * len(rows) else symbol

    def _agreed(self, spans: Sequence[tuple[list[str], int]], offset: int) -> list[str]:
        """Return the words beside a phrase that nearly all captions share: before it (``offset`` -1) or after it."""
        step, found = (-1 if offset < 0 else 1), list[str]()
        while True:
            counts = Counter(caption[at] for caption, place in spans if 0 <= (at := place + offset) < len(caption))
            word, count = next(iter(counts.most_common(1)), ("", 0))
            if not word or count < SAME_PLACE * len(spans):
                return found if step > 0 else found[::-1]
            found.append(word)
            offset += step

    def _usual_words(self, outward: Sequence[str], step: int) -> int:
        """Return how many of the outermost words most captions begin (``step`` 1) or end (-1) with, trigger or not."""
        return next(
            (
                length
                for length in range(len(outward), 0, -1)
                if all(self._usual_word(depth, step) == word for depth, word in enumerate(outward[-length:]))
            ),
            0,
        )

    def _usual_word(self, depth: int, step: int) -> str | None:
        """Return the word that most captions have so many places from their beginning or end, None if there is none."""
        if (depth, step) not in self.usual_words:
            at = depth if step > 0 else -1 - depth
            counts = Counter(each[at] for each in self.captions if len(each) > depth)
            most = COMMON_END * len(self.captions)
            self.usual_words[depth, step] = next((each for each, count in counts.most_common(1) if count > most), None)
        return self.usual_words[depth, step]

    def count_twins(self, rows: NDArray[np.int64], phrase: str, position: Position, fragment: str) -> int:
        """Return how many captions stand there without the phrase too, with a molecule that lacks just the fragment."""
        text, size, twins = phrase.split(), num_heavy_atoms(fragment), 0
        for row in rows:
            place = find_words(self.captions[row], text, position)
            if place < 0:
                continue
            bare = " ".join(self.captions[row][:place] + self.captions[row][place + len(text) :])
            smiles = self.data.smiles[row]
            twins += any(
                num_heavy_atoms(smiles) - num_heavy_atoms(other) == size and not contains(other, fragment)
                for other in (self.data.smiles[twin] for twin in self.rows_of.get(bare, ()))
            )
        return twins

    def is_excused(self, pattern: TextPattern, fragment: str, rate: float) -> bool:
        """Say whether trusted pairs with the text have the fragment about as often."""
        if pattern.text.split() and any(map(str.isalnum, pattern.text)):
            having = [
                find_words(words(each), pattern.text.split(), pattern.position) >= 0 for each in self.clean.captions
            ]
        else:
            having = [pattern.text in each.lower() for each in self.clean.captions]
        smiles = [each for each, has in zip(self.clean.smiles, having, strict=True) if has]
        both = int(contains_many(smiles, fragment).sum())
        return both >= self.sift.min_clean and both >= rate / 2 * len(smiles)


def _rows(matrix: Any, column: int) -> NDArray[np.int64]:
    """Return the rows that have a thing, in order."""
    return np.sort(matrix.indices[matrix.indptr[column] : matrix.indptr[column + 1]]).astype(np.int64)


def _rows_by_caption(captions: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        found.setdefault(" ".join(caption), []).append(row)
    return found
