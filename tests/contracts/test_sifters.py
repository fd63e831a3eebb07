"""What every sifter keeps, whatever it is. One new in the catalog is tested with its defaults; ``SMALL`` has quicker settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lustral.catalog import SIFTERS
from lustral.core.randomness import child
from lustral.core.records import Progress
from lustral.vision.records import ImageSet, Sifted, TrainingView, Victim
from lustral.vision.sifters import (
    FCT,
    ActivationClustering,
    BNLikelihood,
    Combined,
    EarlyLoss,
    SpectralSignatures,
    Strip,
)
from toy import clean_images, toy_trainer
from vision.sifters.worlds import building, training_view

SMALL: dict[str, Callable[[], Any]] = {
    "activation_clustering": lambda: ActivationClustering(trainer=toy_trainer(epochs=1)),
    "bn_likelihood": lambda: BNLikelihood(trainer=toy_trainer(epochs=1)),
    "combined": lambda: Combined(trainer=toy_trainer(epochs=1)),
    "early_loss": lambda: EarlyLoss(trainer=toy_trainer(epochs=1, augment=None), least_steps=0),
    "fct": lambda: FCT(least_steps=0, intra_epochs=1, intra_least_steps=0),
    "spectral": lambda: SpectralSignatures(trainer=toy_trainer(epochs=1)),
    "strip": lambda: Strip(num_overlays=4, trainer=toy_trainer(epochs=1)),
}
TRAINS_ITS_OWN: tuple[str, ...] = ("early_loss", "fct")  # whatever model there is, on the images in their order
NAMES = sorted(SIFTERS)


def small(name: str) -> Any:
    return SMALL.get(name, SIFTERS[name])()


def sift(name: str, view: TrainingView, **rest: Any) -> Sifted:
    found: Sifted = small(name).sift(view, generator=child(3), **rest)
    return found


@pytest.fixture(scope="module")
def view(backdoored: Victim) -> TrainingView:
    """A third of the victim's training set, ordered by class, with its model and clean images."""
    whole = training_view(backdoored, clean=clean_images())
    assert isinstance(whole.untrusted, ImageSet)
    data = whole.untrusted.subset(torch.arange(0, len(whole.untrusted), 3))
    return replace(whole, untrusted=data.subset(data.labels.argsort(stable=True)))


@pytest.fixture(scope="module")
def observed(view: TrainingView) -> Callable[[str], tuple[Sifted, list[Progress]]]:
    """Give each sifter's result and its reports; run once and kept."""
    kept: dict[str, tuple[Sifted, list[Progress]]] = {}

    def result(name: str) -> tuple[Sifted, list[Progress]]:
        if name not in kept:
            reports: list[Progress] = []
            kept[name] = sift(name, view, on_progress=reports.append), reports
        return kept[name]

    return result


Observed = Callable[[str], tuple[Sifted, list[Progress]]]


