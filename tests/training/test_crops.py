from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from lustral.core.randomness import child
from lustral.training.crops import LUMA, StrongAugment, resampling

STILL = StrongAugment(
    side=1.0, least_area=1.0, aspect=1.0, flip=False, brightness=0, contrast=0, saturation=0, hue=0, grey_rate=0
)


def pictures(count: int = 8, channels: int = 3, height: int = 16, width: int = 20) -> Tensor:
    return torch.rand(count, channels, height, width, generator=child(0, "pictures"))


@pytest.mark.parametrize(("top", "left", "tall", "wide"), [(0, 0, 32, 32), (3, 5, 20, 17), (10, 2, 8, 30)])
def test_a_crop_is_resized_as_torchvision_does(top: int, left: int, tall: int, wide: int) -> None:
    images = pictures(4, height=32, width=32)
    wanted = TF.resize(images[..., top : top + tall, left : left + wide], [24, 24], antialias=True)
    down, across = (
        resampling(torch.tensor([float(start)]), torch.tensor([float(length)]), source=32, target=24)
        for start, length in ((top, tall), (left, wide))
    )
    torch.testing.assert_close(down @ images @ across.mT, wanted, atol=1e-5, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    start=st.floats(0, 1),
    length=st.floats(0.05, 1),
    source=st.integers(2, 40),
    target=st.integers(1, 40),
)
def test_every_pixel_of_a_crop_is_a_mean_of_pixels(start: float, length: float, source: int, target: int) -> None:
    pixels = max(length * source, 1.0)
    weights = resampling(
        torch.tensor([start * (source - pixels)]), torch.tensor([pixels]), source=source, target=target
    )
    assert weights.shape == (1, target, source)
    assert float(weights.min()) >= 0
    torch.testing.assert_close(weights.sum(2), torch.ones(1, target))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_crops_have_their_size_and_range_and_leave_the_images_alone(channels: int) -> None:
    images = pictures(channels=channels)
    before = images.clone()
    found = StrongAugment()(images, generator=child(1))
    assert found.shape == (8, channels, 12, 15)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert torch.equal(images, before)


def test_equal_streams_give_equal_crops_and_others_do_not() -> None:
    images = pictures()
    one, again, other = (StrongAugment()(images, generator=child(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_every_image_is_changed_by_itself() -> None:
    images = pictures()
    others = images.clone()
    others[3] = 1 - others[3]
    one, two = (StrongAugment()(each, generator=child(1)) for each in (images, others))
    is_same = torch.tensor([torch.allclose(a, b, atol=1e-6) for a, b in zip(one, two, strict=True)])
    assert is_same.tolist() == [index != 3 for index in range(8)]
    copies = StrongAugment()(images[:1].expand(8, -1, -1, -1), generator=child(1))
    assert not any(torch.allclose(copies[0], copy, atol=1e-2) for copy in copies[1:])


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_without_strength_nothing_changes(memory: torch.memory_format) -> None:
    images = pictures().contiguous(memory_format=memory)
    torch.testing.assert_close(STILL(images, generator=child(1)), images, atol=1e-5, rtol=0)


def test_flips_are_left_to_right_and_half_of_the_time() -> None:
    images = pictures(400)
    found = replace(STILL, flip=True)(images, generator=child(1))
    is_flipped = torch.tensor([torch.allclose(f, i.flip(2), atol=1e-5) for f, i in zip(found, images, strict=True)])
    is_kept = torch.tensor([torch.allclose(f, i, atol=1e-5) for f, i in zip(found, images, strict=True)])
    assert bool((is_flipped ^ is_kept).all())
    assert 160 < int(is_flipped.sum()) < 240


def test_brightness_and_contrast_are_those_of_torchvision() -> None:
    images = 0.3 + 0.2 * pictures(1)  # so that nothing is cut
    grey = torch.tensor(LUMA)
    for name, apply in (("brightness", TF.adjust_brightness), ("contrast", TF.adjust_contrast)):
        found = replace(STILL, jitter_rate=1.0, **{name: 0.4})(images, generator=child(1))  # type: ignore[arg-type]
        means = [each.mean((2, 3))[0] @ grey for each in (images, found)]
        stds = [each.std() for each in (images, found)]
        factor = float(means[1] / means[0]) if name == "brightness" else float(stds[1] / stds[0])
        assert 0.6 <= factor <= 1.4
        assert abs(factor - 1) > 0.01
        torch.testing.assert_close(found, apply(images, factor), atol=3e-3, rtol=0)


def test_grey_images_are_grey_by_their_luma() -> None:
    images = pictures()
    found = replace(STILL, grey_rate=1.0)(images, generator=child(1))
    luma = torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA))
    torch.testing.assert_close(found, luma[:, None].expand_as(found), atol=1e-5, rtol=0)


def test_hue_and_saturation_keep_the_brightness_and_grey_pixels() -> None:
    images = 0.4 + 0.1 * pictures()
    turned = replace(STILL, jitter_rate=1.0, hue=0.5, saturation=0.4)(images, generator=child(1))
    luma = torch.tensor(LUMA)
    torch.testing.assert_close(
        torch.einsum("bchw,c->bhw", turned, luma), torch.einsum("bchw,c->bhw", images, luma), atol=1e-5, rtol=0
    )
    assert float((turned - images).abs().max()) > 0.02
    grey = images[:, :1].expand_as(images)
    still = replace(STILL, jitter_rate=1.0, hue=0.5, saturation=0.4)(grey, generator=child(1))
    torch.testing.assert_close(still, grey, atol=1e-5, rtol=0)


def test_jitter_leaves_the_rest_of_the_images_alone() -> None:
    images = pictures(400)
    found = replace(STILL, jitter_rate=0.8, brightness=0.4)(images, generator=child(1))
    kept = sum(torch.allclose(f, i, atol=1e-5) for f, i in zip(found, images, strict=True))
    assert 50 < kept < 110


@pytest.mark.parametrize(
    "wrong", [{"side": 0.0}, {"least_area": 1.2}, {"aspect": 0.5}, {"brightness": -0.1}, {"hue": 0.6}, {"grey_rate": 2}]
)
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        StrongAugment(**wrong)  # type: ignore[arg-type]
