"""Logits in whatever a network returns."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lustral.core.randomness import child
from lustral.vision.models import Classifier, build_classifier, load_model, save_model
from lustral.vision.models.outputs import NoLogitsError, logits_in
from lustral.vision.purifiers import FineTuning, NeuralPolarizer
from lustral.vision.records import DefenderView

LOGITS = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
FEATURES, MAPS, OTHER = torch.zeros(2, 5), torch.zeros(2, 3, 4, 4), torch.ones(2, 3)
Named = namedtuple("Named", ["aux", "logits"])


@dataclass
class Output:
    """An object as of a transformer."""

    loss: Tensor
    hidden_states: tuple[Tensor, ...]
    logits: Tensor


class ModelOutput(OrderedDict[str, Any]):
    """A mapping as of a transformer."""


class Plain:
    def __init__(self) -> None:
        self.features, self.out = FEATURES, LOGITS


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        LOGITS[:, :, None, None],
        (LOGITS, OTHER),
        [LOGITS, OTHER],
        (LOGITS, (OTHER, [OTHER])),
        (torch.tensor(0.5), LOGITS),
        (MAPS, LOGITS),
        (FEATURES, LOGITS),  # as wide as there are classes
        (torch.zeros(2, 3, dtype=torch.int64), LOGITS),
        {"aux": OTHER, "out": LOGITS},
        {"loss": torch.tensor(0.5), "mine": LOGITS},
        {"model": {"output": LOGITS}},
        Named(aux=OTHER, logits=LOGITS),
        Output(torch.tensor(0.5), (MAPS, FEATURES), LOGITS),
        ModelOutput(hidden=FEATURES, logits=LOGITS),
        Plain(),
    ],
    ids=lambda output: type(output).__name__,  # the same in every worker
)
def test_logits_are_found(output: Any) -> None:
    assert torch.equal(logits_in(output, 2, 3), LOGITS)


@pytest.mark.parametrize(
    "output", [Named(aux=FEATURES, logits=LOGITS), {"x": FEATURES, "pred": LOGITS}, (LOGITS, FEATURES)]
)
def test_without_a_number_of_classes_a_telling_name_counts_then_the_order(output: Any) -> None:
    assert torch.equal(logits_in(output, 2), LOGITS)


@pytest.mark.parametrize("form", [lambda z: z, lambda z: z[:, None], lambda z: (z, FEATURES), lambda z: {"logits": z}])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_logit_is_two_classes(form: Any, batch: int) -> None:
    z = torch.tensor([4.0, -1.0])[:batch]
    output = form(z) if batch == 2 or not isinstance(form(z), tuple) else (z, FEATURES[:1])
    assert torch.equal(logits_in(output, batch, 2), torch.stack([torch.zeros(batch), z], 1))


def test_a_squeezed_row_is_a_row() -> None:
    assert torch.equal(logits_in(LOGITS[0], 1, 3), LOGITS[:1])


@pytest.mark.parametrize(
    "output", [None, "logits", MAPS, (), {"logits": MAPS}, [[[[LOGITS]]]], torch.zeros(3, 3), torch.zeros(2, 0)]
)
def test_what_holds_no_logits_is_refused(output: Any) -> None:
    with pytest.raises(NoLogitsError, match="the network must return logits"):
        logits_in(output, 2)


def test_auxiliary_heads_in_training_do_not_matter() -> None:
    model = build_classifier("torchvision:googlenet", num_classes=3, image_shape=(3, 48, 48), generator=child(0))
    images = torch.rand(2, 3, 48, 48, generator=child(1))
    assert type(model.train().network(images)).__name__ == "GoogLeNetOutputs"
    assert model(images).shape == model.eval()(images).shape == (2, 3)


class Head(nn.Module):
    """A network with one logit or as many as classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(self.conv(x).mean((2, 3)))
        return out


FILE = """
from torch import nn
def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
def one():
    return net(1)
"""


@pytest.mark.parametrize("function", ["net", "one"])
@pytest.mark.parametrize("asked", [None, 2])
def test_a_head_with_one_logit_loads_and_keeps_its_keys(tmp_path: Path, function: str, asked: int | None) -> None:
    (tmp_path / "one_logit_net.py").write_text(FILE)
    arch = f"{tmp_path / 'one_logit_net.py'}:{function}"
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    torch.save(network.state_dict(), tmp_path / "given.pth")
    loaded = load_model(
        tmp_path / "given.pth", arch=arch, num_classes=asked, image_shape=(3, 8, 8), mean=[0.5] * 3, std=[0.5] * 3
    )
    assert loaded.num_classes == 2
    images = torch.rand(5, 3, 8, 8, generator=child(0))
    z = network(2 * images - 1)
    assert torch.allclose(loaded.model(images), torch.cat([torch.zeros(5, 1), z], 1), atol=1e-6)
    for name in ("again.pth", "again.safetensors"):
        save_model(tmp_path / name, loaded.model, arch=arch, image_shape=(3, 8, 8), layout=loaded.layout)
        again = load_model(tmp_path / name, arch=arch, image_shape=(3, 8, 8), mean=[0.5] * 3, std=[0.5] * 3)
        assert again.num_classes == 2
        assert all(
            torch.equal(value, network.state_dict()[key]) for key, value in again.model.network.state_dict().items()
        )


def test_one_logit_in_a_registered_network(tmp_path: Path) -> None:
    model = build_classifier("small_cnn:width=2", num_classes=2, image_shape=(3, 8, 8), one_logit=True).eval()
    assert model.network.state_dict()["linear.weight"].shape[0] == 1
    save_model(tmp_path / "a.safetensors", model, arch="small_cnn:width=2", image_shape=(3, 8, 8))
    loaded = load_model(tmp_path / "a.safetensors")
    images = torch.rand(5, 3, 8, 8, generator=child(0))
    assert loaded.num_classes == 2
    assert torch.equal(loaded.model(images), model(images))
    with pytest.raises(ValueError, match="2 with one logit"):
        build_classifier("small_cnn", num_classes=3, image_shape=(3, 8, 8), one_logit=True)


def test_the_number_of_classes_tells_logits_from_features() -> None:
    class Both(Head):
        def forward(self, x: Tensor) -> Any:
            return self.conv(x).mean((2, 3)), super().forward(x)

    images = torch.rand(2, 3, 8, 8, generator=child(0))
    network = Both(3)
    found = Classifier(network, [0.0] * 3, [1.0] * 3, num_classes=3)(images)
    assert torch.equal(found, network(images)[1])


@pytest.mark.parametrize(
    "method", [FineTuning(), NeuralPolarizer(least_steps=4)], ids=lambda method: type(method).__name__
)
def test_a_network_with_auxiliary_outputs_is_repaired(method: Any, toy_view: DefenderView) -> None:
    class Auxiliary(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.aux = inner, nn.Linear(7, 7)

        def forward(self, x: Tensor) -> Any:
            logits = self.inner(x)
            return Named(aux=self.aux(logits), logits=logits) if self.training else {"out": logits}

    given = toy_view.model
    assert isinstance(given, Classifier)
    mean, std = (tensor.flatten().tolist() for tensor in (given.normalise.mean, given.normalise.std))
    model = Classifier(Auxiliary(copy.deepcopy(given.network)), mean, std, num_classes=7).eval()
    short = replace(method, trainer=replace(method.trainer, epochs=1))
    purified = short.purify(DefenderView(model=model, clean=toy_view.clean), generator=child(0))
    assert (purified.history[-1].clean_accuracy or 0.0) > 0.8
    assert set(purified.model.state_dict()) == set(model.state_dict())