def require_complete(found: Sifted, count: int) -> None:
    assert found.scores.shape == found.flagged.shape == (count,)
    assert (found.scores.dtype, found.flagged.dtype) == (torch.float32, torch.bool)
    assert found.scores.device.type == found.flagged.device.type == "cpu"
    assert bool(torch.isfinite(found.scores).all())
    assert not found.scores.requires_grad
    assert torch.equal(found.flagged, found.scores > found.threshold)
    assert found.basis.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_there_is_one_finite_score_for_each_image(name: str, observed: Observed, view: TrainingView) -> None:
    found, _ = observed(name)
    require_complete(found, len(view.untrusted))
    assert float(found.scores.std()) > 0
    assert found.cost.image_passes > 0
    assert found.cost.seconds > 0
    assert found.cost.clean_images == 280


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_scores(name: str, observed: Observed, view: TrainingView) -> None:
    again = sift(name, view)
    assert torch.equal(again.scores, observed(name)[0].scores)
    assert torch.equal(again.flagged, observed(name)[0].flagged)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_the_images_does_not_matter(name: str, observed: Observed, view: TrainingView) -> None:
    if name in TRAINS_ITS_OWN:
        pytest.skip("a model is trained on the images in their order")
    order = torch.randperm(len(view.untrusted), generator=child(5))
    found = sift(name, replace(view, untrusted=view.untrusted.subset(order)))
    one, other = observed(name)[0].scores[order], found.scores
    scale = float(one.std())
    torch.testing.assert_close(other / scale, one / scale, rtol=0.02, atol=0.02)
    without = replace(view, clean=None)
    one = sift(name, without).scores[order]
    other = sift(name, replace(without, untrusted=view.untrusted.subset(order))).scores
    torch.testing.assert_close(other / scale, one / scale, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_progress_is_reported(name: str, observed: Observed) -> None:
    _, reports = observed(name)
    assert reports
    for report in reports:
        assert report.stage
        assert 0 <= report.done <= report.total
    assert reports[-1].done == reports[-1].total


def snapshot(view: TrainingView) -> list[Tensor]:
    assert view.model is not None
    assert view.clean is not None
    assert isinstance(view.untrusted, ImageSet)
    sets = [view.untrusted.images, view.untrusted.labels, view.clean.images, view.clean.labels]
    modes = torch.tensor([module.training for module in view.model.modules()])
    needs = torch.tensor([parameter.requires_grad for parameter in view.model.parameters()])
    hooks = torch.tensor([len(m._forward_hooks) + len(m._forward_pre_hooks) for m in view.model.modules()])
    every = [*sets, *view.model.state_dict().values(), modes, needs, hooks, torch.random.get_rng_state()]
    return [tensor.clone() for tensor in every]


@pytest.mark.parametrize("name", NAMES)
def test_the_view_and_the_global_stream_are_left_alone(name: str, view: TrainingView) -> None:
    assert view.model is not None
    view.model.train()
    try:
        before = snapshot(view)
        sift(name, view)
        after = snapshot(view)
    finally:
        view.model.eval()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_without_a_model_one_is_trained_and_counted(name: str, view: TrainingView) -> None:
    data = view.untrusted.subset(torch.arange(0, len(view.untrusted), 4))
    few = replace(view, untrusted=data, build_model=building(data), model=None, clean=None)  # type: ignore[arg-type]
    reports: list[Progress] = []
    found = sift(name, few, on_progress=reports.append)
    require_complete(found, len(data))
    assert found.cost.image_passes >= 64  # a batch at least, forward and back
    share = found.cost.image_passes / small(name).estimated_passes(len(data))
    assert 0.5 < share <= 1.05, "but for a last batch that is not full"
    assert found.cost.clean_images == 0
    assert len({report.stage for report in reports}) >= 2, "training and looking"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("world", ["one image of a class", "one label", "one picture"])
def test_odd_sets_are_scored(name: str, world: str, view: TrainingView) -> None:
    data = view.untrusted
    assert isinstance(data, ImageSet)
    if world == "one image of a class":
        data = data.subset(
            torch.cat([(data.labels != 6).nonzero().flatten(), (data.labels == 6).nonzero().flatten()[:1]])
        )
    elif world == "one label":
        data = replace(data, labels=torch.full_like(data.labels, 2))
    else:
        data = replace(data, images=data.images[:1].expand_as(data.images).contiguous())
    found = sift(name, replace(view, untrusted=data, clean=None))
    require_complete(found, len(data))
    if world == "one picture":
        assert not found.flagged.any()


@pytest.mark.parametrize("name", NAMES)
def test_a_sifter_says_what_it_needs_and_costs_and_shows_its_settings(name: str) -> None:
    kind = SIFTERS[name]
    own = vars(kind)
    assert own["version"] >= 1
    assert own["needs"].strip()
    assert not own["needs"].endswith("."), "a phrase for a column, no sentence"
    assert 0 < own["cost_passes"] < 1000
    method: Any = kind()
    for item in dataclasses.fields(method):
        assert f"{item.name}=" in repr(method)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, item.name, None)
    with pytest.raises(TypeError):
        kind(1)  # type: ignore[call-arg]
