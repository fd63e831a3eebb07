"""The fast erasers beside their published algorithms written down plainly: the same weights after three float32 steps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import reference
from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.images import as_float
from lustral.vision.purifiers import IBAU, SAU, TSBD, NeuralPolarizer, neural_polarizer
from lustral.vision.purifiers.tsbd import most_moved, weight_changes
from lustral.vision.records import DefenderView, ImageSet
from lustral.vision.repair import clean_unlearning
from lustral.vision.repair.clean_unlearning import unlearn_clean
from lustral.vision.repair.run import PurifyRun
from toy import NUM_CLASSES, toy_images

STEPS = 3
CLOSE = 0.02  # largest distance from the reference, as a share of how far the steps lead
FAR = 0.2  # least distance of another algorithm


class WholeSet(Trainer):
    """A trainer whose every epoch is one step on the whole set, so that its order does not matter."""

    def fitted_to_size(self, num_images: int, least_steps: int) -> Trainer:
        return dataclasses.replace(self, batch_size=num_images)


def whole_set(trainer: Trainer, **changes: Any) -> WholeSet:
    values = {field.name: getattr(trainer, field.name) for field in dataclasses.fields(trainer)}
    plain = {"epochs": STEPS, "precision": "float32", "channels_last": False, "augment": None, "weight_decay": 0.0}
    return WholeSet(**{**values, **plain, "schedule": "constant", **changes})


def fit_set(view: DefenderView, seed: int = 0) -> ImageSet:
    """Return the images that a purifier with this seed trains on."""
    return PurifyRun(view=view, holdout=0.2, generator=child(seed)).fit


def batches_of(data: ImageSet) -> list[tuple[Tensor, Tensor]]:
    return [(as_float(data.images), data.labels)]


def difference(found: nn.Module, wanted: nn.Module, given: nn.Module) -> float:
    """Return the distance of two sets of weights, as a share of how far the wanted ones are from the given ones.

    Over all weights: Adam moves one whose gradient is nothing but rounding by its full rate, either way.
    """
    ours, theirs, before = (
        torch.cat([weight.detach().reshape(-1) for weight in model.parameters()]) for model in (found, wanted, given)
    )
    change = float((theirs - before).norm())
    assert change > 0
    return float((ours - theirs).norm()) / change


def test_sau(toy_view: DefenderView) -> None:
    method = SAU(trainer=whole_set(SAU().published().trainer), relative_rate=None, least_steps=0)
    ours = method.purify(toy_view, generator=child(0)).model
    batches = batches_of(fit_set(toy_view))
    close = (
        0.15  # 3e-6, but 0.07 on a processor whose rounding decides what the model calls one of the perturbed images
    )
    assert difference(ours, reference.sau(toy_view.model, batches, STEPS), toy_view.model) < close
    assert difference(ours, reference.sau(toy_view.model, batches, STEPS, start=-0.2), toy_view.model) > 2 * close


def test_i_bau(toy_view: DefenderView) -> None:
    published = IBAU().published()
    scale = (3 * 12 * 12 / (3 * 32 * 32)) ** 0.5
    method = dataclasses.replace(
        published, rounds=STEPS, trainer=whole_set(published.trainer), perturbed_share=1.0, projection=1 / scale
    )
    ours = method.purify(toy_view, generator=child(0)).model
    batches = batches_of(fit_set(toy_view))

    def plain(iterations: int) -> nn.Module:
        settings: dict[str, Any] = {"learning_rate": 1e-4, "amsgrad": True, "perturbed_share": 1.0, "projection": 1.0}
        return reference.i_bau(toy_view.model, batches, STEPS, iterations=iterations, **settings)

    assert difference(ours, plain(5), toy_view.model) < CLOSE
    assert difference(ours, plain(0), toy_view.model) > FAR


def small_network(data: ImageSet) -> nn.Module:
    """Return a network for these images whose late convolution does not pad: both orders of padding and polarizing are one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, NUM_CLASSES)),
        )
    recipe = Trainer(epochs=10, batch_size=35, learning_rate=0.1, precision="float32", channels_last=False)
    return recipe.fit(fresh, data, generator=child(0))


