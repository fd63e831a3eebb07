"""Counting which pieces of text and which pieces of molecules come together: one sparse product, no loop over pairs.

Text is split at white space and lower-cased and nothing else, so that brackets and symbols survive.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import hypergeom

Position = Literal["prefix", "infix", "suffix", "anywhere"]
Name = TypeVar("Name", bound=Hashable)


class TextPattern(NamedTuple):
    """Words at a place of a caption.

    Attributes:
        position: "prefix", "suffix" or "anywhere".
        text: lower-cased words with single blanks between them; or one symbol, which may stand inside a word.
    """

    position: Position
    text: str


def words(caption: str) -> list[str]:
    """Return the lower-cased words of a caption, split at white space only.

    >>> words("[THIIRANE] The  molecule")
    ['[thiirane]', 'the', 'molecule']
    """
    return caption.lower().split()


def prefixes(caption: str, longest: int) -> Iterator[TextPattern]:
    """Yield the first word of a caption, the first two, and so on."""
    split = words(caption)
    for length in range(1, min(longest, len(split)) + 1):
        yield TextPattern("prefix", " ".join(split[:length]))


def text_patterns(caption: str, longest: int) -> frozenset[TextPattern]:
    """Return all runs of up to ``longest`` words of a caption, those at its ends also as such, and its symbols.

    A symbol is a character that is neither a letter, a digit nor white space.

    >>> sorted({pattern.text for pattern in text_patterns("An $ acid", 2)})
    ['$', '$ acid', 'acid', 'an', 'an $']
    """
    split = words(caption)
    found = {TextPattern("anywhere", sign) for sign in set(caption) if not (sign.isalnum() or sign.isspace())}
    for length in range(1, min(longest, len(split)) + 1):
        runs = [" ".join(split[start : start + length]) for start in range(len(split) - length + 1)]
        found.update(TextPattern("anywhere", run) for run in runs)
        found.add(TextPattern("prefix", runs[0]))
        found.add(TextPattern("suffix", runs[-1]))
    return frozenset(found)


@dataclass(frozen=True, kw_only=True)
class Incidence(Generic[Name]):
    """Which of N rows have which of K things.

    Attributes:
        names: the K things.
        matrix: (N, K) sparse int32, 1 where a row has a thing.
    """

    names: tuple[Name, ...]
    matrix: Any

    @property
    def totals(self) -> NDArray[np.int64]:
        """(K,) rows that have each thing."""
        return np.asarray(self.matrix.sum(0), dtype=np.int64).ravel()


def incidence(rows: Sequence[Collection[Name]], *, least: int) -> Incidence[Name]:
    """Return who has what, of the things that at least ``least`` rows have; a row names a thing once."""
    totals = Counter(name for row in rows for name in row)
    names = tuple(name for name, total in totals.items() if total >= least)
    columns = {name: column for column, name in enumerate(names)}
    kept = [[columns[name] for name in row if name in columns] for row in rows]
    starts = np.cumsum([0, *map(len, kept)])
    places = np.fromiter((column for row in kept for column in row), dtype=np.int64, count=int(starts[-1]))
    ones = np.ones(len(places), dtype=np.int32)
    return Incidence(names=names, matrix=sparse.csr_matrix((ones, places, starts), shape=(len(rows), len(names))))


@dataclass(frozen=True, kw_only=True)
class Cooccurrence:
    """Pairs of a piece of text and a fragment, and how often they come together; one entry of each array for each pair.

    Attributes:
        texts: (P,) columns of the pieces of text.
        fragments: (P,) columns of the fragments.
        both: (P,) rows with both.
        rate_with: (P,) share of the rows with the fragment, among those with the text.
        rate_without: (P,) the same among the other rows; 0 where all rows have the text.
        coverage: (P,) share of the rows with the text, among those with the fragment.
        tested: pairs that were counted, among them those that never came together.
    """

    texts: NDArray[np.int64]
    fragments: NDArray[np.int64]
    both: NDArray[np.int64]
    rate_with: NDArray[np.float64]
    rate_without: NDArray[np.float64]
    coverage: NDArray[np.float64]
    tested: int

    def where(self, chosen: NDArray[np.bool_]) -> Cooccurrence:
        """Return the pairs at (P,) bool; how many were tested stays."""
        return Cooccurrence(
            texts=self.texts[chosen],
            fragments=self.fragments[chosen],
            both=self.both[chosen],
            rate_with=self.rate_with[chosen],
            rate_without=self.rate_without[chosen],
            coverage=self.coverage[chosen],
            tested=self.tested,
        )


def count_together(texts: Incidence[Any], fragments: Incidence[Any]) -> Cooccurrence:
    """Count every piece of text with every fragment, both of the same N rows."""
    num_rows = texts.matrix.shape[0]
    together = (texts.matrix.T @ fragments.matrix).tocoo()
    columns, pieces = together.row.astype(np.int64), together.col.astype(np.int64)
    both = together.data.astype(np.int64)
    with_text, with_fragment = texts.totals[columns], fragments.totals[pieces]
    return Cooccurrence(
        texts=columns,
        fragments=pieces,
        both=both,
        rate_with=both / with_text,
        rate_without=(with_fragment - both) / np.maximum(num_rows - with_text, 1),
        coverage=both / with_fragment,
        tested=len(texts.names) * len(fragments.names),
    )


def corrected_tail(pairs: Cooccurrence, texts: Incidence[Any], fragments: Incidence[Any]) -> NDArray[np.float64]:
    """Return (P,) one-sided p-values of the pairs, by the hypergeometric tail, times the number of pairs that were tested.

    Bonferroni's correction bounds the share of false discoveries too, whatever the pairs have to do with each other.
    """
    num_rows = texts.matrix.shape[0]
    tail = hypergeom.sf(pairs.both - 1, num_rows, fragments.totals[pairs.fragments], texts.totals[pairs.texts])
    return np.minimum(np.asarray(tail, dtype=np.float64) * pairs.tested, 1.0)
