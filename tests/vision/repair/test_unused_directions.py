"""Steps along directions that clean images do not use, against plain formulas and loops."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.vision.repair import unused_directions
from lustral.vision.repair.unused_directions import UnusedDirections, projector, rows, second_moments
from toy import toy_images


class Net(nn.Module):
    """Convolutions of several shapes, a normalisation, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=(1, 0), padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.grouped = nn.Conv2d(4, 6, (1, 3), groups=2, padding="same", dilation=(1, 2))
        self.head = nn.Linear(6, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.first(x)).relu()).relu()
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("name", ["first", "grouped", "head"])
def test_rows_times_the_weight_are_what_the_layer_says(name: str, net: nn.Module) -> None:
    layer = net.get_submodule(name)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    x = (
        torch.rand(2, 6, generator=child(1))
        if name == "head"
        else torch.rand(2, layer.weight.shape[1] * (2 if name == "grouped" else 1), 11, 10, generator=child(1))
    )
    seen = rows(layer, x)
    groups = seen.shape[0]
    weight = layer.weight.reshape(groups, layer.weight.shape[0] // groups, -1)
    said = seen @ weight.transpose(1, 2)  # (groups, rows, outputs of a group)
    assert layer.bias is not None
    asked = layer(x) - layer.bias.reshape(1, -1, *([1] * (x.dim() - 2)))
    asked = asked.movedim(1, -1).reshape(-1, groups, weight.shape[1]).movedim(1, 0)
    assert torch.allclose(said, asked, atol=1e-5)


def test_large_pictures_are_looked_at_in_some_places() -> None:
    layer = nn.Conv2d(1, 1, 1)
    seen = rows(layer, torch.arange(64.0 * 64).reshape(1, 1, 64, 64))
    assert seen.shape[1] <= unused_directions.POSITIONS
    assert seen[0, :3, 0].tolist() == [0, 4, 8]  # 4096 places, every fourth of a row and of a column


def test_moments_are_means_over_clean_images(net: nn.Module) -> None:
    images = toy_images(70, seed=3)  # more than one batch
    found = second_moments(net, images)
    assert set(found) == {"first.weight", "grouped.weight", "head.weight"}
    with torch.no_grad():
        x = torch.cat([batch.inputs for batch in images.batches(70)])
        hidden = (
            net.get_submodule("grouped")(net.get_submodule("norm")(net.get_submodule("first")(x)).relu())
            .relu()
            .mean((2, 3))
        )
    assert torch.allclose(found["head.weight"][0], hidden.T @ hidden / 70, atol=1e-5)


def test_a_shared_weight_has_one_moment() -> None:
    layer = nn.Linear(3 * 12 * 12, 3 * 12 * 12, bias=False)
    twice = nn.Sequential(nn.Flatten(), layer, layer)
    images = toy_images(5, seed=3)
    x = next(images.batches(5)).inputs.flatten(1)
    seen = torch.cat([x, layer(x)]).detach()
    found = second_moments(twice, images)
    assert list(found) == ["1.weight"]
    assert torch.allclose(found["1.weight"][0], seen.T @ seen / 10, atol=1e-4)


def test_the_projector_solves_its_equation() -> None:
    a = torch.rand(3, 40, 8, generator=child(0))
    moment = a.transpose(1, 2) @ a / 40
    level = 0.1 * moment.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    assert torch.allclose(projector(moment, 0.1) @ (moment + level * torch.eye(8)), level * torch.eye(8), atol=1e-6)


def test_inputs_that_are_zero_leave_every_direction_free() -> None:
    assert torch.allclose(projector(torch.zeros(1, 4, 4), 0.01)[0], torch.eye(4))


def test_steps_keep_what_clean_images_get_and_change_the_rest() -> None:
    """A head that sees clean images in half of its inputs learns to answer otherwise through the other half."""
    torch.manual_seed(1)
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 7))
    images = toy_images(20, seed=5)
    left = images.images.clone()
    left[..., 6:] = 0
    clean = replace(images, images=left)
    x = next(clean.batches(20)).inputs
    triggered = x.clone()
    triggered[..., 6:] = 1
    with torch.no_grad():
        before = head(x)
    free, confined = copy.deepcopy(head), copy.deepcopy(head)
    unused = UnusedDirections(head, clean, damping=1e-4)
    for model, confine in ((free, False), (confined, True)):
        steps = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(50):
            loss = (model(triggered) - before).square().sum(1).mean()
            whole = unused.confine(loss, model) if confine else loss
            assert float(whole.detach()) == pytest.approx(float(loss.detach()))
            steps.zero_grad()
            whole.backward()  # type: ignore[no-untyped-call]
            steps.step()
    with torch.no_grad():
        moved = {key: float((model(x) - before).abs().max()) for key, model in (("free", free), ("confined", confined))}
        left_over = float((confined(triggered) - before).abs().mean() / (head(triggered) - before).abs().mean())
    assert left_over < 0.05
    assert moved["confined"] < 0.02 < moved["free"]


def test_biases_and_normalisation_keep_still(net: nn.Module) -> None:
    unused = UnusedDirections(net, toy_images(21, seed=3), damping=0.01)
    x = next(toy_images(21, seed=4).batches(21))
    unused.confine(F.cross_entropy(net(x.inputs), x.labels), net).backward()  # type: ignore[no-untyped-call]
    still = {name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert still == {"first.bias", "norm.weight", "norm.bias", "grouped.bias", "head.bias"}


def test_layers_that_are_too_wide_keep_still(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unused_directions, "WIDEST", 12)
    unused = UnusedDirections(net, toy_images(21, seed=3), damping=0.01)
    assert set(unused.projectors) == {"grouped.weight", "head.weight"}


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_weight_that_is_made_of_others_keeps_still(wrap: Any, net: nn.Module) -> None:
    wrap(net.get_submodule("grouped"))
    unused = UnusedDirections(net.eval(), toy_images(21, seed=3), damping=0.01)
    assert set(unused.projectors) == {"first.weight", "head.weight"}
    x = next(toy_images(21, seed=4).batches(21))
    unused.confine(F.cross_entropy(net(x.inputs), x.labels), net).backward()  # type: ignore[no-untyped-call]
    moved = {name for name, parameter in net.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    assert moved == {"first.weight", "head.weight"}


def test_without_a_layer_the_loss_comes_back() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(7))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((1, 2, 3))[:, None] * self.scale

    model = Scaled()
    unused = UnusedDirections(model, toy_images(7, seed=3), damping=0.01)
    loss = model(torch.rand(2, 3, 12, 12)).sum()
    assert unused.confine(loss, model) is loss


def test_nothing_stays_on_the_network(net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    UnusedDirections(net, toy_images(21, seed=3), damping=0.01)
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_is_above_zero(damping: float, net: nn.Module) -> None:
    with pytest.raises(ValueError, match="damping > 0"):
        UnusedDirections(net, toy_images(7, seed=3), damping=damping)


def test_loosening_frees_more(net: nn.Module) -> None:
    images = toy_images(21, seed=3)
    unused, asked = UnusedDirections(net, images, damping=0.01), UnusedDirections(net, images, damping=0.1)
    before = {name: held.clone() for name, held in unused.projectors.items()}
    unused.loosen(10.0)
    assert unused.damping == pytest.approx(0.1)
    for name, held in unused.projectors.items():
        assert torch.allclose(held, asked.projectors[name], atol=1e-6)
        assert held.diagonal(dim1=1, dim2=2).sum() > before[name].diagonal(dim1=1, dim2=2).sum()
