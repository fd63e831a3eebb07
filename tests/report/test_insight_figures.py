"""What changed inside a network, drawn: positions and colours by hand, and a section of the page."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lustral.report.figures import insight as drawing
from lustral.report.figures.insight import heated, insight_figures, loss_chart
from lustral.report.figures.scatter import scatter
from lustral.report.page import ReportData, write_erase_report
from lustral.vision.insight import FeatureMap, HeatMaps, Insight, WeightLine
from lustral.vision.records import Purified, RecoveredTrigger, Verdict
from toy import mask_verdict, toy_images, true_trigger

NAMES = ("ant", "bee", "<b>cat</b>", "dog", "eel", "fox", "gnu")
MOST_WORDS = 35


def seen() -> Insight:
    images = toy_images(7, seed=0).images[:3]
    points = torch.tensor([[0.0, 0.0], [4.0, 2.0], [1.0, 1.0], [2.0, math.nan]])
    maps = torch.zeros(3, 12, 12)
    maps[:, 0, 0] = 1
    return Insight(
        num_images=90,
        are_unseen=False,
        has_trigger=True,
        has_true_trigger=False,
        heat=HeatMaps(images=images, before=maps, after=maps, answers_before=(4, 4, 4), answers_after=(0, 1, 2)),
        features=FeatureMap(
            before=points,
            after=points,
            shown_before=0.5,
            shown_after=0.25,
            is_triggered=torch.tensor([False, False, True, True]),
            is_target=torch.tensor([False, True, False, False]),
        ),
        line=WeightLine(shares=(0.0, 0.5, 1.0), clean=(1.0, 2.0, 1.0), triggered=(5.0, math.inf, 1.0)),
        left_out=("Something is not shown.",),
    )


def page(insight: Insight | None, path: Path, verdict: Verdict | None = None) -> str:
    found = verdict or mask_verdict([9.0] * 7, suspects=[4], triggers=[true_trigger()])
    purified = Purified(model=torch.nn.Identity(), history=(), selected=0, cost=found.cost, verdict=found)
    clean = replace(toy_images(14, seed=0), class_names=NAMES)
    write_erase_report(path, ReportData(title="m", clean=clean, purified=purified, insight=insight))
    return path.read_text(encoding="utf-8")


def test_points_keep_one_scale_for_both_directions() -> None:
    chart = scatter("Before", {"others": ("clean", [(0, 0), (4, 2)]), "triggered": ("triggered", [(math.nan, 1)])})
    assert [dots.path for dots in chart.groups] == ["M4.00 73.00h0M96.00 27.00h0"]
    assert chart.description == "Before: 2 clean."
    alone = scatter("After", {"others": ("clean", [(7, 7)])})
    assert alone.groups[0].path == "M50.00 50.00h0"
    assert scatter("After", {}).description == "After: no points."


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=8))
def test_points_stay_in_their_box(points: list[tuple[float, float]]) -> None:
    for dots in scatter("x", {"others": ("clean", points)}).groups:
        numbers = [float(number) for number in re.findall(r"[\d.e+-]+", dots.path.replace("h0", ""))]
        assert len(numbers) == 2 * dots.count
        assert all(3.9 <= number <= 96.1 for number in numbers)


def test_heat_is_yellow_where_it_is_strong_and_leaves_the_rest() -> None:
    images = torch.full((1, 3, 1, 2), 200, dtype=torch.uint8)
    hot = heated(images, torch.tensor([[[0.0, 1.0]]]))
    assert hot[0, :, 0, 0].tolist() == [150, 150, 150]
    assert hot[0, :, 0, 1].tolist() == [round(150 + 0.8 * (255 - 150))] * 2 + [round(150 - 0.8 * 150)]


def test_losses_are_drawn_with_a_gap_where_there_is_none() -> None:
    line = seen().line
    assert line is not None
    chart = loss_chart(line)
    assert chart is not None
    assert [text for _, text in chart.x_ticks] == ["given", "50% of the way", "erased"]
    assert chart.lines[1].strokes.count("M") == 2
    assert "clean images from 1 to 1" in chart.description
    nothing = (math.nan, math.inf, math.nan)
    assert loss_chart(WeightLine(shares=line.shares, clean=nothing)) is None


def test_the_page_shows_what_was_seen(tmp_path: Path) -> None:
    text = page(seen(), tmp_path / "r.html")
    for said in ("What changed inside the network", "Made with 90 of the clean images, and", "the recovered trigger."):
        assert said in text
    assert "Before (50% of the variance)" in text
    assert "Something is not shown." in text
    assert text.count('class="point triggered"') == 3  # two clouds and their legend
    assert "“&lt;b&gt;cat&lt;/b&gt;”</figcaption>" in text
    assert "What changed inside" not in page(None, tmp_path / "s.html")


def test_what_is_not_there_has_no_heading(tmp_path: Path) -> None:
    bare = Insight(num_images=9, left_out=("Nothing of it.",))
    text = page(bare, tmp_path / "r.html")
    assert "Made with 9 of the clean images." in text
    for heading in ("Where it looks", "What it takes for alike", "The way between"):
        assert heading not in text
    figures = insight_figures(replace(bare, line=WeightLine(shares=(0.0, 1.0), clean=(1.0, 1.0))), NAMES)
    assert figures.how_to_read["line"] == drawing.HOW_TO_READ_CLEAN_LINE


@pytest.mark.parametrize("name", [name for name in vars(drawing) if name.startswith("HOW_TO_READ")])
def test_each_figure_has_one_short_sentence(name: str) -> None:
    sentence: str = getattr(drawing, name)
    assert len(sentence.split()) <= MOST_WORDS
    assert sentence.count(".") == 1


def test_a_trigger_without_pixels_has_figures_alone(tmp_path: Path) -> None:
    found = RecoveredTrigger(
        target_label=4,
        masks=torch.zeros(8, 1, 0, 0),
        patterns=torch.zeros(8, 1, 0, 0),
        area=4.2,
        attack_success_rate=0.9,
        entropy=0.0,
    )
    text = page(None, tmp_path / "r.html", mask_verdict([9.0] * 7, suspects=[4], triggers=[found]))
    assert "8 samples, 4.2 px needed" in text
    assert "<img" not in text
