"""The record of how a model came about: what it says, and what it refuses to read."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lustral.core.history import FIGURES, HistoryEntry, history_table, part_texts, read_history

numbers = st.none() | st.floats(allow_nan=False)
entries = st.builds(
    HistoryEntry,
    count=st.integers(0, 10**6),
    unit=st.sampled_from(["epoch", "channels", "passes"]),
    parts=st.sampled_from([(), (("round", 1),), (("round", 2), ("rate_divisor", 4.0)), (("neuron_ratio", 0.3),)]),
    **dict.fromkeys(FIGURES, numbers),
)


@given(entries)
def test_an_entry_comes_back_from_json(entry: HistoryEntry) -> None:
    assert HistoryEntry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "a table of numbers; got list"),
        ({}, "count one of epoch, channels, passes; it counts 0"),
        ({"epoch": 1, "channels": 1}, "it counts 2"),
        ({"epoch": "1"}, "the epoch of an entry to be a whole number from 0; got '1'"),
        ({"epoch": True}, "whole number from 0; got True"),
        ({"epoch": -1}, "whole number from 0; got -1"),
        ({"epoch": 1, "los": 0.1}, "unknown field 'los'"),
        ({"epoch": 1, "loss": [1]}, r"expected loss of an entry to be a number; got \[1\]"),
        ({"epoch": 1, "loss": True}, "to be a number; got True"),
        ({"epoch": 1, "round": None}, "expected round of an entry to be a number; got None"),
    ],
)
def test_what_is_no_entry_is_refused_with_the_reason(record: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HistoryEntry.from_dict(record)


def test_names_of_an_earlier_version_are_read() -> None:
    entry = HistoryEntry.from_dict({"round": 1, "slowed": 4.0, "epoch": 2})
    assert entry.parts == (("round", 1), ("rate_divisor", 4.0))
    assert HistoryEntry.from_dict({"channels": 2, "u": 3.5}).threshold == 3.5


@pytest.mark.parametrize(
    ("records", "count", "said"),
    [
        (None, 0, []),
        ([{"epoch": 0}], 1, []),
        (3, 0, ["The history cannot be read: expected a list; got int."]),
        ("[]", 0, ["The history cannot be read: expected a list; got str."]),
    ],
)
def test_a_whole_history_is_read(records: object, count: int, said: list[str]) -> None:
    found, problems = read_history(records)
    assert (len(found), problems) == (count, said)


def test_a_damaged_history_is_read_up_to_the_damage() -> None:
    records: list[Any] = [{"epoch": 0}, {"epoch": 1}, {"epoch": "x"}, {"epoch": 3}]
    found, (said,) = read_history(records)
    assert [entry.count for entry in found] == [0, 1]
    assert said.startswith("The history cannot be read from entry 3 on: expected the epoch")


def test_only_the_count_0_is_the_given_model() -> None:
    assert HistoryEntry(count=0, unit="channels").is_given
    assert not HistoryEntry(count=1).is_given


def test_parts_are_told_where_they_differ() -> None:
    history = [HistoryEntry(count=0), *(HistoryEntry(count=1, parts=(("neuron_ratio", r),)) for r in (0.3, 0.05))]
    assert part_texts(history) == ["", "30% of neurons reset", "5% of neurons reset"]
    assert part_texts(history[1:2]) == [""]


def test_a_table_has_a_column_for_each_figure_that_was_measured() -> None:
    history = [
        HistoryEntry(count=0, clean_accuracy=0.9),
        HistoryEntry(count=1, parts=(("round", 1),), clean_accuracy=0.875, area=math.inf, loss=12345.6),
    ]
    columns, rows = history_table(history)
    assert columns == ["part", "at", "loss", "clean accuracy (held-out)", "pixels needed"]
    assert rows == [["–", "epoch 0", "–", "90.0%", "–"], ["round 1", "epoch 1", "12,346", "87.5%", "inf"]]
    assert history_table(history[:1]) == (["at", "clean accuracy (held-out)"], [["epoch 0", "90.0%"]])
    assert history_table([]) == ([], [])
