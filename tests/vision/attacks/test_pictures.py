"""Patches, and the two ways of stamping."""

from __future__ import annotations

import pytest
import torch

from lustral.core.randomness import child
from lustral.vision.attacks.pictures import Addition, Overlay, draw_patch, patch_side


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [1, 2, 3, 4, 8, 13])
def test_half_of_a_patchs_cells_are_lit_in_every_channel(channels: int, side: int) -> None:
    patch = draw_patch(channels, side, 0)
    assert patch.shape == (channels, side, side)
    assert set(patch.flatten().tolist()) <= {0.0, 1.0}
    cells = min(side, 4)
    corner = torch.arange(cells) * side // cells + (side % cells > 0)  # some pixel of each cell
    lit = patch[:, corner[:, None], corner].sum((1, 2))
    assert lit.tolist() == [(cells * cells + 1) // 2] * channels


def test_a_large_patch_is_a_small_one_in_larger_cells() -> None:
    small, large = draw_patch(3, 4, 7), draw_patch(3, 8, 7)
    assert torch.equal(large, small.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_patches_follow_their_seed_and_name() -> None:
    patch = draw_patch(3, 4, 0, "a", 1)
    assert torch.equal(patch, draw_patch(3, 4, 0, "a", 1))
    assert not torch.equal(patch, draw_patch(3, 4, 1, "a", 1))
    assert not torch.equal(patch, draw_patch(3, 4, 0, "a", 2))
    assert not torch.equal(patch[0], patch[1])  # colours, not greys


@pytest.mark.parametrize(
    ("shape", "share", "side"), [((3, 64, 64), 0.25, 16), ((3, 12, 20), 0.25, 3), ((1, 8, 8), 0.1, 2)]
)
def test_a_patch_grows_with_the_image(shape: tuple[int, int, int], share: float, side: int) -> None:
    assert patch_side(shape, share) == side


def test_tiny_images_have_no_room_for_a_patch() -> None:
    with pytest.raises(ValueError, match="at least 4x4 pixels for a patch; got 3x9"):
        patch_side((1, 3, 9), 0.25)


def test_an_overlay_by_hand() -> None:
    trigger = Overlay(pattern=torch.tensor([[[1.0, 0.0, 1.0]]]), opacity=torch.tensor([[[0.25, 0.75, 0.0]]]))
    out = trigger(torch.tensor([[[[0.6, 0.6, 0.6]]], [[[0.0, 1.0, 0.3]]]]))
    assert out.flatten().tolist() == pytest.approx([0.7, 0.15, 0.6, 0.25, 0.25, 0.3])


def test_an_opaque_overlay_shows_the_pattern_exactly() -> None:
    pattern = torch.rand(3, 5, 5, generator=child(0))
    trigger = Overlay(pattern=pattern, opacity=torch.ones(1, 5, 5))
    assert torch.equal(trigger(torch.rand(1, 3, 5, 5, generator=child(1)))[0], pattern)


def test_an_addition_by_hand() -> None:
    trigger = Addition(pattern=torch.tensor([[[0.2, -0.2, 0.2, -0.2]]]))
    images = torch.tensor([[[[0.5, 0.5, 0.9, 0.1]]]])
    assert trigger(images).flatten().tolist() == pytest.approx([0.7, 0.3, 1.0, 0.0])
    assert images.flatten().tolist() == pytest.approx([0.5, 0.5, 0.9, 0.1])
