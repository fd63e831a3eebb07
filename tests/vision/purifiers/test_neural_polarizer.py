"""The polarizer: identity at birth, exact when multiplied in, and alone in being trained."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.models import build_classifier
from lustral.vision.models.wiring import Wiring, late_layer, trace
from lustral.vision.purifiers import NeuralPolarizer
from lustral.vision.purifiers.neural_polarizer import Polarized, Polarizer, fold, insert
from lustral.vision.records import DefenderView
from lustral.vision.repair import polarizing
from lustral.vision.repair.polarizing import Start, feature_statistics, runner_up
from toy import toy_images


def shake(polarized: Polarized, seed: int) -> None:
    """Give a polarizer weights and statistics of some training."""
    polarizer, stream = polarized.polarizer, child(seed)
    channels = len(polarizer.weight)
    with torch.no_grad():
        polarizer.weight += 0.3 * torch.randn(channels, channels, generator=stream)
        polarizer.norm.weight += 0.2 * torch.randn(channels, generator=stream)
        polarizer.norm.bias += 0.5 * torch.randn(channels, generator=stream)
    polarizer.set_statistics(
        torch.randn(channels, generator=stream), 0.5 + torch.rand(channels, generator=stream), identity=False
    )


def test_settled_for_identity_it_changes_nothing_whatever_the_statistics() -> None:
    polarizer = Polarizer(4, last=False)
    features = torch.randn(2, 4, 3, 3, generator=child(0))
    mean, variance = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([0.1, 3.0, 0.0, 1.0])
    polarizer.set_statistics(mean, variance, identity=True)
    assert torch.allclose(polarizer(features), features, atol=1e-5)
    plain = Polarizer(4, last=False)
    plain.set_statistics(mean, variance, identity=False)
    wanted = (features - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
    assert torch.allclose(plain(features), wanted, rtol=1e-4, atol=1e-4)


LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv2d(5, 4, 3, padding=1, bias=False), (2, 5, 6, 7)),
    (nn.Conv2d(5, 4, 3, stride=2, padding=(2, 1)), (2, 5, 6, 7)),
    (nn.Conv2d(5, 4, 3, padding=2, dilation=2, padding_mode="reflect"), (2, 5, 6, 7)),
    (nn.Conv2d(5, 4, 3, padding="same"), (2, 5, 6, 7)),
    (nn.Conv2d(5, 4, 1), (2, 5, 6, 7)),
    (nn.Linear(5, 4), (2, 9, 5)),
    (nn.Linear(5, 4, bias=False), (2, 5)),
]


@pytest.mark.parametrize("number", range(len(LAYERS)))
def test_a_new_polarizer_changes_nothing_and_a_trained_one_folds_exactly(number: int) -> None:
    layer, shape = LAYERS[number]
    model = nn.Sequential(copy.deepcopy(layer), nn.Flatten(), nn.LazyLinear(3)).eval()
    features = torch.randn(shape, generator=child(1))
    plain = model(features)
    wiring = Wiring(layers=("0",), head="2", normed={})
    polarized = insert(model, "0", wiring)
    assert torch.allclose(model(features), plain, atol=1e-4)  # but for the normalisation's epsilon
    shake(polarized, 2)
    wanted = model(features)
    assert not torch.allclose(wanted, plain, atol=0.1)
    keys = set(layer.state_dict())
    fold(model, "0", wiring)
    assert type(model[0]) is type(layer)
    assert set(model[0].state_dict()) == keys  # without room for a bias, the polarizer has none
    assert torch.allclose(model(features), wanted, atol=1e-4)


@pytest.mark.parametrize("arch", ["preact_resnet18:width=4", "vgg11_bn:width=4", "torchvision:resnet18"])
def test_the_architecture_stays_where_a_normalisation_follows(arch: str) -> None:
    model = build_classifier(arch, num_classes=4, image_shape=(3, 32, 32), generator=child(0)).eval()
    images = torch.rand(3, 3, 32, 32, generator=child(1))
    wiring = trace(model, images)
    name = late_layer(model, wiring)
    keys = {key: value.shape for key, value in model.state_dict().items()}
    polarized = insert(model, name, wiring)
    assert polarized.polarizer.offset
    shake(polarized, 3)
    wanted = model(images)
    fold(model, name, wiring)
    assert {key: value.shape for key, value in model.state_dict().items()} == keys
    assert torch.allclose(model(images), wanted, atol=1e-4)


def test_the_statistics_have_the_precision_of_the_trainer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(200, 7))
    data = toy_images(21, seed=0)
    exact, rounded = (feature_statistics(model, "2", data, 8, precision) for precision in ("float32", "bfloat16"))
    with torch.no_grad():
        features = model[1](model[0](data.images.float() / 255))
    assert torch.allclose(exact[0], features.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(rounded[0], features.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)


def test_statistics_are_those_of_what_enters_the_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(200, 7))
    data = toy_images(21, seed=0)
    mean, variance = feature_statistics(model, "2", data, batch_size=8)
    with torch.no_grad():
        features = model[1](model[0](data.images.float() / 255))
    assert mean.tolist() == pytest.approx(features.mean((0, 2, 3)).tolist(), abs=2e-2)
    assert variance.tolist() == pytest.approx(features.var((0, 2, 3), correction=0).tolist(), abs=2e-2)


def test_the_runner_up_is_never_the_label() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert runner_up(logits, torch.tensor([0, 1])).tolist() == [1, 0]


def test_perturbed_images_stay_in_the_ball_and_in_range(toy_view: DefenderView) -> None:
    method = NeuralPolarizer(radius=2.0)
    x, y, _ = next(toy_view.clean.batches(24))
    moved, own, target = method.aim(toy_view.model, x, y)
    radius = 2.0 * (3 * 12 * 12 / (3 * 32 * 32)) ** 0.5
    assert float((moved - x).flatten(1).norm(dim=1).max()) <= radius * (1 + 1e-5)
    assert 0 <= float(moved.min()) <= float(moved.max()) <= 1
    assert not bool((target == y).any())
    with torch.no_grad():
        assert torch.equal(own, toy_view.model(x).argmax(1))
        before, after = (toy_view.model(each).softmax(1).gather(1, target[:, None]).mean() for each in (x, moved))
    assert float(after) > float(before)


def test_everything_but_one_layer_and_its_normalisation_stays(toy_view: DefenderView) -> None:
    purified = NeuralPolarizer(least_steps=8).purify(toy_view, generator=child(0))
    before, after = toy_view.model.state_dict(), purified.model.state_dict()
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"network.features.8.weight", "network.features.9.running_mean"}


def test_a_layer_that_cannot_be_filtered_is_named(toy_view: DefenderView) -> None:
    with pytest.raises(ValueError, match=r"no layer 'nowhere'.*network\.features\.8"):
        NeuralPolarizer(layer="nowhere").purify(toy_view, generator=child(0))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="without groups"):
        insert(grouped, "0", Wiring(layers=("0",), head="1", normed={}))


def test_the_gradient_reaches_the_polarizer_alone(toy_view: DefenderView) -> None:
    model = copy.deepcopy(toy_view.model).requires_grad_(False)
    polarized = insert(model, "network.features.8", trace(model, torch.zeros(1, 3, 12, 12)))
    loss: Tensor = NeuralPolarizer().objective(model, next(toy_view.clean.batches(24)), child(0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all((p.grad is not None) == (p in set(polarized.polarizer.parameters())) for p in model.parameters())


@pytest.mark.parametrize(("survives", "initial", "factor"), [(0.0, "standardised", 1.0), (2.0, "identity", 0.1)])
def test_it_starts_from_standardised_features_only_where_the_network_bears_them(
    survives: float, initial: Start, factor: float, toy_view: DefenderView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(polarizing, "MIN_ACCURACY_KEPT", survives)
    trainer = Trainer(epochs=1, batch_size=128, learning_rate=0.01, schedule="constant")
    named = NeuralPolarizer(
        initial=initial, trainer=replace(trainer, learning_rate=factor * trainer.learning_rate), least_steps=4
    )
    automatic = NeuralPolarizer(trainer=trainer, least_steps=4).purify(toy_view, generator=child(0))
    wanted_note = {"standardised": "It started from standardised features", "identity": "It started as the identity"}
    assert any(note.startswith(wanted_note[initial]) for note in automatic.notes)
    chosen = automatic.model
    expected = named.purify(toy_view, generator=child(0)).model
    for found, wanted in zip(chosen.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)
