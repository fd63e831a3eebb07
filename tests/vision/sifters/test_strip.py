"""STRIP: entropies by the plain formula, overlays by content, and its two uses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.records import DefenderView, ImageSet, Victim
from lustral.vision.sifters import Strip
from lustral.vision.sifters.strip import mean_entropy, overlay_indices
from toy import clean_images, toy_images
from vision.sifters.worlds import auroc, training_view


class Sums(nn.Module):
    """Answers by the brightness of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(1, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(images.mean((1, 2, 3))[:, None])
        return logits


def test_the_entropy_is_that_of_the_plain_formula() -> None:
    model, stream = Sums().eval(), child(0)
    images, overlays = torch.rand(4, 3, 5, 5, generator=stream), torch.rand(3, 3, 5, 5, generator=stream)
    with torch.no_grad():
        found = mean_entropy(model, images, overlays, 0.7)
        for i, image in enumerate(images):
            total = 0.0
            for overlay in overlays:
                mixed = torch.clamp(image + 0.7 * overlay, max=1.0)
                for p in model(mixed[None]).softmax(1)[0].tolist():
                    total -= p * math.log2(p) / 3
            assert float(found[i]) == pytest.approx(total, rel=2e-2)
    assert float(found.max()) <= math.log2(3) + 1e-4


def test_a_sure_answer_has_no_entropy() -> None:
    model = Sums()
    nn.init.constant_(model.head.weight, 0)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([200.0, 0, -200]))
        assert mean_entropy(model, torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4), 1.0).tolist() == [0.0, 0.0]


def test_overlays_are_chosen_by_content() -> None:
    data = toy_images(90, seed=0)
    order = torch.randperm(90, generator=child(1))
    chosen = overlay_indices(data, 8, generator=child(2))
    again = overlay_indices(data.subset(order), 8, generator=child(2))
    assert torch.equal(order[again], chosen)
    assert len(set(chosen.tolist())) == 8
    assert not torch.equal(overlay_indices(data, 8, generator=child(3)), chosen)
    assert sorted(overlay_indices(data.subset(torch.arange(3)), 8, generator=child(2)).tolist()) == [0, 1, 2]


def as_inputs(data: ImageSet) -> Tensor:
    return data.images.float() / 255


def test_triggered_inputs_of_a_backdoored_network_stand_out(backdoored: Victim) -> None:
    view = DefenderView(model=backdoored.model, clean=clean_images())
    fresh = as_inputs(toy_images(140, seed=9))
    stamped = backdoored.trigger(fresh, generator=child(1))
    both = torch.cat([fresh, stamped])
    scores = Strip(weight=0.5).score(view, both, generator=child(0))
    assert scores.shape == (280,)
    assert scores.dtype == torch.float32
    assert auroc(scores, torch.arange(280) >= 140) > 0.7
    torch.testing.assert_close(
        Strip(weight=0.5).score(view, both[:9], generator=child(0)), scores[:9], atol=1e-3, rtol=1e-3
    )
    assert Strip().score(view, both[:0], generator=child(0)).shape == (0,)


def test_inputs_need_clean_images_to_lay_over(backdoored: Victim) -> None:
    none = clean_images().subset(torch.tensor([], dtype=torch.int64))
    with pytest.raises(ValueError, match="clean set is empty"):
        Strip().score(DefenderView(model=backdoored.model, clean=none), torch.rand(2, 3, 12, 12), generator=child(0))


def test_passes_are_as_many_as_overlays(backdoored: Victim) -> None:
    view = training_view(backdoored)
    cost = Strip(num_overlays=3).sift(view, generator=child(0)).cost
    assert cost.image_passes == pytest.approx(3 * len(view.untrusted) / 3)
    view = training_view(backdoored, clean=clean_images())
    cost = Strip(num_overlays=3).sift(view, generator=child(0)).cost
    assert cost.image_passes == pytest.approx(
        len(view.untrusted) + 280 - 3
    )  # overlays are not compared with themselves


@pytest.mark.parametrize("settings", [{"num_overlays": 0}, {"weight": 0.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected at least 1 overlay"):
        Strip(**settings)  # type: ignore[arg-type]
