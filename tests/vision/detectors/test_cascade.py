"""A first look, two searches, one answer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.detectors import Cascade
from lustral.vision.detectors.cascade import ODD_FACTOR, SEARCHES, TWO_DOUBTS, Look
from lustral.vision.detectors.latent_look import error_weights, latent_norms, least_steps, margins, oddities
from lustral.vision.detectors.size_search import SizeSearch
from lustral.vision.detectors.weighing import SearchedLabel
from lustral.vision.inverters import MaskSearch
from lustral.vision.inverters.mask_search import FoundMasks
from lustral.vision.measures import CHANGE_ENERGY, LATENT_NORM, MASK_AREA
from lustral.vision.records import DefenderView
from toy import NUM_CLASSES, quick_inverter


def quick_cascade() -> Cascade:
    faint = MaskSearch(penalty="energy", starts=1, steps=60, batch_size=16)
    return Cascade(
        patches=SizeSearch(inverter=quick_inverter()), faint=SizeSearch(inverter=quick_inverter(search=faint))
    )


def plain_least_step(weight: Tensor, margin: Tensor, label: int) -> float:
    """The smallest s with (w_k - w_j)^T s >= m_kj, by plain dual ascent with the constraints written out."""
    others = [j for j in range(len(weight)) if j != label]
    rows = (weight[label] - weight[others]).double()
    need, gram = margin[label, others].double(), rows @ rows.T
    multipliers = torch.zeros(len(others), dtype=torch.float64)
    for _ in range(20_000):
        multipliers = (multipliers + (need - gram @ multipliers) / torch.linalg.matrix_norm(gram, 2)).clamp_min(0)
    return float((rows.T @ multipliers).norm())


def test_least_steps_are_those_of_the_plain_ascent() -> None:
    stream = torch.Generator().manual_seed(0)
    weight, margin = torch.randn(6, 9, generator=stream), 4 * torch.rand(6, 6, generator=stream)
    found = least_steps(weight, margin.fill_diagonal_(0))
    assert found.tolist() == pytest.approx([plain_least_step(weight, margin, k) for k in range(6)], rel=1e-3)


def test_least_steps_reach_every_margin() -> None:
    # one other label and one direction: the step is the margin over the distance of the weights
    weight = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert least_steps(weight, torch.tensor([[0.0, 6.0], [0.0, 0.0]])).tolist() == pytest.approx([2.0, 0.0])


def test_margins_are_quantiles_of_differences() -> None:
    logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    assert margins(logits).tolist() == [[0.0, pytest.approx(3 - 0.1 * 4)], [pytest.approx(2 - 0.1), 0.0]]


def test_the_first_look_ranks_the_target_first(toy_view: DefenderView) -> None:
    norms = latent_norms(toy_view.model, toy_view.clean)
    assert norms is not None
    assert int(norms.argmin()) == 4


def test_a_head_that_is_not_linear_gives_no_look(toy_view: DefenderView) -> None:
    class Squared(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images) ** 3

    assert latent_norms(Squared(toy_view.model), toy_view.clean) is None


def test_error_rates_are_shared_unevenly_and_wholly() -> None:
    weights = error_weights(torch.arange(43.0).flip(0), 43)
    assert sum(weights) == pytest.approx(43)
    assert weights.index(max(weights)) == 42


def test_an_odd_norm_is_told_from_the_others() -> None:
    stream = torch.Generator().manual_seed(1)
    norms = 5 * torch.exp(0.05 * torch.randn(10, generator=stream))
    assert min(oddities(norms, 10)) > 0.05
    norms[3] *= 0.6
    assert oddities(norms, 10)[3] < 0.02
    assert oddities(None, 3) == [1.0] * 3


def found_nothing(count: int) -> FoundMasks:
    return FoundMasks(
        labels=tuple(range(count)),
        masks=torch.zeros(count, 1, 12, 12),
        patterns=torch.zeros(count, 3, 12, 12),
        areas=torch.zeros(count),
        energies=torch.zeros(count),
        success=torch.ones(count),
        steps=torch.full((count,), 9),
    )


def entry(label: int, size: float, p_value: float, penalty: str) -> SearchedLabel:
    return SearchedLabel(
        label=label,
        size=size,
        attack_success_rate=1.0,
        natural_rate=0.0,
        anomaly=0.0,
        p_value=p_value,
        entropy=math.nan,
        steps=9,
        penalty=penalty,  # type: ignore[arg-type]
    )


def searched(
    cascade: Cascade, monkeypatch: pytest.MonkeyPatch, view: DefenderView, p_value: float, norms: Tensor | None
) -> Look:
    """What the cascade makes of a search that finds label 4 odd at this p-value."""
    evidence = [entry(k, 60.0 if k != 4 else 4.0, p_value if k == 4 else 1.0, "area") for k in range(NUM_CLASSES)]
    monkeypatch.setattr(SizeSearch, "weigh", lambda *_, **__: (found_nothing(NUM_CLASSES), evidence))
    return cascade._search(cascade.patches, view, view.clean, view.clean, norms, child(0), None)


def test_p_values_are_corrected_and_weighted(toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    cascade = Cascade()
    plain = searched(cascade, monkeypatch, toy_view, 0.004, None)
    assert plain.evidence[4].p_value == pytest.approx(0.004 * SEARCHES)
    assert plain.suspects == (4,)
    first = torch.full((NUM_CLASSES,), 5.0) + 0.1 * torch.arange(NUM_CLASSES)
    first[4] = 4.9  # ranked first, and not odd
    ranked = searched(cascade, monkeypatch, toy_view, 0.004, first)
    assert ranked.evidence[4].p_value == pytest.approx(0.004 * SEARCHES / (0.4 * NUM_CLASSES))
    odd = first.clone()
    odd[4] = 2.0
    both = searched(cascade, monkeypatch, toy_view, 0.02, odd)
    assert both.evidence[4].p_value == pytest.approx(0.02 * SEARCHES / (0.4 * NUM_CLASSES) / ODD_FACTOR)
    assert both.suspects == (4,)
    sentences = [cascade._judge([look], True, toy_view.clean)[1] for look in (both, plain)]
    assert [TWO_DOUBTS in sentence for sentence in sentences] == [True, False]
    assert searched(cascade, monkeypatch, toy_view, 0.02, None).suspects == ()


def test_a_first_look_alone_accuses_nobody(toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = torch.full((NUM_CLASSES,), 5.0)
    odd[4] = 0.1
    look = searched(Cascade(), monkeypatch, toy_view, 1.0, odd)
    assert look.suspects == look.doubtful == () or look.evidence[4].p_value > 0.01


def test_the_toy_worlds_are_told_apart_by_the_cascade(toy_view: DefenderView, benign_view: DefenderView) -> None:
    found = quick_cascade().inspect(toy_view, generator=child(3))
    assert (found.outcome, found.suspect_labels) == ("backdoored", (4,))
    assert found.score > found.threshold
    assert [(trigger.target_label, trigger.kind) for trigger in found.triggers] == [(4, "patch")]
    assert set(found.by_label(LATENT_NORM)) == set(range(NUM_CLASSES))
    assert not found.by_label(CHANGE_ENERGY)  # the masks had accused already
    benign = quick_cascade().inspect(benign_view, generator=child(3))
    assert benign.outcome != "backdoored"
    assert benign.suspect_labels == ()
    assert set(benign.by_label(MASK_AREA)) == set(benign.by_label(CHANGE_ENERGY)) == set(range(NUM_CLASSES))
    assert benign.triggers[0].masks.shape[0] == 1


def test_the_scan_is_the_same_for_one_seed(toy_view: DefenderView) -> None:
    first, second = (quick_cascade().inspect(toy_view, generator=child(1)) for _ in range(2))
    assert replace(first, cost=second.cost, triggers=()) == replace(second, triggers=())


def test_searches_of_the_wrong_kind_are_refused() -> None:
    with pytest.raises(ValueError, match=r'expected faint to search with penalty "energy"; got "area"'):
        Cascade(faint=SizeSearch())
    with pytest.raises(ValueError, match="expected 0 < false_alarm_rate <= doubt_rate < 1"):
        Cascade(false_alarm_rate=0.2)
