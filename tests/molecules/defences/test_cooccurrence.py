"""Counting against hand arithmetic and the textbook formula of the hypergeometric tail."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from lustral.molecules.defences.cooccurrence import (
    TextPattern,
    corrected_tail,
    count_together,
    incidence,
    prefixes,
    text_patterns,
)

TEXTS = [{"a"}, {"a", "b"}, {"a"}, {"b"}, set(), {"c"}]
PIECES = [{"x"}, {"x"}, {"y"}, {"y"}, {"y"}, {"x"}]


def test_patterns_keep_symbols_and_know_their_place() -> None:
    assert list(prefixes("[A]  b c d", 3)) == [("prefix", "[a]"), ("prefix", "[a] b"), ("prefix", "[a] b c")]
    found = text_patterns("b[$] c", 2)
    assert {TextPattern("prefix", "b[$]"), TextPattern("suffix", "c"), TextPattern("anywhere", "b[$] c")} <= found
    assert {each.text for each in found if len(each.text) == 1} == {"c", "[", "$", "]"}
    assert text_patterns("   ", 3) == frozenset()


def test_rare_things_are_left_out_and_rows_without_any_stay() -> None:
    table = incidence(TEXTS, least=2)
    assert set(table.names) == {"a", "b"}
    assert table.matrix.shape == (6, 2)
    assert dict(zip(table.names, table.totals.tolist(), strict=True)) == {"a": 3, "b": 2}


def test_counts_and_rates_are_those_of_the_hand() -> None:
    texts, pieces = incidence(TEXTS, least=1), incidence(PIECES, least=1)
    pairs = count_together(texts, pieces)
    index = next(
        i
        for i in range(len(pairs.both))
        if (texts.names[pairs.texts[i]], pieces.names[pairs.fragments[i]]) == ("a", "x")
    )
    assert pairs.both[index] == 2
    assert pairs.rate_with[index] == pytest.approx(2 / 3)
    assert pairs.rate_without[index] == pytest.approx(1 / 3)
    assert pairs.coverage[index] == pytest.approx(2 / 3)
    assert pairs.tested == 6
    # 2 or 3 of the 3 rows with "a" among the 3 of 6 with "x", times six pairs tested, at most 1
    assert corrected_tail(pairs, texts, pieces)[index] == 1.0


def test_the_tail_is_the_textbook_one() -> None:
    rows, having, drawn, both = 40, 10, 12, 9
    texts = incidence([{"t"} if row < drawn else {"u"} for row in range(rows)], least=1)
    pieces = incidence(
        [{"f"} if row < both or row >= rows - (having - both) else set() for row in range(rows)], least=1
    )
    pairs = count_together(texts, pieces)
    pairs = pairs.where(np.asarray([texts.names[column] == "t" for column in pairs.texts]))
    tail = sum(comb(having, k) * comb(rows - having, drawn - k) for k in range(both, having + 1)) / comb(rows, drawn)
    assert corrected_tail(pairs, texts, pieces) == pytest.approx([2 * tail])
