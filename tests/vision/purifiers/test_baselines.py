"""The remaining baselines: what their files compute, against hand arithmetic or the slow way."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.images import as_float
from lustral.vision.models import build_classifier
from lustral.vision.purifiers import FST, NAD, FinePruning, NeuralCleanse
from lustral.vision.purifiers.fine_pruning import cut_columns, head_inputs, prune_count
from lustral.vision.purifiers.nad import attention, stage_ends, watched
from lustral.vision.purifiers.neural_cleanse import anomaly_index
from lustral.vision.records import DefenderView
from lustral.vision.repair.heads import fresh_head, linear_head, rescale
from toy import gentle_trainer, toy_images


def test_accuracies_after_cutting_are_those_of_the_cut_network(toy_view: DefenderView) -> None:
    model, held_out = toy_view.model, toy_view.clean
    head = model.get_submodule("network.linear")
    assert isinstance(head, nn.Linear)
    features = head_inputs(model, "network.linear", held_out)
    order = features.abs().mean(0).argsort()
    fast = FinePruning.after_cutting(head, features, held_out, order)
    assert len(fast) == head.in_features
    weight = head.weight.detach().clone()
    for count in (0, 5, 20, 31):
        cut = weight.clone()
        cut_columns(cut, order[:count])
        slow = (F.linear(features, cut, head.bias).argmax(1) == held_out.labels).float().mean()
        assert float(fast[count]) == pytest.approx(float(slow), abs=0.005)
    assert torch.equal(head.weight, weight)


def test_the_count_stops_before_the_first_fall() -> None:
    assert prune_count(torch.tensor([0.9, 0.9, 0.9]), 0.8) == 2
    assert prune_count(torch.tensor([0.7, 0.9]), 0.8) == 0


def test_what_fine_pruning_cuts_stays_cut(toy_view: DefenderView) -> None:
    purified = FinePruning(trainer=gentle_trainer(epochs=2, batch_norm="train"), least_steps=1).purify(
        toy_view, generator=child(0)
    )
    head = purified.model.get_submodule("network.linear")
    assert isinstance(head, nn.Linear)
    cut = int(purified.notes[0].split()[0])
    assert cut > 0
    assert int((head.weight == 0).all(0).sum()) == cut


def test_a_fresh_head_and_its_norm() -> None:
    head = nn.Linear(16, 3)
    fresh_head(head, child(0))
    assert float(head.weight.detach().abs().max()) <= 0.25
    again = nn.Linear(16, 3)
    fresh_head(again, child(0))
    assert torch.equal(head.weight, again.weight)
    rescale(head.weight, torch.tensor(7.0))
    assert float(head.weight.detach().norm()) == pytest.approx(7.0)


def test_fst_keeps_the_norm_and_turns_away(toy_view: DefenderView) -> None:
    purified = FST(alpha=0.5, least_steps=60).purify(toy_view, generator=child(0))
    given, new = (m.state_dict()["network.linear.weight"] for m in (toy_view.model, purified.model))
    assert float(new.norm()) == pytest.approx(float(given.norm()), rel=1e-4)
    cosine = float(F.cosine_similarity(given.flatten(), new.flatten(), dim=0))
    kept = (
        FST(alpha=0.0, least_steps=60).purify(toy_view, generator=child(0)).model.state_dict()["network.linear.weight"]
    )
    assert cosine < float(F.cosine_similarity(given.flatten(), kept.flatten(), dim=0))


def test_networks_that_do_not_end_in_a_linear_layer_are_refused() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 7, 10), nn.Flatten())
    with pytest.raises(ValueError, match="ends in a linear layer"):
        linear_head(conv, torch.rand(1, 3, 12, 12))
    with pytest.raises(ValueError, match="linear head"):
        FinePruning().purify(DefenderView(model=conv, clean=toy_images(70, seed=0)), generator=child(0))


def test_attention_is_a_unit_map_of_channel_sums() -> None:
    features = torch.tensor([[[[1.0, 2.0]], [[2.0, 0.0]]]])  # (1, 2, 1, 2): sums of squares 5 and 4
    assert attention(features, 2.0).flatten().tolist() == pytest.approx([5 / math.sqrt(41), 4 / math.sqrt(41)])


def test_stages_end_where_the_maps_shrink() -> None:
    images = torch.rand(1, 3, 32, 32, generator=child(0))
    model = build_classifier("preact_resnet18:width=4", num_classes=4, image_shape=(3, 32, 32), generator=child(0))
    ends = [name.removesuffix(".1") for name in stage_ends(model, images)]  # a layer and its last block: one tensor
    assert ends == ["network.layer2", "network.layer3", "network.layer4"]
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4, patch_size=32)
    with pytest.raises(ValueError, match="use another method"):
        stage_ends(vit, images)


def test_the_distilled_loss_is_the_equation(toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross-entropy, and for every stage its weight times the mean square between the student's and the teacher's map."""
    caught: list[Any] = []

    def fit(self: Trainer, model: nn.Module, data: object, **rest: Any) -> nn.Module:
        caught.append(rest.get("objective"))
        return copy.deepcopy(model)  # so that the teacher is the given model

    monkeypatch.setattr(Trainer, "fit", fit)
    NAD(layer_weights=(100.0, 200.0, 300.0)).purify(toy_view, generator=child(0))
    teacher, student = toy_view.model, copy.deepcopy(toy_view.model)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.1, generator=child(1))
    batch = next(toy_view.clean.batches(16))
    x, y, _ = batch
    with torch.no_grad():
        expected = F.cross_entropy(student(x), y)
        for weight, name in zip((100.0, 200.0, 300.0), stage_ends(teacher, x), strict=True):
            with watched(teacher, [name]) as wanted, watched(student, [name]) as own:
                teacher(x), student(x)
            apart = (attention(own[name], 2.0) - attention(wanted[name], 2.0)).square().mean()
            assert weight * float(apart) > 0.01
            expected = expected + weight * apart
    assert caught[0] is None
    assert float(caught[1](student, batch, child(0)).detach()) == pytest.approx(float(expected), rel=1e-4)
    alike = float(caught[1](teacher, batch, child(0)).detach())
    assert alike == pytest.approx(float(F.cross_entropy(teacher(x), y).detach()), rel=1e-4)


def test_the_anomaly_index_names_the_small_one() -> None:
    index = anomaly_index(torch.tensor([30.0, 32.0, 28.0, 31.0, 5.0]))
    assert int(index.argmax()) == 4
    assert float(index[4]) == pytest.approx((30 - 5) / (1.4826 * 2.0))  # deviations 0, 2, 2, 1, 25: median 2
    assert bool(anomaly_index(torch.full((5,), 3.0)).isfinite().all())


def test_neural_cleanse_leaves_a_benign_network_as_it_is(benign_view: DefenderView) -> None:
    purified = NeuralCleanse(threshold=50.0).purify(benign_view, generator=child(0))
    assert purified.notes == ("No label stood out, so the model was returned unchanged.",)
    images = as_float(benign_view.clean.images[:8])
    with torch.no_grad():
        assert torch.equal(purified.model(images), benign_view.model(images))
