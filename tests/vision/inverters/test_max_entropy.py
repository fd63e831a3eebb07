"""The staircase of generators, part by part and as a whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from lustral.core.randomness import child
from lustral.vision.inverters import MaxEntropy
from lustral.vision.inverters.max_entropy import (
    NOISE_DIM,
    GroupedLinear,
    StatisticsNetwork,
    TriggerGenerator,
    firing_rate,
    hinge,
    measure_places,
    mutual_information,
    sample_spread,
    shifted,
)
from lustral.vision.records import DefenderView, ImageSet, RecoveredTrigger
from toy import quick_inverter, toy_images


def test_mutual_information_by_hand() -> None:
    joint, marginal = torch.tensor([[1.0, 3.0]]), torch.tensor([[math.log(2.0), math.log(4.0)]])
    assert mutual_information(joint, marginal).tolist() == pytest.approx([2.0 - math.log(3.0)])
    constant = torch.full((4,), 0.7)
    assert float(mutual_information(constant, constant)) == pytest.approx(0.0, abs=1e-6)


def test_hinge_by_hand() -> None:
    probability = torch.tensor([[0.2, 0.5, 0.9], [0.2, 0.5, 0.9]])
    short = hinge(probability, torch.tensor([0.5, 0.8]))
    assert short.tolist() == [pytest.approx([0.3, 0.0, 0.0]), pytest.approx([0.6, 0.3, 0.0])]


def test_a_sample_at_its_level_takes_no_gradient() -> None:
    probability = torch.tensor([[0.4, 0.6]], requires_grad=True)
    hinge(probability, torch.tensor([0.5])).sum().backward()
    assert probability.grad is not None
    assert probability.grad.tolist() == [[-1.0, 0.0]]


def test_shifted_equals_a_slow_loop() -> None:
    x = torch.rand(6, 2, 5, 7, generator=child(0))
    rows, columns = torch.tensor([0, 1, -2, 4, -5, 0]), torch.tensor([0, -3, 2, 6, 0, 7])
    expected = torch.zeros_like(x)
    for index in range(6):
        for row in range(5):
            for column in range(7):
                r, c = row - int(rows[index]), column - int(columns[index])
                if 0 <= r < 5 and 0 <= c < 7:
                    expected[index, :, row, column] = x[index, :, r, c]
    assert torch.equal(shifted(x, rows, columns), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_grouped_linear_equals_separate_layers(bias: bool) -> None:
    grouped = GroupedLinear(3, 4, 5, bias=bias)
    x = torch.rand(3, 6, 4, generator=child(0))
    for group in range(3):
        layer = nn.Linear(4, 5, bias=bias)
        with torch.no_grad():
            layer.weight.copy_(grouped.weight[group].T)
            if bias:
                assert grouped.bias is not None
                layer.bias.copy_(grouped.bias[group, 0])
        assert torch.allclose(grouped(x)[group], layer(x[group]), atol=1e-6)
    assert grouped.weight.abs().max().item() <= 4**-0.5


def test_groups_do_not_see_each_other() -> None:
    z = torch.rand(2, 8, NOISE_DIM, generator=child(0))
    other = z.clone()
    other[1] = 0.5 + 0.1 * other[1]
    maker, judge = TriggerGenerator(2, 16, 5), StatisticsNetwork(2, 16, 5)
    triggers = maker(z)
    assert triggers.shape == (2, 8, 5)
    assert torch.allclose(maker(other)[0], triggers[0], atol=1e-5)
    assert not torch.allclose(maker(other)[1], triggers[1], atol=1e-3)
    scores = judge(z, triggers.detach())
    assert scores.shape == (2, 8)
    assert torch.allclose(judge(other, triggers.detach())[0], scores[0], atol=1e-5)


def test_sample_spread_by_hand() -> None:
    masks, patterns = torch.zeros(2, 1, 2, 2), torch.ones(2, 3, 2, 2)
    assert sample_spread(masks, patterns) == 0.0
    masks[1, 0, 0, 0] = 1  # one white pixel on one sample only: differences of 1 in the mask and in 3 channels
    assert sample_spread(masks, patterns) == pytest.approx(math.sqrt(4 / 3))
    assert sample_spread(masks[:1], patterns[:1]) == 0.0


def test_sample_spread_looks_at_the_samples_of_every_level() -> None:
    masks = torch.ones(384, 1, 2, 2)
    patterns = torch.zeros(384, 3, 2, 2)
    patterns[128:256], patterns[256:] = 0.5, 1.0  # level after level, equal within each
    assert sample_spread(masks[:128], patterns[:128]) == 0.0
    # of 128 from all over, a third each: distances 0, 1 and 2 at 3/9, 4/9 and 2/9 of the pairs, sqrt(4 * 0.25) each step
    assert sample_spread(masks, patterns) == pytest.approx(8 / 9, rel=0.02)


def test_samples_are_a_distribution_that_fires(toy_view: DefenderView) -> None:
    apart = toy_images(140, seed=9)
    (trigger,) = quick_inverter().invert(toy_view, [4], held_out=apart, generator=child(0))
    assert trigger.target_label == 4
    assert trigger.masks.shape == (48, 1, 12, 12)
    assert trigger.patterns.shape == (48, 3, 12, 12)
    for tensor in (trigger.masks, trigger.patterns):
        assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
        assert not tensor.requires_grad
    assert trigger.attack_success_rate > 0.5
    assert trigger.attack_success_rate == firing_rate(toy_view.model, apart, trigger)
    assert 0 < trigger.entropy < math.inf
    assert trigger.area < 12
    stamped = trigger(torch.full((48, 3, 12, 12), 0.5))
    assert len({tuple(image.flatten().tolist()) for image in stamped}) == 48


def test_entropy_weight_does_nothing_to_learned_triggers(toy_view: DefenderView) -> None:
    # measured over four seeds: 0.2 % at most, where the spread of a seed differs by 0.8 % from another's
    spreads = []
    start = None
    for weight in (0.0, 1.0):
        inverter = quick_inverter(steps=30, entropy_weight=weight, levels=(0.5,), batch_size=32, precision="float32")
        start = start or inverter.search.run(toy_view.model, toy_view.clean, [4], generator=child(1))
        (trigger,) = inverter.fit_generators(
            toy_view.model, toy_view.clean, [4], start, held_out=toy_view.clean, generator=child(2)
        )
        spreads.append(trigger.entropy)
    assert spreads[0] > 1
    assert spreads[1] == pytest.approx(spreads[0], rel=0.05)


class AnyBrightPixel(nn.Module):
    """Calls an image class 1 when its brightest number is above 0.7: many patches fire, wherever they are."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logit = 20 * (x.flatten(1).amax(1) - 0.7)
        return torch.stack([-logit, logit], 1)


