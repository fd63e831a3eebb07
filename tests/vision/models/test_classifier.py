"""The classifier around anybody's network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.training import Trainer
from lustral.vision.models import Classifier
from lustral.vision.purifiers import FineTuning
from lustral.vision.records import DefenderView, ImageSet


class ViewingNet(nn.Module):
    """A network that flattens with ``view``, as LeNets do; works on contiguous maps alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6 * 4 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm(self.first(x)))
        out = F.max_pool2d(F.relu(self.second(out)), 2)
        logits: Tensor = self.head(out.view(-1, 6 * 4 * 4))
        return logits


def classifier_of(channels: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Classifier(ViewingNet(channels), (0.0,) * channels, (1.0,) * channels).eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_calls_view_works_in_any_memory_format(channels: int) -> None:
    model = classifier_of(channels)
    images = torch.rand(5, channels, 8, 8, generator=child(0, "images"))
    expected = model.network(images)
    for inference in (True, False):
        fresh = copy.deepcopy(model).to(memory_format=torch.channels_last)
        with torch.inference_mode(inference):
            logits = fresh(images.contiguous(memory_format=torch.channels_last))
            again = fresh(images.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(again, expected)
        assert not any(parameter.is_inference() for parameter in fresh.parameters())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_that_calls_view_can_be_trained_and_repaired(channels: int) -> None:
    labels = torch.arange(4).repeat(12)
    images = torch.randint(0, 64, (48, channels, 8, 8), dtype=torch.uint8, generator=child(0, "images"))
    images[torch.arange(48), :, labels * 2] = 255  # a bright row for each class
    data = ImageSet(images=images, labels=labels, num_classes=4)
    trainer = Trainer(epochs=15, batch_size=12, learning_rate=0.1, precision="float32")
    trained = trainer.fit(classifier_of(channels), data, generator=child(0, "train"))
    view = DefenderView(model=trained, clean=data)
    repaired = FineTuning(trainer=Trainer(epochs=1, batch_size=12, learning_rate=0.01)).purify(
        view, generator=child(0, "erase")
    )
    x, y, _ = next(data.batches(48))
    assert float((repaired.model(x).argmax(1) == y).float().mean()) > 0.9


def test_other_errors_of_a_network_are_its_own() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("out of ideas")

    with pytest.raises(RuntimeError, match="out of ideas"):
        Classifier(Broken(), (0.0,), (1.0,))(torch.zeros(1, 1, 4, 4))
