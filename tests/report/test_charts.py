"""The positions in curves of a history, worked out by hand."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lustral.core.history import HistoryEntry
from lustral.report.figures.charts import curves


def test_curves_put_shares_losses_and_the_rest_apart() -> None:
    history = [
        HistoryEntry(count=1, loss=2.0, clean_accuracy=0.5, recovered_asr=1.0, area=100.0),
        HistoryEntry(count=2, clean_accuracy=0.75, recovered_asr=0.0, area=1.0, threshold=3.0),
        HistoryEntry(count=3, loss=-1.0, clean_accuracy=1.0, area=float("nan")),
    ]
    shares, loss, area = curves(history, selected=1)
    assert [line.name for line in shares.lines] == ["clean accuracy (held-out)", "recovered trigger works"]
    assert [line.name for line in loss.lines] == ["loss"]
    assert [line.name for line in area.lines] == ["pixels needed"]
    assert shares.lines[0].strokes == "M1 50L50 25L99 0"  # 0 % is at the bottom, 100
    assert loss.lines[0].strokes == "M1 0M99 100"  # a gap is not bridged; the axis runs from 2 to -1
    assert [text for _, text in area.y_ticks] == ["1", "10", "100"]  # a ratio of 100: logarithmic
    assert area.lines[0].strokes == "M1 0L50 100"
    assert shares.selected == 50
    assert [text for _, text in shares.x_ticks] == ["epoch 1", "2", "3"]


def test_curves_mark_the_parts_of_a_history_and_survive_nothing() -> None:
    assert curves([], None) == []
    assert curves([HistoryEntry(count=0, loss=1.0)], 0) == []
    (flat,) = curves([HistoryEntry(count=1, parts=(("round", n),), loss=0.0) for n in (1, 2)], selected=7)
    assert flat.parts == ((0.0, 50.0, "round 1"), (50.0, 50.0, "round 2"))
    assert flat.selected is None
    slowed = [
        HistoryEntry(count=1, parts=(("round", 1),), loss=0.0),
        *(HistoryEntry(count=1, parts=(("round", n), ("rate_divisor", 4.0)), loss=0.0) for n in (1, 1, 2)),
    ]
    (anew,) = curves(slowed, None)  # the divisor of the rate is no curve of its own
    assert [(x, text) for x, _, text in anew.parts] == [
        (0.0, "round 1"),
        (pytest.approx(1 + 98 / 6, abs=0.01), "round 1, rate / 4"),
        (pytest.approx(1 + 98 * 5 / 6, abs=0.01), "round 2, rate / 4"),
    ]
    assert sum(width for _, width, _ in anew.parts) == pytest.approx(100, abs=0.05)
    (wild,) = curves([HistoryEntry(count=1, clean_accuracy=1.5), HistoryEntry(count=2, clean_accuracy=0.5)], None)
    assert float(wild.y_ticks[-1][1]) >= 1.5  # no share: the axis follows the numbers


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=12))
@example([4.8497990511896335e305, -1.7928433358111262e308])
@example([9.999999999999673e158, 1.0000000000000655e308])
@example([5e-324, 1.0])
@example([1e300, -1e300])
def test_curves_stay_in_their_box(values: list[float]) -> None:
    history = [HistoryEntry(count=index, loss=value) for index, value in enumerate(values)]
    for chart in curves(history, None):
        for number in re.findall(r"-?[\d.]+(?:e[-+]\d+)?", chart.lines[0].strokes):
            assert -0.01 <= float(number) <= 100.01


def test_only_the_figures_asked_for_are_drawn() -> None:
    history = [HistoryEntry(count=n, loss=1.0, clean_accuracy=0.5, area=3.0) for n in (1, 2)]
    drawn = curves(history, None, ("area", "clean_accuracy"))
    assert [line.figure for chart in drawn for line in chart.lines] == ["clean_accuracy", "area"]
    assert curves(history[:1], None) == []  # a single measurement is no curve
    assert curves(history, None)[0].parts == ()