def test_entropy_weight_spreads_the_published_patches() -> None:
    # measured over four seeds: 0.36 to 0.38 without, 0.73 to 0.86 with it; all of them fire
    def spread(weight: float, seed: int) -> float:
        inverter = quick_inverter(
            operator="random_patch",
            steps=150,
            batch_size=32,
            learning_rate=3e-3,
            levels=(0.5,),
            entropy_weight=weight,
            precision="float32",
        )
        view = marked(40, 30)
        (trigger,) = inverter.fit_generators(
            AnyBrightPixel(), view, [1], None, held_out=view, generator=child(seed, "patches")
        )
        assert trigger.attack_success_rate > 0.7
        patches = [p[:, m[0] > 0].flatten() for p, m in zip(trigger.patterns, trigger.masks, strict=True)]
        return float(torch.pdist(torch.stack(patches)).mean()) / math.sqrt(3)

    without, strong = ([spread(weight, seed) for seed in (0, 1)] for weight in (0.0, 10.0))
    assert min(strong) > 1.4 * max(without)


def estimated_information(size: float, steps: int = 150) -> float:
    """Return what the statistics network makes of triggers whose numbers vary by ``size``, each a sum of the noise."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge = StatisticsNetwork(1, 64, 27)
        mixing = torch.randn(NOISE_DIM, 27) / math.sqrt(NOISE_DIM / 12)  # of uniform noise: variance 1
        step = torch.optim.Adam(judge.parameters(), 1e-3, betas=(0.5, 0.999))
        for _ in range(steps):
            z, other = torch.rand(2, 1, 64, NOISE_DIM).unbind()
            triggers = size * (z - 0.5) @ mixing
            loss = -mutual_information(judge(z, triggers), judge(other, triggers)).sum()
            step.zero_grad()
            loss.backward()
            step.step()
        z, other = torch.rand(2, 1, 1024, NOISE_DIM).unbind()
        triggers = size * (z - 0.5) @ mixing
        with torch.no_grad():
            return float(mutual_information(judge(z, triggers), judge(other, triggers)))


def test_the_statistics_network_is_blind_to_triggers_that_vary_little() -> None:
    # why: learned triggers vary by 0.001 a pixel on average, by 0.07 at most
    assert estimated_information(0.01) < 0.1
    assert estimated_information(0.3) > 1


class KnowsTheSearchImages(nn.Module):
    """Calls an image class 1 when its first pixel is bright, but only those whose last pixel tells that it was searched on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logit = 20 * (x[:, 0, 0, 0] - 0.5) - 100 * (x[:, 0, -1, -1] < 0.3)
        return torch.stack([-logit, logit], 1)


