"""Finding layers by watching a pass."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision
from torch import nn

from lustral.core.randomness import child
from lustral.vision.models import Classifier, build_classifier
from lustral.vision.models.wiring import late_layer, trace

IMAGES = torch.rand(1, 3, 32, 32, generator=child(0))


@pytest.mark.parametrize(
    ("arch", "late", "head"),
    [
        (
            "preact_resnet18:width=4",
            "network.layer4.1.conv1",
            "network.linear",
        ),  # the published place of Neural Polarizer
        ("preact_resnet18_flat:width=4", "network.blocks.7.conv1", "network.linear"),
        ("vgg16_bn:width=4", "network.features.40", "network.linear"),
        ("small_cnn:width=4", "network.features.8", "network.linear"),
        ("torchvision:resnet18", "network.layer4.1.conv1", "network.fc"),
        ("torchvision:convnext_tiny", "network.features.7.2.block.5", "network.classifier.2"),
    ],
)
def test_the_late_layer_of_each_family(arch: str, late: str, head: str) -> None:
    model = build_classifier(arch, num_classes=4, image_shape=(3, 32, 32), generator=child(0))
    wiring = trace(model, IMAGES)
    assert (late_layer(model, wiring), wiring.head) == (late, head)


def test_the_late_layer_of_a_transformer() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=4)
    wiring = trace(model, IMAGES)
    assert (late_layer(model, wiring), wiring.head) == ("blocks.11.mlp.fc1", "head")
    assert not wiring.normed


def test_norms_go_with_the_layer_whose_output_they_take() -> None:
    model = build_classifier("preact_resnet18:width=4", num_classes=4, image_shape=(3, 32, 32), generator=child(0))
    normed = trace(model, IMAGES).normed
    # before activation: the output of a block's first convolution is normalised, that of the second is added to the shortcut
    blocks = [f"network.layer{group}.{index}" for group in range(1, 5) for index in range(2)]
    assert normed == {f"{block}.conv1": f"{block}.bn2" for block in blocks} | {"network.conv1": f"{blocks[0]}.bn1"}
    resnet = torchvision.models.resnet18(num_classes=4)
    normed = trace(resnet, IMAGES).normed
    assert normed["layer1.0.conv2"] == "layer1.0.bn2"
    assert normed["layer2.0.downsample.0"] == "layer2.0.downsample.1"


def test_layers_come_in_the_order_of_use() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.second, self.first, self.unused = nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.second(self.first(self.first(x[..., :3])[..., :3]))
            return out

    wiring = trace(Crossed(), torch.zeros(1, 3))
    assert (wiring.layers, wiring.head) == (("first",), "second")


def test_a_pass_leaves_no_trace() -> None:
    model = build_classifier("small_cnn:width=4", num_classes=4, image_shape=(3, 32, 32), generator=child(0)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace(model, IMAGES)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="convolutions or linear layers"):
        trace(nn.Flatten(), IMAGES)
    alone = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    with pytest.raises(ValueError, match="before its head"):
        late_layer(alone, trace(alone, IMAGES))


def test_the_head_gives_the_logits_whatever_is_used_after_it() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.main, self.aux = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            features = self.body(x).mean((2, 3))
            return {"logits": self.main(features), "aux": self.aux(features)}

    wiring = trace(Classifier(Auxiliary(), [0.0] * 3, [1.0] * 3, num_classes=5), IMAGES)
    assert (wiring.layers, wiring.head) == (("network.body",), "network.main")


def test_the_last_layer_is_the_head_of_a_network_that_changes_its_outputs() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Linear(4, 2), nn.LogSoftmax(1))
    assert trace(model, IMAGES).head == "2"
