"""CNPD: the network inside stays as it was given, and the perturbations drive that network to drawn classes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.models import Classifier, Conditioned
from lustral.vision.purifiers import CNPD
from lustral.vision.purifiers.cnpd import condition, conditioned_part, other_labels
from lustral.vision.records import DefenderView


def test_drawn_classes_are_all_but_the_own_one() -> None:
    labels = torch.arange(4).repeat(200)
    drawn = other_labels(labels, 4, child(0))
    counts = torch.zeros(4, 4).index_put_((labels, drawn), torch.ones(len(labels)), accumulate=True)
    assert torch.equal(counts.diagonal(), torch.zeros(4))
    assert float((counts + 1000 * torch.eye(4)).min()) > 40  # of 66.7 expected


def test_perturbed_images_stay_in_the_ball_and_drive_the_given_network(toy_view: DefenderView) -> None:
    method = CNPD(radius=2.0)
    x, y, _ = next(toy_view.clean.batches(24))
    moved, said, target = method.aim(toy_view.model, x, y, child(0))
    radius = 2.0 * (3 * 12 * 12 / (3 * 32 * 32)) ** 0.5
    assert float((moved - x).flatten(1).norm(dim=1).max()) <= radius * (1 + 1e-5)
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert not bool((target == y).any())
    with torch.no_grad():
        assert torch.equal(said, toy_view.model(x).argmax(1))
        before, after = (toy_view.model(each).softmax(1).gather(1, target[:, None]).mean() for each in (x, moved))
    assert float(after) > float(before)


def test_the_gradient_reaches_the_polarizers_alone(toy_view: DefenderView) -> None:
    model = condition(copy.deepcopy(toy_view.model).requires_grad_(False), "network.features.8", 7)
    loss: Tensor = CNPD().objective(model, next(toy_view.clean.batches(24)), child(0))
    loss.backward()  # type: ignore[no-untyped-call]
    own = set(conditioned_part(model).polarizers.parameters())
    assert all((p.grad is not None) == (p in own) for p in model.parameters())


def test_the_network_inside_is_the_given_one(toy_view: DefenderView) -> None:
    toy_view.model.requires_grad_(True)
    purified = CNPD(least_steps=8).purify(toy_view, generator=child(0))
    model = purified.model
    assert isinstance(model, Classifier)
    inside = conditioned_part(model)
    assert isinstance(toy_view.model, Classifier)
    given = toy_view.model.network.state_dict()
    assert all(torch.equal(value, given[key]) for key, value in inside.network.state_dict().items())
    assert inside.layer == "features.8"
    assert all(parameter.requires_grad for parameter in model.parameters())
    weight = inside.polarizers.weight
    assert not torch.allclose(weight, torch.eye(weight.shape[1]).expand_as(weight), atol=1e-3)


def test_a_network_that_is_no_classifier_of_ours_is_wrapped_as_it_is(toy_view: DefenderView) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.inner(images)
            return out

    view = DefenderView(model=Wrapper(copy.deepcopy(toy_view.model)), clean=toy_view.clean)
    purified = CNPD(least_steps=4).purify(view, generator=child(0))
    assert isinstance(purified.model, Conditioned)
    assert purified.model.layer == "inner.network.features.8"


def test_what_cannot_work_is_refused(toy_view: DefenderView) -> None:
    with pytest.raises(ValueError, match=r"no layer 'nowhere'.*network\.features\.8"):
        CNPD(layer="nowhere").purify(toy_view, generator=child(0))
    with pytest.raises(ValueError, match="expected radius > 0"):
        CNPD(radius=0.0)
    with pytest.raises(ValueError, match="weights of at least 0"):
        CNPD(target_weight=-1.0)