def marked(count: int, mark: int) -> ImageSet:
    images = torch.full((count, 3, 12, 12), 30, dtype=torch.uint8)
    images[:, :, -1, -1] = mark
    return ImageSet(images=images, labels=torch.arange(count) % 2, num_classes=2)


def test_success_is_measured_on_images_that_nothing_was_searched_on() -> None:
    view = DefenderView(model=KnowsTheSearchImages(), clean=marked(40, 200))
    (trigger,) = quick_inverter(levels=(0.5,)).invert(view, [1], held_out=marked(40, 0), generator=child(0))
    assert firing_rate(view.model, view.clean, trigger) > 0.9
    assert trigger.attack_success_rate < 0.1


def test_without_held_out_images_some_of_the_views_are_kept_from_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    clean = marked(40, 200)
    clean.images[:, 0, 0, 0] = torch.arange(40)  # tells each image from the others
    seen: dict[str, set[int]] = {}

    def note(
        self: MaxEntropy, model: nn.Module, images: ImageSet, *rest: object, held_out: ImageSet, **_: object
    ) -> Any:
        seen.update(searched=set(images.images[:, 0, 0, 0].tolist()), held=set(held_out.images[:, 0, 0, 0].tolist()))
        return []

    monkeypatch.setattr(MaxEntropy, "fit_generators", note)
    view = DefenderView(model=KnowsTheSearchImages(), clean=clean)
    quick_inverter(operator="random_patch", holdout=0.25).invert(view, [1], generator=child(0))
    assert len(seen["held"]) == 10
    assert seen["held"].isdisjoint(seen["searched"])
    assert seen["held"] | seen["searched"] == set(range(40))


def test_several_labels_share_a_batch(toy_view: DefenderView) -> None:
    inverter = quick_inverter(steps=2)
    triggers = inverter.invert(toy_view, [4, 0], generator=child(0))
    assert [trigger.target_label for trigger in triggers] == [4, 0]
    unused = toy_view.clean
    assert inverter.fit_generators(toy_view.model, unused, [], None, held_out=unused, generator=child(0)) == []


