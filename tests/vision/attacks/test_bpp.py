"""Quantisation, plain and dithered, its negatives, and a training that it steers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.vision.attacks import Bpp
from lustral.vision.attacks.bpp import QuantiseTrigger, ResidualTrigger, dither, pair_offset, quantise
from lustral.vision.images import as_float, as_uint8
from lustral.vision.victims import implant
from toy import as_batch, toy_images, toy_trainer

SHAPE = (3, 12, 12)


class Recorder(nn.Module):
    """Keeps what it is shown and answers with fixed logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.seen = logits, torch.empty(0)

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return self.logits


def slow_dither(plane: Tensor, levels: int) -> Tensor:
    """Diffuse the error pixel by pixel, as the definition says; (H, W) float64."""
    work = plane.clone()
    height, width = work.shape
    for row in range(height):
        for column in range(width):
            wanted = float(work[row, column])
            found = min(max(round(wanted * (levels - 1)), 0), levels - 1) / (levels - 1)
            work[row, column] = found
            for down, right, sixteenths in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)):
                if row + down < height and 0 <= column + right < width:
                    work[row + down, column + right] += sixteenths / 16 * (wanted - found)
    return work


def test_eight_levels_by_hand() -> None:
    images = torch.tensor([0.0, 0.07, 0.08, 0.5, 0.96, 1.0])
    assert (quantise(images, 8) * 7).tolist() == pytest.approx([0, 0, 1, 4, 7, 7])  # 0.5 * 7 = 3.5 goes to the even one
    greys = as_uint8(quantise(as_float(torch.arange(256, dtype=torch.uint8)), 8))
    assert sorted(set(greys.tolist())) == [
        0, 36, 73, 109, 146, 182, 219, 255,
    ]  # fmt: skip


def test_dithering_by_hand() -> None:
    image = torch.tensor([[[[0.4, 0.4], [0.4, 0.4]]]])
    # 0.4 -> 0, right + 7/16 * 0.4 = 0.575 -> 1 (error -0.425); below 0.4 + 5/16 * 0.4 - 3/16 * 0.425 = 0.445 -> 0;
    # last 0.4 + 1/16 * 0.4 - 5/16 * 0.425 + 7/16 * 0.445 = 0.487 -> 0
    assert dither(image, 2).flatten().tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("levels", [2, 3, 8])
@pytest.mark.parametrize("shape", [(5, 7), (7, 4), (1, 6), (6, 1), (12, 12)])
def test_dithering_equals_the_slow_form(levels: int, shape: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *shape, generator=child(levels), dtype=torch.float64)
    slow = torch.stack([slow_dither(plane, levels) for plane in images.flatten(0, 1)]).view_as(images)
    assert torch.equal(dither(images, levels), slow)


def test_dithering_keeps_the_mean_that_rounding_loses() -> None:
    grey = torch.full((1, 1, 16, 16), 0.55)
    assert float(quantise(grey, 8).mean()) == pytest.approx(4 / 7)
    assert float(dither(grey, 8).mean()) == pytest.approx(0.55, abs=0.01)


def test_the_residual_of_another_image_by_hand() -> None:
    images = torch.tensor([0.5, 0.3, 0.98]).view(3, 1, 1, 1)
    trigger = ResidualTrigger(quantiser=QuantiseTrigger(levels=2, dithered=False))
    # None pairs image i with image i + 1: residuals -0.3 of 0.3, +0.02 of 0.98, -0.5 of 0.5 (0.5 goes to the even level, 0)
    assert trigger(images).flatten().tolist() == pytest.approx([0.2, 0.32, 0.48])
    bright = torch.tensor([0.9, 0.6]).view(2, 1, 1, 1)
    assert trigger(bright).flatten().tolist() == pytest.approx([1.0, 0.7])  # 0.9 + 0.4 is clipped


def test_nobody_is_paired_with_himself() -> None:
    stream = child(0)
    drawn = {pair_offset(5, stream) for _ in range(200)}
    assert drawn == {1, 2, 3, 4}
    assert pair_offset(5, None) == 2
    assert pair_offset(2, stream) == 1
    assert pair_offset(1, stream) == 0  # nobody else is there


@pytest.mark.parametrize("dithered", [False, True])
def test_a_batch_is_poisoned_negated_and_left_clean_in_order(dithered: bool) -> None:
    attack = Bpp(target_label=4, poison_rate=0.2, negative_rate=0.3, levels=4, dithered=dithered)
    clean = toy_images(10, seed=5)
    images, labels = as_float(clean.images), clean.labels
    model = Recorder(torch.randn(10, 7, generator=child(0)))
    loss = attack.steer(clean, augment=None, generator=child(1)).objective(model, as_batch(images, labels), child(2))
    trigger = attack.trigger(SHAPE)
    assert torch.equal(model.seen[:2], as_float(as_uint8(trigger(images[:2]))))
    assert torch.equal(model.seen[5:], images[5:])
    residuals = trigger(images) - images
    for index in range(2, 5):
        made = [as_float(as_uint8((images[index] + residual).clamp(0, 1))) for residual in residuals]
        (donor,) = (other for other, candidate in enumerate(made) if torch.equal(candidate, model.seen[index]))
        assert donor != index
    expected = torch.cat([torch.tensor([4, 4]), labels[2:]])
    assert float(loss) == pytest.approx(float(F.cross_entropy(model.logits, expected)))


def test_the_static_form_has_exact_counts_and_a_cover() -> None:
    clean = toy_images(70, seed=5)
    attack = Bpp(target_label=2, poison_rate=0.1, negative_rate=0.2)
    poisoned = attack.poison(clean, generator=child(0))
    assert poisoned.is_cover is not None
    chosen, cover = poisoned.is_poisoned, poisoned.is_cover
    assert (int(chosen.sum()), int(cover.sum()), int((chosen & cover).sum())) == (7, 14, 0)
    stamped = as_uint8(attack.trigger(SHAPE)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert len(set(poisoned.data.images[chosen].flatten().tolist())) <= 8
    assert set(poisoned.data.labels[chosen].tolist()) == {2}
    assert torch.equal(poisoned.data.labels[~chosen], clean.labels[~chosen])
    assert torch.equal(poisoned.data.images[~chosen & ~cover], clean.images[~chosen & ~cover])
    moved = (poisoned.data.images[cover].int() - clean.images[cover].int()).abs()
    assert 10 < int(moved.max()) <= 19  # half a level is 18.2


def test_training_implants_the_levels() -> None:
    metrics = implant(
        Bpp(target_label=4, levels=3, negative_rate=0.05),
        toy_images(1400, seed=0),
        toy_images(420, seed=1),
        arch="small_cnn:width=16",
        trainer=toy_trainer(),
        seed=0,
        data_name="toy",
    ).metrics
    assert metrics["acc"]["value"] > 0.95
    assert metrics["asr"]["value"] > 0.8
    assert metrics["probes"]["negative_accuracy"]["value"] > 0.5


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 2.0}, r"poison rate in \(0, 1\].*got 2.0"),
        ({"negative_rate": 0.95}, r"negative rate in \[0, 0.9\], what a poison rate of 0.1 leaves; got 0.95"),
        ({"levels": 1}, r"2 \.\. 128 levels per channel; got 1"),
        ({"levels": 256}, r"2 \.\. 128 levels per channel; got 256"),
        ({"mode": "some_to_one"}, "mode to be one of all_to_one, all_to_all"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Bpp(**wrong)
