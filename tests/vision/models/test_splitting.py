"""Cutting a network in two: where it can be done, which tensors lie behind the cut, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from lustral.core.randomness import child
from lustral.vision.models import Classifier, build_classifier
from lustral.vision.models.splitting import copy_stem, cut_points, split_at, tapped

IMAGES = torch.rand(1, 3, 32, 32, generator=child(0))


def network(arch: str, seed: int = 0) -> Classifier:
    return build_classifier(arch, num_classes=4, image_shape=(3, 32, 32), generator=child(seed))


@pytest.mark.parametrize(
    ("arch", "name", "shape", "behind"),
    [
        ("wrn16", "network.block3.layer.0", (64, 8, 8), {"block3.layer.1", "bn1", "fc"}),  # the published stem 5
        ("preact_resnet18:width=4", "network.layer4.0", (32, 4, 4), {"layer4.1", "linear"}),
        ("preact_resnet18_flat:width=4", "network.blocks.6", (32, 4, 4), {"blocks.7", "bn", "linear"}),
        ("resnet18:width=4", "network.layer4.0", (32, 4, 4), {"layer4.1", "linear"}),
        ("resnet20:width=4", "network.layer3.1", (16, 8, 8), {"layer3.2", "linear"}),
        ("vgg11_bn:width=4", "network.features.24", (32, 2, 2), {"features.25", "features.26", "linear"}),
        ("small_cnn:width=4", "network.features.7", (8, 8, 8), {"features.8", "features.9", "linear"}),
    ],
)
def test_the_default_cut_of_each_family(arch: str, name: str, shape: tuple[int, ...], behind: set[str]) -> None:
    model = network(arch)
    split = split_at(model, IMAGES)
    assert (split.name, split.shape) == (name, shape)
    tensors = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    expected = {tensor for tensor in tensors if any(tensor.startswith(f"network.{part}.") for part in behind)}
    assert split.head_tensors == expected


def test_the_stem_of_a_deep_resnet_is_the_published_one() -> None:
    model = torchvision.models.resnet34(num_classes=4)
    assert split_at(model, IMAGES).name == "layer4.1"  # option 31


def test_the_parts_of_a_family_can_all_be_named() -> None:
    points = cut_points(network("wrn16"), IMAGES)
    named = ["network.conv1", *(f"network.block{group}.layer.{block}" for group in (1, 2, 3) for block in (0, 1))]
    assert [point for point in points if point in named] == named
    assert {"network.block1", "network.block2", "network.block3"} <= set(points)
    # inside a block the shortcut goes past; before the stem's first weight there is nothing to keep
    assert not {"network.block3.layer.1.conv1", "network.block3.layer.1.bn1", "network.normalise"} & set(points)


@pytest.mark.parametrize("arch", ["wrn16", "vgg11_bn:width=4", "small_cnn:width=4"])
def test_the_head_sees_of_an_image_what_the_stem_gives(arch: str) -> None:
    """Behind any cut, images of equal features have equal logits: the head works on the features alone."""
    model = network(arch).eval()
    other = torch.rand(1, 3, 32, 32, generator=child(1))
    for name in cut_points(model, IMAGES):
        with torch.no_grad(), tapped(model, name) as seen:
            wanted = model(IMAGES)
        handle = model.get_submodule(name).register_forward_hook(lambda *_, features=seen[0]: features)
        with torch.no_grad():
            assert torch.equal(model(other), wanted), name
        handle.remove()


def test_a_name_may_leave_out_where_the_network_stands() -> None:
    model = network("wrn16")
    assert split_at(model, IMAGES, "block2") == split_at(model, IMAGES, "network.block2")
    assert split_at(model, IMAGES, "block2").shape == (32, 16, 16)


@pytest.mark.parametrize("name", ["block3.layer.1.conv1", "fc", "nothing", "normalise", ""])
def test_where_nothing_can_be_cut_the_cut_points_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"got '.*{name}'.* cut behind: network.conv1, network.block1.layer.0,"):
        split_at(network("wrn16"), IMAGES, name)


def test_a_network_without_feature_maps_is_refused_with_what_can_be_done() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"found no place .* none; use another architecture"):
        split_at(flat, IMAGES)
    with pytest.raises(ValueError, match="found no place"):
        split_at(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), IMAGES)
    one = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 2))
    with pytest.raises(ValueError, match="shall end with, among: 0, 1"):
        split_at(one, IMAGES)
    assert split_at(one, IMAGES, "1").head_tensors == {"3.weight", "3.bias"}


def test_a_transformer_is_not_cut_behind_its_first_layer() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    with pytest.raises(ValueError, match="among: conv_proj"):
        split_at(model, IMAGES)


class Odd(nn.Module):
    """A branch that is not used, a bare parameter in the head, work in place, and a layer that both parts use."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.last, self.unused = nn.BatchNorm2d(4), nn.Linear(4, 2), nn.Linear(1, 1)
        self.scale, self.shared = nn.Parameter(torch.ones(1)), shared

    def forward(self, images: Tensor) -> Tensor:
        out = self.second(F.relu(self.norm(self.first(images)), inplace=True))
        if self.shared:
            out = F.conv_transpose2d(out, self.first.weight).repeat(1, 2, 1, 1)[:, :4]
        logits: Tensor = self.last(self.scale * out.mean((2, 3)))
        return logits


def test_tensors_go_where_gradients_say() -> None:
    model = Odd(shared=False)
    assert split_at(model, IMAGES, "norm").head_tensors == {
        "second.weight", "second.bias", "last.weight", "last.bias", "scale"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"shares first\.weight with"):
        split_at(Odd(shared=True), IMAGES, "norm")


def test_what_is_tapped_is_not_changed_by_layers_that_work_in_place() -> None:
    model = Odd(shared=False).eval()
    with torch.no_grad(), tapped(model, "norm") as seen:
        model(IMAGES)
        expected = model.norm(model.first(IMAGES))
    assert torch.equal(seen[0], expected)
    assert float(seen[0].min()) < 0


def test_looking_leaves_no_trace() -> None:
    model = network("wrn16").train()
    model.network.get_submodule("conv1").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    split_at(model, IMAGES)
    cut_points(model, IMAGES)
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["network.conv1.weight"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_copying_the_stem_copies_all_but_the_head() -> None:
    source, target, before = network("wrn16", 1), network("wrn16", 2), network("wrn16", 2)
    source.get_buffer("network.bn1.running_mean").add_(1)
    source.get_buffer("network.block1.layer.0.bn1.running_mean").add_(1)
    split = split_at(source, IMAGES)
    copy_stem(source, target, split)
    for name, value in target.state_dict().items():
        origin = before if name in split.head_tensors else source
        assert torch.equal(value, origin.state_dict()[name]), name
    assert not torch.equal(target.network.get_parameter("fc.weight"), source.network.get_parameter("fc.weight"))