def test_the_published_operator_pastes_whole_patches(toy_view: DefenderView) -> None:
    inverter = quick_inverter(operator="random_patch", patch_size=3, steps=4)
    (trigger,) = inverter.invert(toy_view, [4], generator=child(0))
    assert bool(((trigger.masks == 0) | (trigger.masks == 1)).all())
    places = set()
    for mask in trigger.masks[:, 0]:
        rows, columns = mask.nonzero().unbind(1)
        assert len(rows) == 9
        top, left = int(rows.min()), int(columns.min())
        assert bool((mask[top : top + 3, left : left + 3] == 1).all())
        places.add((top, left))
    assert len(places) > 20  # of 100
    assert trigger.area == 9.0


def one_patch(row: int, column: int, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., row : row + size, column : column + size] = 1
    return mask, torch.ones(1, 3, 12, 12)


def test_places_of_a_fixed_patch_are_found(toy_view: DefenderView) -> None:
    mask, pattern = one_patch(5, 5)  # the true patch, misplaced: it belongs to rows and columns 10 and 11
    shifts, rates = measure_places(toy_view.model, toy_view.clean, 4, mask, pattern, generator=child(0))
    assert shifts[0].tolist() == [0, 0]
    assert shifts.shape == (len(rates), 2)
    by_shift = {(r, c): rate for (r, c), rate in zip(shifts.tolist(), rates.tolist(), strict=True)}
    assert by_shift[(5, 5)] >= 0.75
    fires_at = [shift for shift, rate in by_shift.items() if rate >= 0.75]
    assert len(fires_at) < 0.35 * len(by_shift)
    assert sum(r + c for r, c in fires_at) / len(fires_at) > 5  # towards the corner


class FirstPixel(nn.Module):
    """Calls an image class 1 when its first pixel is bright."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lit = (x[:, 0, 0, 0] > 0.5).float()
        return torch.stack([1 - lit, lit], 1)


def grey_view() -> DefenderView:
    images = torch.full((20, 3, 12, 12), 50, dtype=torch.uint8)
    return DefenderView(model=FirstPixel(), clean=ImageSet(images=images, labels=torch.arange(20) % 2, num_classes=2))


def test_places_by_hand() -> None:
    view = grey_view()
    mask, pattern = one_patch(6, 4)
    shifts, rates = measure_places(view.model, view.clean, 1, mask, pattern, generator=child(0))
    expected = [float(r in (-6, -7) and c in (-4, -5)) for r, c in shifts.tolist()]
    assert rates.tolist() == expected
    assert sum(expected) >= 1


def test_firing_rate_by_hand() -> None:
    view = grey_view()
    mask, pattern = one_patch(0, 0)
    figures: dict[str, Any] = {"target_label": 1, "area": 4.0, "attack_success_rate": 0.0, "entropy": 0.0}
    full = RecoveredTrigger(masks=mask, patterns=pattern, **figures)
    assert firing_rate(view.model, view.clean, full) == 1.0
    none = RecoveredTrigger(masks=0 * mask, patterns=pattern, **figures)
    assert firing_rate(view.model, view.clean, none) == 0.0


def test_firing_rate_looks_at_all_classes_of_an_ordered_set() -> None:
    images = torch.full((1200, 3, 12, 12), 50, dtype=torch.uint8)
    images[600:] = 110  # bright enough that a third of white makes FirstPixel call it class 1; the first class is not
    labels = torch.tensor([0, 2]).repeat_interleave(600)
    mask, pattern = one_patch(0, 0)
    faint = RecoveredTrigger(
        masks=0.35 * mask, patterns=pattern, target_label=1, area=1.4, attack_success_rate=0.0, entropy=0.0
    )
    rate = firing_rate(FirstPixel(), ImageSet(images=images, labels=labels, num_classes=3), faint)
    assert rate == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "wrong",
    [
        {"levels": ()},
        {"levels": (1.5,)},
        {"steps": 0},
        {"batch_size": 1},
        {"samples": 2},
        {"hidden": 0},
        {"holdout": 0.0},
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        MaxEntropy(**wrong)
