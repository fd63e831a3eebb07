"""What one pass sees: features, logits and the least log-likelihoods of batch normalisations."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.core.records import Progress
from lustral.vision.models.features import gather
from lustral.vision.records import ImageSet, TrainingView
from lustral.vision.suspicion.looking import MOST_DIMENSIONS, NormStatistics, counted_model, least_log_likelihood, look
from toy import toy_images, toy_trainer
from vision.sifters.worlds import building


class Net(nn.Module):
    """A network whose numbers are easy to follow; a norm of pictures, then one of vectors."""

    def __init__(self, *, running: bool = True, wide: int = 4) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(3, track_running_stats=running)
        self.mix = nn.Linear(3, wide)
        self.bn2 = nn.BatchNorm1d(wide)
        self.unused = nn.BatchNorm1d(2)
        self.head = nn.Linear(wide, 7)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.bn2(self.mix(self.bn1(images).mean((2, 3)))))
        return logits


def drawn(net: nn.Module) -> nn.Module:
    """Give a network statistics of its own."""
    for name, buffer in net.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(torch.rand(buffer.shape, generator=child(1, name)) + 0.2)
    return net.eval()


def plain_least(x: Tensor, mean: Tensor, variance: Tensor) -> list[float]:
    """Return the least log-density of each image, number by number."""
    rows = []
    for image in x.numpy():
        found = []
        for channel in range(image.shape[0]):
            for value in np.ravel(image[channel]):
                z = (value - float(mean[channel])) / math.sqrt(float(variance[channel]) + 1e-5)
                found.append(-z * z / 2 - math.log(2 * math.pi) / 2)
        rows.append(min(found))
    return rows


def test_likelihoods_are_those_of_the_plain_formula() -> None:
    net, data = drawn(Net()), toy_images(5, seed=3)
    looked = look(net, data, batch_size=2)
    assert looked.likelihoods.shape == (5, 2)
    assert list(looked.statistics) == ["bn1", "bn2"]
    images = data.images.float() / 255
    inner = net.mix(net.bn1(images).mean((2, 3))).detach()
    for column, (x, norm) in enumerate(((images, net.bn1), (inner, net.bn2))):
        wanted = torch.tensor(plain_least(x, norm.running_mean, norm.running_var))
        torch.testing.assert_close(looked.likelihoods[:, column], wanted, rtol=1e-4, atol=1e-4)


def test_a_far_pixel_below_the_mean_counts_as_one_above() -> None:
    statistics = NormStatistics(mean=torch.tensor([1.0, 0.0]), std=torch.tensor([2.0, 1.0]))
    x = torch.zeros(2, 2, 3, 3)
    x[:, 0] = 1.0
    x[0, 0, 2, 1] = -9.0  # five deviations below
    x[1, 1, 0, 0] = 5.0
    same = -(25 + math.log(2 * math.pi)) / 2
    assert least_log_likelihood(x, statistics).tolist() == pytest.approx([same, same])


def test_missing_statistics_are_those_of_the_set() -> None:
    data = toy_images(64, seed=3)
    looked = look(Net(running=False), data, batch_size=16)
    pixels = (data.images.double() / 255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(looked.statistics["bn1"].mean.double(), pixels.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        looked.statistics["bn1"].std.double(), (pixels.var(1, correction=0) + 1e-5).sqrt(), rtol=1e-5, atol=1e-6
    )
    other = look(Net(running=False), toy_images(8, seed=4), statistics=looked.statistics)
    assert other.statistics is looked.statistics


def test_features_and_logits_are_those_of_the_one_other_way_to_get_them() -> None:
    net, data = drawn(Net()), toy_images(30, seed=3)
    looked = look(net, data, batch_size=7)
    features, logits = gather(net, data)
    torch.testing.assert_close(looked.features, features)
    torch.testing.assert_close(looked.logits, logits)
    assert torch.equal(looked.is_right, logits.argmax(1) == data.labels)
    part = looked.subset(torch.tensor([3, 1]))
    assert torch.equal(part.features, looked.features[[3, 1]])
    assert torch.equal(part.labels, data.labels[[3, 1]])


def test_wide_features_are_projected_and_keep_their_distances() -> None:
    net, data = drawn(Net(wide=3 * MOST_DIMENSIONS)), toy_images(40, seed=3)
    looked, (features, _) = look(net, data), gather(net, data)
    assert looked.features.shape == (40, MOST_DIMENSIONS)
    ratio = torch.pdist(looked.features) / torch.pdist(features)
    assert float(ratio.min()) > 0.85
    assert float(ratio.max()) < 1.15
    assert torch.equal(look(net, data).features, looked.features)


def test_a_network_without_batch_normalisation_has_no_likelihoods() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(432, 7))
    assert look(net, toy_images(5, seed=3)).likelihoods.shape == (5, 0)


def test_the_model_is_left_as_it_was() -> None:
    net = drawn(Net()).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    look(net, toy_images(20, seed=3))
    assert net.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_progress_and_hopeless_input() -> None:
    reports: list[Progress] = []
    net, data = drawn(Net()), toy_images(20, seed=3)
    look(net, data, batch_size=8, on_progress=reports.append, stage="here")
    assert [(r.stage, r.done, r.total) for r in reports] == [("here", done, 20) for done in (8, 16, 20)]
    with pytest.raises(ValueError, match="empty"):
        look(net, data.subset(torch.tensor([], dtype=torch.int64)))
    nn.init.constant_(net.mix.weight, math.nan)
    with pytest.raises(ValueError, match="not all finite"):
        look(net, data)


def test_training_and_looking_are_counted() -> None:
    data = toy_images(64, seed=3)
    view = TrainingView(untrusted=data, build_model=building(data))
    trainer = toy_trainer(epochs=2, batch_size=32)
    with counted_model(view, generator=child(0), trainer=trainer, on_progress=None) as (model, meter):
        look(model, data)
    one = 1 / 3  # the image that shows how the network is wired, here and for the norms
    assert meter.cost.image_passes == pytest.approx(2 * 64 + 64 / 3 + 2 * one)
    given: ImageSet = toy_images(32, seed=4)
    with counted_model(replace(view, model=model, clean=given), generator=child(0), trainer=None, on_progress=None) as (
        same,
        meter,
    ):
        pass
    assert same is model
    assert (meter.cost.image_passes, meter.cost.clean_images) == (0.0, 32)
