"""Warping: the field, the shifts, the noise mode, and a training that it steers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.vision.attacks import WaNet
from lustral.vision.attacks.wanet import WarpTrigger, draw_field, sampling_grid
from lustral.vision.images import as_float, as_uint8
from lustral.vision.records import ImageSet
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


def shifted(images: Tensor, pixels: float) -> Tensor:
    """Warp with a constant field that fetches every pixel from ``pixels`` further right."""
    _, _, height, width = images.shape
    field = torch.zeros(height, width, 2)
    field[:, :, 0] = 2 * pixels / (width - 1) * width
    return WarpTrigger(grid=sampling_grid(field, strength=1.0, rescale=1.0))(images)


def test_a_constant_field_shifts_by_hand() -> None:
    row = torch.tensor([[[[0.0, 0.2, 0.8, 0.4]]]]).expand(1, 1, 3, 4)
    assert shifted(row, 0)[0, 0, 1].tolist() == pytest.approx([0.0, 0.2, 0.8, 0.4])
    assert shifted(row, 1)[0, 0, 1].tolist() == pytest.approx([0.2, 0.8, 0.4, 0.4])  # the last one lies on the edge
    assert shifted(row, 0.5)[0, 0, 1].tolist() == pytest.approx([0.1, 0.5, 0.6, 0.4])
    assert shifted(row, -0.25)[0, 0, 1].tolist() == pytest.approx([0.0, 0.15, 0.65, 0.5])


def test_the_first_axis_of_the_field_is_horizontal() -> None:
    field = torch.zeros(3, 3, 2)
    field[:, :, 1] = 3.0  # one pixel: 2 / (side - 1) * side
    image = torch.tensor([[[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]]]])
    out = WarpTrigger(grid=sampling_grid(field, strength=1.0, rescale=1.0))(image)
    assert out[0, 0].flatten().tolist() == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.7, 0.8, 0.9])


def test_the_field_has_mean_size_one_at_its_control_points() -> None:
    field = draw_field((3, 4, 4), control_points=4, seed=3)  # as many pixels as points: nothing lies in between
    assert float(field.abs().mean()) == pytest.approx(1.0)
    assert not torch.equal(field, draw_field((3, 4, 4), control_points=4, seed=4))
    large = draw_field((3, 31, 31), control_points=4, seed=3)
    assert torch.allclose(large[::10, ::10], field, atol=1e-5)  # the corners are aligned
    assert float((large[1:] - large[:-1]).abs().max()) < 0.4  # and it is smooth


@pytest.mark.parametrize("side", [32, 64])
def test_pixels_move_by_a_quarter_of_a_pixel_at_any_resolution(side: int) -> None:
    flat = sampling_grid(torch.zeros(side, side, 2), strength=0.5, rescale=1.0)
    for seed in range(3):
        grid = WaNet(field_seed=seed).trigger((3, side, side)).grid
        pixels = (grid - flat).abs() * (side - 1) / 2
        assert 0.12 < float(pixels.mean()) < 0.3
        assert float(grid.abs().max()) <= 1


def test_the_warp_is_precise_after_rounding() -> None:
    images = as_float(toy_images(40, seed=3).images)
    trigger = WaNet().trigger(SHAPE)
    single, double = trigger(images), trigger(images.double())
    assert float((single - double).abs().max()) < 2e-6
    changed = as_uint8(single) != as_uint8(double)
    assert float(changed.float().mean()) < 1e-3  # ties only
    narrow = images.bfloat16()
    assert float((trigger(narrow).float() - trigger(narrow.float())).abs().max()) <= 2**-9  # half a step below 1
    assert float((as_uint8(single) != as_uint8(images)).float().mean()) > 0.5


def test_noise_is_drawn_for_every_image_and_pixel() -> None:
    trigger = WarpTrigger(grid=WaNet().trigger(SHAPE).grid, noisy=True)
    images = torch.rand(1, *SHAPE, generator=child(0)).expand(3, -1, -1, -1)
    out = trigger(images, generator=child(1))
    assert torch.equal(out, trigger(images, generator=child(1)))
    assert not torch.equal(out[0], out[1])
    assert torch.equal(trigger(images), trigger(images))
    ramp = torch.linspace(0, 1, 12).expand(1, 1, 12, 12)  # tells by how much each pixel moved sideways
    smooth, noisy = (WarpTrigger(grid=trigger.grid, noisy=noisy)(ramp) for noisy in (False, True))
    pixels = (noisy - smooth)[..., 2:-2] * 11
    assert 0.4 < float(pixels.abs().max()) <= 11 / 12 / 2 + 1e-4  # 1 / side of a range of 2
    assert abs(float(pixels.mean())) < 0.1


def test_a_batch_is_poisoned_noised_and_left_clean_in_order() -> None:
    attack = WaNet(target_label=4, poison_rate=0.2, noise_rate=0.4)
    clean = toy_images(10, seed=5)
    images, labels = as_float(clean.images), clean.labels
    model = Recorder(torch.randn(10, 7, generator=child(0)))
    steering = attack.steer(clean, augment=None, generator=child(1))
    loss = steering.objective(model, as_batch(images, labels), child(2))
    warped = as_float(as_uint8(attack.trigger(SHAPE)(images)))
    assert torch.equal(model.seen[:2], warped[:2])
    assert torch.equal(model.seen[6:], images[6:])
    assert bool((model.seen[2:6] != images[2:6]).flatten(1).any(1).all())
    assert bool((model.seen[2:6] != warped[2:6]).flatten(1).any(1).all())
    distances = (model.seen[2:6, None] - images[None]).abs().mean((2, 3, 4))
    assert distances.argmin(1).tolist() == [2, 3, 4, 5]  # each at the place of its label
    assert torch.equal(as_float(as_uint8(model.seen)), model.seen)
    expected = torch.cat([torch.tensor([4, 4]), labels[2:]])
    assert float(loss) == pytest.approx(float(F.cross_entropy(model.logits, expected)))
    assert steering.companions == ()


def test_augmentation_follows_stamping() -> None:
    attack = WaNet(poison_rate=0.5, noise_rate=0.5)
    clean = toy_images(8, seed=5)
    seen: list[Tensor] = []

    def augment(images: Tensor, *, generator: Generator) -> Tensor:
        seen.append(images)
        return 1 - images

    model = Recorder(torch.zeros(8, 7))
    steering = attack.steer(clean, augment=augment, generator=child(1))
    images = as_float(clean.images)
    steering.objective(model, as_batch(images, clean.labels), child(2))
    assert torch.equal(seen[0][:4], as_float(as_uint8(attack.trigger(SHAPE)(images[:4]))))
    assert torch.equal(model.seen, 1 - seen[0])


def test_rates_hold_on_average_below_one_image_a_batch() -> None:
    attack = WaNet(poison_rate=0.02, noise_rate=0.0, strength=1.0)
    clean = toy_images(10, seed=5)
    images = as_float(clean.images)
    warped = as_float(as_uint8(attack.trigger(SHAPE)(images)))
    model = Recorder(torch.zeros(10, 7))
    objective, stream = attack.steer(clean, augment=None, generator=child(1)).objective, child(2)
    count = 0
    for _ in range(600):
        objective(model, as_batch(images, clean.labels), stream)
        assert torch.equal(model.seen[1:], images[1:])
        count += torch.equal(model.seen[0], warped[0])
    assert 90 < count < 150  # 600 batches of 10 images, 2 %


def test_the_static_form_has_exact_counts_and_a_cover() -> None:
    clean = toy_images(70, seed=5)
    attack = WaNet(target_label=2, poison_rate=0.1, noise_rate=0.2)
    poisoned = attack.poison(clean, generator=child(0))
    assert poisoned.is_cover is not None
    chosen, cover = poisoned.is_poisoned, poisoned.is_cover
    assert (int(chosen.sum()), int(cover.sum()), int((chosen & cover).sum())) == (7, 14, 0)
    stamped = as_uint8(attack.trigger(SHAPE)(as_float(clean.images)))
    assert torch.equal(poisoned.data.images[chosen], stamped[chosen])
    assert set(poisoned.data.labels[chosen].tolist()) == {2}
    assert torch.equal(poisoned.data.labels[~chosen], clean.labels[~chosen])
    assert bool((poisoned.data.images[cover] != stamped[cover]).flatten(1).any(1).all())
    assert torch.equal(poisoned.data.images[~chosen & ~cover], clean.images[~chosen & ~cover])


def test_training_implants_the_warp_and_not_warping() -> None:
    victims = [
        implant(
            WaNet(target_label=4, noise_rate=noise_rate, strength=1.0),
            toy_images(1400, seed=0),
            toy_images(420, seed=1),
            arch="small_cnn:width=16",
            trainer=toy_trainer(),
            seed=0,
            data_name="toy",
        ).metrics
        for noise_rate in (0.2, 0.0)
    ]
    steered = victims[0]
    assert steered["acc"]["value"] > 0.95
    assert steered["asr"]["value"] > 0.9
    taught, untaught = (metrics["probes"]["noise_accuracy"]["value"] for metrics in victims)
    assert taught > 0.9
    assert untaught < taught - 0.1  # over three seeds 0.21 to 0.63, and 0.99


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 0.0}, r"poison rate in \(0, 1\].*got 0.0"),
        ({"noise_rate": 0.95}, r"noise rate in \[0, 0.9\], what a poison rate of 0.1 leaves; got 0.95"),
        ({"noise_rate": -0.1}, r"noise rate in \[0, 0.9\].*got -0.1"),
        ({"strength": 0.0}, "strength > 0.*got 0.0, 4 and 1.0"),
        ({"control_points": 1}, "control_points >= 2.*got 0.5, 1 and 1.0"),
        ({"rescale": 1.5}, r"rescale in \(0, 1\]; got 0.5, 4 and 1.5"),
        ({"mode": "some_to_one"}, "mode to be one of all_to_one, all_to_all"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WaNet(**wrong)


def test_what_the_data_cannot_bear_is_refused() -> None:
    clean = ImageSet(images=torch.zeros(20, 1, 4, 4, dtype=torch.uint8), labels=torch.arange(20) % 5, num_classes=5)
    with pytest.raises(ValueError, match="poisons none"):
        WaNet(poison_rate=0.01).require_possible(clean)
    with pytest.raises(ValueError, match=r"target label in 0 \.\. 4; got 5"):
        WaNet(target_label=5).require_possible(clean)
    with pytest.raises(ValueError, match=r"images of 12x12, as the grid; got \(2, 1, 4, 4\)"):
        WaNet().trigger(SHAPE)(torch.zeros(2, 1, 4, 4))
