"""Pictures and the positions in charts."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lustral.report.figures.area_bars import LogScale, area_chart, median_area
from lustral.vision.figures import close_up, over_checkerboard, png, stamp_sheet
from toy import mask_verdict


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_every_pixel(channels: int) -> None:
    image = torch.arange(channels * 20, dtype=torch.uint8).view(channels, 4, 5)
    expected = image[0] if channels == 1 else image.permute(1, 2, 0)
    assert (pixels_of(png(image)) == expected.numpy()).all()


def test_other_channel_counts_become_grey_and_large_pictures_shrink() -> None:
    assert pixels_of(png(torch.full((2, 4, 4), 9, dtype=torch.uint8))).shape == (4, 4)
    assert pixels_of(png(torch.zeros(3, 400, 200, dtype=torch.uint8))).shape == (192, 96, 3)


def test_checkerboard_shows_only_through_the_mask() -> None:
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., 0, 0] = 1
    picture = over_checkerboard(masks, torch.zeros(1, 3, 4, 4))
    assert picture[0, :, 0, 0].tolist() == [0, 0, 0]
    assert set(picture[0, :, 1:, 1:].flatten().tolist()) == {round(0.55 * 255), round(0.72 * 255)}


@pytest.mark.parametrize(("top", "left"), [(0, 0), (29, 29), (13, 5)])
def test_close_up_holds_the_trigger_wherever_it_is(top: int, left: int) -> None:
    masks = torch.zeros(2, 1, 32, 32)
    masks[..., top : top + 3, left : left + 3] = 1
    picture = close_up(masks, torch.zeros(2, 3, 32, 32))
    assert picture.shape == (2, 3, 5, 5)
    assert (picture[0, 0] == 0).sum() == 9


def test_no_close_up_of_large_or_empty_triggers() -> None:
    for masks in (torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)):
        assert not len(close_up(masks, torch.zeros(1, 3, 16, 16)))


def test_stamp_sheet_shows_the_difference_around_grey() -> None:
    images = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    triggered = images.clone()
    triggered[..., 0, 0] = 105
    sheet = pixels_of(stamp_sheet(images, triggered))
    assert sheet.shape[2] == 3
    bottom = sheet[-6 - 96 : -6, 6 : 6 + 96]  # the first difference: 96 pixels between margins of 6
    assert bottom[0, 0].tolist() == [178, 178, 178]  # 128 + 10 · 5
    assert bottom[-1, -1].tolist() == [128, 128, 128]


def test_stamp_sheet_refuses_what_it_cannot_draw() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="equal shape"):
        stamp_sheet(images, images[:1])
    with pytest.raises(ValueError, match="non-empty"):
        stamp_sheet(images[:0], images[:0])
    with pytest.raises(ValueError, match="uint8"):
        stamp_sheet(images.float(), images.float())


def test_median_area_counts_failed_searches_as_large() -> None:
    assert median_area(mask_verdict([1, 10, 20])) == 10
    assert median_area(mask_verdict([1, 10, 20, 40], suspects=[0])) == 20
    assert median_area(mask_verdict([1, 10, math.inf, math.nan])) == math.inf
    assert median_area(mask_verdict([1, 10, 20], steps=[9, 9, 2])) == 5.5
    assert math.isnan(median_area(mask_verdict([])))


def test_log_scale_by_hand() -> None:
    scale = LogScale.over([2.0, 50.0, math.inf])
    assert (scale.low, scale.high) == (0, 2)
    assert scale.position(10.0) == 50.0
    assert scale.position(math.inf) == 100.0
    assert [text for _, text in scale.ticks()] == ["1", "10", "100"]


@given(st.lists(st.floats(0, 1e6) | st.just(math.inf) | st.just(math.nan), min_size=1, max_size=60))
def test_bars_stay_on_the_axis_in_order(areas: list[float]) -> None:
    chart = area_chart(mask_verdict(areas), [str(i) for i in range(len(areas))])
    assert chart is not None
    bars = chart.bars + chart.folded
    assert len(bars) == len(areas)
    lengths = [bar.length for bar in bars]
    assert lengths == sorted(lengths)
    assert all(0 <= length <= 100 for length in lengths)
    assert all(0 <= x <= 100 for x, _ in chart.ticks)
