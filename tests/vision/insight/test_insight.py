"""What changed inside a network, against plain formulas and hand arithmetic."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.vision.evaluation import predict
from lustral.vision.images import as_uint8
from lustral.vision.insight import before_after as module
from lustral.vision.insight import feature_map, grad_cam, look_inside, principal_plane, weight_line
from lustral.vision.models import build_classifier
from lustral.vision.models.splitting import last_map
from lustral.vision.records import ImageSet, Victim
from toy import toy_images, true_trigger


class Pooled(nn.Module):
    """One convolution, an activation that works in place, global pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        stream = child(0, "pooled")
        self.conv, self.relu, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Linear(3, 2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=stream)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.relu(self.conv(images)).mean((2, 3)))
        return out


class Damped(nn.Module):
    """A network with statistics, a counter and dropout."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.parts = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(4, 7)
        stream = child(seed, "damped")
        for tensor in self.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=stream) + 0.1)
        self.parts[1].num_batches_tracked.fill_(seed)  # type: ignore[union-attr, operator]

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(self.parts(images))
        return out


def test_grad_cam_is_its_two_equations() -> None:
    net, images = Pooled(), torch.rand(4, 1, 6, 6, generator=child(1, "images"))
    maps, answers = grad_cam(net, "relu", images)
    with torch.no_grad():
        activations = net.conv(images).relu()
        assert torch.equal(answers, net(images).argmax(1))
    for image, answer in enumerate(answers.tolist()):
        alpha = net.head.weight[answer].detach() / 36  # the head takes the mean of 6 x 6 pixels
        plain = (alpha[:, None, None] * activations[image]).sum(0).relu()
        torch.testing.assert_close(maps[image], plain / plain.max().clamp_min(1e-30))
    assert all(not module._forward_hooks for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_heat_is_as_large_as_the_image_and_nothing_is_no_heat() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 2, 2), nn.Flatten(), nn.Linear(18, 2))
    nn.init.zeros_(net[2].weight)  # type: ignore[arg-type]
    maps, _ = grad_cam(net, "0", torch.rand(2, 1, 6, 6))
    assert maps.shape == (2, 6, 6)
    assert not maps.any()


def test_the_last_map_is_before_global_pooling_and_patches_are_none() -> None:
    shape = (1, 3, 32, 32)
    assert last_map(Pooled(), torch.zeros(1, 1, 6, 6)) == "relu"
    net = build_classifier("preact_resnet18:width=2", num_classes=5, image_shape=shape[1:], mean=[0.5] * 3).eval()
    name = last_map(net, torch.zeros(shape))
    assert name is not None
    assert name.rpartition(".")[2] not in ("conv1", "conv2")
    vit = build_classifier("small_vit", num_classes=5, image_shape=shape[1:], mean=[0.5] * 3).eval()
    assert last_map(vit, torch.zeros(shape)) is None


def test_the_plane_of_a_known_cloud() -> None:
    axes = torch.linalg.qr(torch.randn(30, 3, generator=child(0, "axes")))[0].T  # three orthogonal directions
    inner = torch.tensor([[6.0, 1, 0.1], [-2, 2, -0.1], [-4, -3, 0], [0, 0, 0]])
    inner -= inner.mean(0)
    points, shown = principal_plane(inner @ axes + 5)
    _, values, right = torch.linalg.svd(inner.double(), full_matrices=False)
    expected = inner.double() @ right[:2].T
    torch.testing.assert_close(points.abs(), expected.abs().float(), atol=1e-4, rtol=1e-4)
    assert shown == pytest.approx(float((values[:2] ** 2).sum() / (values**2).sum()), abs=1e-5)
    assert all(column[column.abs().argmax()] > 0 for column in points.T)


def test_planes_of_too_little_and_of_no_numbers() -> None:
    points, shown = principal_plane(torch.ones(3, 4))
    assert (points.tolist(), shown) == ([[0, 0]] * 3, 0.0)
    assert principal_plane(torch.tensor([[2.0]]))[0].tolist() == [[0, 0]]
    assert principal_plane(torch.tensor([[1.0], [math.nan]]))[0].isnan().all()


def test_the_line_ends_in_the_two_models_and_mixes_statistics() -> None:
    given, new, clean = Damped(2), Damped(9), toy_images(21, seed=3)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    line = weight_line(given, new, clean, clean.subset(torch.arange(4)), points=5)
    assert line.shares == (0, 0.25, 0.5, 0.75, 1)

    def loss(model: nn.Module, images: ImageSet) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(model.eval()(images.images.float() / 255), images.labels))

    assert line.clean[0] == pytest.approx(loss(given, clean), rel=1e-5)
    assert line.clean[-1] == pytest.approx(loss(new, clean), rel=1e-5)
    assert line.triggered[-1] == pytest.approx(loss(new, clean.subset(torch.arange(4))), rel=1e-5)
    middle = copy.deepcopy(given)
    for name, tensor in middle.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_((given.state_dict()[name] + new.state_dict()[name]) / 2)
    assert line.clean[2] == pytest.approx(loss(middle, clean), rel=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.state_dict().items())
    with pytest.raises(ValueError, match="at least 2 points"):
        weight_line(given, new, clean, None, points=1)
    with pytest.raises(ValueError, match="same tensors"):
        weight_line(given, Pooled(), clean, None)


@pytest.fixture(scope="module")
def retrained(backdoored: Victim) -> nn.Module:
    """The victim with the weights of its head turned around: other answers, same features."""
    model = copy.deepcopy(backdoored.model)
    with torch.no_grad():
        list(model.parameters())[-1].add_(torch.arange(7.0))
    return model


def test_everything_is_seen_with_a_trigger_and_nothing_drawn(backdoored: Victim, retrained: nn.Module) -> None:
    images, state = toy_images(210, seed=5), torch.get_rng_state()
    mode = [part.training for part in backdoored.model.modules()]
    seen = look_inside(backdoored.model, retrained, images, trigger=true_trigger(), has_true_trigger=True)
    again = look_inside(backdoored.model, retrained, images, trigger=true_trigger(), target=4)
    assert torch.equal(state, torch.get_rng_state())
    assert mode == [part.training for part in backdoored.model.modules()]
    assert seen is not None
    assert again is not None
    assert (seen.num_images, seen.left_out, seen.has_true_trigger) == (96, (), True)
    assert not again.has_true_trigger
    assert seen.line == again.line  # the class that the trigger leads to was found
    assert seen.heat is not None
    assert seen.heat.images.shape == (6, 3, 12, 12)
    assert set(seen.heat.answers_before) == {4}
    assert seen.heat.before.amax((1, 2)).tolist() == [1] * 6
    assert seen.features is not None
    assert torch.allclose(seen.features.before, seen.features.after, atol=1e-4)
    assert int(seen.features.is_triggered.sum()) == 96 - int(seen.features.is_target.sum())


def test_what_cannot_be_seen_is_said(backdoored: Victim, retrained: nn.Module) -> None:
    images = toy_images(70, seed=5)
    assert look_inside(backdoored.model, copy.deepcopy(backdoored.model), images, trigger=true_trigger()) is None
    assert look_inside(backdoored.model, retrained, images.subset(torch.arange(0)), trigger=true_trigger()) is None
    blind = look_inside(backdoored.model, retrained, images, trigger=None)
    assert blind is not None
    assert blind.left_out == (module.NO_TRIGGER,)
    assert (blind.heat, blind.features) == (None, None)
    assert blind.line is not None
    assert blind.line.triggered == ()
    right = images.subset(predict(backdoored.model, images) == images.labels)
    idle = look_inside(backdoored.model, retrained, right, trigger=lambda images, **_: images.clone(), target=4)
    assert idle is not None
    assert (idle.heat, idle.left_out) == (None, (f"Where the networks look cannot be shown: {module.NOT_FIRED}",))
    other = nn.Sequential(nn.Flatten(), nn.Linear(432, 7))
    changed = look_inside(backdoored.model, other, images, trigger=true_trigger(), target=4)
    assert changed is not None
    assert changed.left_out == (module.NO_LINE, module.NO_MAP)
    assert changed.features is not None


def test_a_network_that_fails_is_said_and_nothing_is_lost(
    backdoored: Victim, retrained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no kernel for this\nand a trace")

    monkeypatch.setattr(module, "feature_map", fails)
    monkeypatch.setattr(module, "weight_line", fails)
    seen = look_inside(backdoored.model, retrained, toy_images(70, seed=5), trigger=true_trigger(), target=4)
    assert seen is not None
    assert seen.heat is not None
    said = "cannot be shown: no kernel for this"
    assert seen.left_out == (f"The loss between the weights {said}", f"The map of the features {said}")


def test_large_images_are_fewer() -> None:
    large = ImageSet(
        images=torch.zeros(200, 1, 128, 96, dtype=torch.uint8), labels=torch.arange(200) % 2, num_classes=2
    )
    assert len(module.few(large)) == 32
    assert len(module.few(toy_images(40, seed=0))) == 40


def test_features_of_a_network_of_one_layer_are_its_pixels() -> None:
    net, clean = nn.Sequential(nn.Flatten(), nn.Linear(432, 7)), toy_images(14, seed=1)
    stamped = ImageSet(images=as_uint8(true_trigger()(clean.images.float() / 255)), labels=clean.labels, num_classes=7)
    found = feature_map(net, net, clean, stamped, target=2)
    pixels = torch.cat([clean.images, stamped.images]).flatten(1).float() / 255
    expected, shown = principal_plane(pixels)
    torch.testing.assert_close(found.before, expected, atol=1e-3, rtol=1e-3)
    assert found.shown_after == pytest.approx(shown, abs=1e-4)
    assert found.is_target.nonzero().flatten().tolist() == [2, 9]
    assert found.is_triggered.tolist() == [False] * 14 + [True] * 14