def test_neural_polarizer(monkeypatch: pytest.MonkeyPatch) -> None:
    data = toy_images(140, seed=3)
    inner = ImageSet(
        images=data.images // 2 + 64, labels=data.labels, num_classes=NUM_CLASSES
    )  # far from black and white
    view = DefenderView(model=small_network(inner), clean=inner)
    mean, variance = torch.linspace(-0.1, 0.3, 8), torch.linspace(0.05, 0.4, 8)
    monkeypatch.setattr(neural_polarizer, "feature_statistics", lambda *args: (mean, variance))
    method = NeuralPolarizer().published()
    method = dataclasses.replace(method, trainer=whole_set(method.trainer))
    ours = method.purify(view, generator=child(0)).model
    batches = batches_of(fit_set(view))
    images = as_float(data.images)
    scale = (3 * 12 * 12 / (3 * 32 * 32)) ** 0.5

    def plain(steps: int) -> Tensor:
        settings: dict[str, Any] = {"weight_decay": 0.0, "statistics": (mean, variance), "radius": 3 * scale}
        logits: Tensor = reference.neural_polarizer(view.model, batches, steps, **settings)(images)
        return logits.detach()

    found, wanted = ours(images).detach(), plain(STEPS)
    change = float((wanted - plain(0)).abs().max())
    assert float((found - wanted).abs().max()) < CLOSE * change
    nesterov = dataclasses.replace(method, trainer=dataclasses.replace(method.trainer, optimizer="sgd"))
    other = nesterov.purify(view, generator=child(0)).model(images).detach()
    assert float((other - wanted).abs().max()) > FAR * change


def test_tsbd_unlearns(toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clean_unlearning, "MOST_RAISES", 0)
    trainer = whole_set(TSBD().unlearner, optimizer="heavy_ball", batch_size=280)
    ours, _, epochs = unlearn_clean(toy_view.model, toy_view.clean, trainer, share_left=0.0, generator=child(0))
    assert epochs == STEPS
    batches = batches_of(toy_view.clean)
    plain = reference.unlearned(toy_view.model, batches, STEPS, learning_rate=1e-3)
    assert difference(ours, plain, toy_view.model) < CLOSE
    other = reference.unlearned(toy_view.model, batches, STEPS - 1, learning_rate=1e-3)
    assert difference(ours, other, toy_view.model) > FAR


def convolutions(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))


def test_tsbd_resets_the_same_weights(toy_view: DefenderView) -> None:
    forgetful = reference.unlearned(toy_view.model, batches_of(toy_view.clean), STEPS, learning_rate=1e-3)
    wanted = reference.reset_most_moved(toy_view.model, forgetful, neurons=0.3, weights=0.7)
    changes = weight_changes(toy_view.model, forgetful, convolutions(toy_view.model))
    chosen = most_moved(changes, 0.3, 0.7)
    for name, mask in chosen.items():
        weight = wanted.get_submodule(name).weight
        assert torch.equal(mask.view_as(weight), weight == 0)
    assert sum(int(mask.sum()) for mask in chosen.values()) > 0


def test_tsbd_fine_tunes(toy_view: DefenderView) -> None:
    trainer = whole_set(TSBD().trainer, optimizer="heavy_ball")
    changes = weight_changes(toy_view.model, toy_view.model, convolutions(toy_view.model))
    method = dataclasses.replace(TSBD(), trainer=trainer)
    with PurifyRun(view=toy_view, holdout=0.2, generator=child(0)) as repair:
        ours = method.repaired(repair, changes, 0.0)  # nothing is reset
    batches = batches_of(fit_set(toy_view))
    assert difference(ours, reference.fine_tuned(toy_view.model, batches, STEPS), toy_view.model) < CLOSE
    assert difference(ours, reference.fine_tuned(toy_view.model, batches, STEPS, share=0.0), toy_view.model) > FAR
