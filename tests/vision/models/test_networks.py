from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn

import lustral.vision.models
from lustral.vision.models import (
    VGG,
    FlatPreActResNet18,
    LeNet,
    MobileNet,
    PreActResNet,
    ResNet,
    SmallCNN,
    SmallViT,
    WideResNet,
    build_classifier,
)


def test_exports_are_sorted_and_importable() -> None:
    names = lustral.vision.models.__all__
    assert all(hasattr(lustral.vision.models, name) for name in names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("size", [4, 8, 28, 32, 64])
@pytest.mark.parametrize(
    "network",
    [
        SmallCNN(5, in_channels=1, width=4),
        VGG(11, 5, in_channels=1, width=2),
        PreActResNet(18, 5, 1, width=2),
        PreActResNet(34, 5, 1, width=2, final_norm=True),
        FlatPreActResNet18(5, 1, width=2),
        ResNet(18, 5, 1, width=2),
        ResNet(20, 5, 1, width=3, fc=True),
        WideResNet(16, 5, 1, width=2),
        WideResNet(16, 5, 1, width=2, dropout=30),
        VGG(11, 5, in_channels=1, width=2, dropout=10, silu=True, norm=False),
        MobileNet(5, 1, width=2, repeats=1),
    ],
    ids=lambda network: type(network).__name__,
)
def test_maps_images_of_many_sizes_to_logits(network: nn.Module, size: int) -> None:
    assert network.eval()(torch.zeros(2, 1, size, size)).shape == (2, 5)


def test_a_small_cnn_is_small() -> None:
    assert 50_000 < sum(p.numel() for p in SmallCNN(10).parameters()) < 100_000


@pytest.mark.parametrize("depth", [11, 13, 16, 19])
def test_vgg_has_as_many_layers_with_weights_as_its_name_says(depth: int) -> None:
    layers = [m for m in VGG(depth, 10, width=2).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth - 2  # one linear layer in place of three


def test_vgg16_of_the_paper_has_its_14_7_million_convolution_parameters() -> None:
    convolutions = [m for m in VGG(16, 10).modules() if isinstance(m, nn.Conv2d)]
    assert sum(p.numel() for m in convolutions for p in m.parameters()) == 14_714_688


def test_the_published_preact_resnet18_has_the_public_keys_and_its_last_block_adds_to_the_logits() -> None:
    model = PreActResNet(18, 10)
    state = model.state_dict()
    blocks = [f"layer{group}.{index}" for group in range(1, 5) for index in range(2)]
    norms = [f"{block}.bn{n}" for block in blocks for n in (1, 2)]
    wanted = {
        f"{name}.weight" for name in ["conv1", "linear"] + [f"{block}.conv{n}" for block in blocks for n in (1, 2)]
    }
    wanted |= {f"{norm}.{key}" for norm in norms for key in ("weight", "bias", "running_mean", "running_var")}
    wanted |= {f"layer{group}.0.shortcut.0.weight" for group in (2, 3, 4)} | {"linear.bias"}
    assert {key for key in state if not key.endswith("num_batches_tracked")} == wanted
    assert sum(p.numel() for p in model.parameters()) == 11_171_146  # as BackdoorBench's
    seen: list[Tensor] = []
    model.layer4.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits = model.eval()(torch.randn(2, 3, 32, 32))
    assert torch.allclose(model.linear(seen[0].mean((2, 3))), logits, atol=1e-5)
    assert bool((seen[0] < 0).any())  # nothing rectifies them on the way


def test_the_three_forms_differ_by_keys_alone() -> None:
    flat, normed = FlatPreActResNet18(7, width=2), PreActResNet(18, 7, width=2, final_norm=True)
    normed.load_state_dict(dict(zip(normed.state_dict(), flat.state_dict().values(), strict=True)))
    images = torch.randn(4, 3, 16, 16)
    assert torch.allclose(flat.eval()(images), normed.eval()(images), atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: VGG(12, 10),
        lambda: VGG(11, 10, width=0),
        lambda: SmallCNN(10, width=0),
        lambda: PreActResNet(19, 10),
        lambda: PreActResNet(18, 10, width=0),
        lambda: FlatPreActResNet18(10, width=0),
        lambda: ResNet(19, 10),
        lambda: ResNet(18, 10, width=0),
        lambda: WideResNet(17, 10),
        lambda: LeNet(10, width=0),
        lambda: MobileNet(10, width=0),
        lambda: SmallViT(10, width=0),
        lambda: SmallViT(10, width=100),
    ],
)
def test_bad_arguments_are_refused(build: object) -> None:
    assert callable(build)
    with pytest.raises(ValueError, match=r"expected a (depth|width)"):
        build()


@pytest.mark.parametrize(
    (
        "network",
        "parameters",
    ),  # in print: kuangliu/pytorch-cifar, akamaster/pytorch_resnet_cifar10, the Wide ResNets' paper
    [
        (lambda: ResNet(18, 10), 11_173_962),
        (lambda: ResNet(20, 10), 269_722),
        (lambda: ResNet(56, 10), 853_018),
        (lambda: ResNet(110, 10), 1_727_962),
        (lambda: WideResNet(16, 10, width=1), 175_066),
        (lambda: WideResNet(40, 10, width=2), 2_243_546),
        (lambda: WideResNet(28, 10, width=10), 36_479_194),
        (lambda: MobileNet(10), 3_217_226),  # kuangliu/pytorch-cifar
    ],
)
def test_public_networks_have_as_many_parameters_as_in_print(network: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in network().parameters()) == parameters


def test_a_resnet_of_depth_18_is_torchvisions_but_for_stem_and_names() -> None:
    theirs = torchvision.models.resnet18(num_classes=4)
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    ours, named = ResNet(18, 4), ResNet(18, 4, fc=True, downsample=True)
    names = {key: key.replace("downsample", "shortcut").replace("fc.", "linear.") for key in theirs.state_dict()}
    ours.load_state_dict({names[key]: value for key, value in theirs.state_dict().items()})
    named.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 16, 16)
    for model in (ours, named):
        assert torch.allclose(model.eval()(images), theirs.eval()(images), atol=1e-5)


def test_a_narrow_resnet_widens_with_zeros_on_both_sides() -> None:
    model = ResNet(20, 10)
    block = model.get_submodule("layer2.0")
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 4, 4)
    out = block.eval()(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not bool(out[:, [*range(8), *range(24, 32)]].any())
    assert not any("shortcut" in key for key in model.state_dict())


def test_a_wide_resnet_has_the_public_keys() -> None:
    keys = set(WideResNet(16, 10, width=2).state_dict())
    named = {
        "conv1.weight",
        "block1.layer.0.bn1.weight",
        "block1.layer.0.convShortcut.weight",
        "block3.layer.1.conv2.weight",
    }
    assert named | {"bn1.running_mean", "fc.weight"} <= keys
    assert "block1.layer.0.convShortcut.weight" not in WideResNet(16, 10, width=1).state_dict()


@pytest.mark.parametrize("size", [(8, 8), (28, 28), (32, 32), (20, 36)])
@pytest.mark.parametrize("arch", ["lenet:width=3,dropout=20,tanh=1", "small_vit:width=8,depth=2"])
def test_networks_with_a_layer_per_place_are_built_for_their_images(arch: str, size: tuple[int, int]) -> None:
    model = build_classifier(arch, num_classes=5, image_shape=(1, *size)).eval()
    assert model(torch.zeros(2, 1, *size)).shape == (2, 5)


@pytest.mark.parametrize(
    ("arch", "kind", "count"),
    [
        ("vgg11:width=2", nn.BatchNorm2d, 0),
        ("vgg11_bn:width=2", nn.BatchNorm2d, 8),
        ("vgg11:width=2,silu=1", nn.SiLU, 8),
        ("vgg11_bn:width=2,leaky_relu=1,dropout=30", nn.LeakyReLU, 8),
        ("lenet:width=3,tanh=1", nn.Tanh, 4),
        ("wrn16:width=1,dropout=30", nn.Dropout, 6),
        ("wrn16:width=1", nn.Dropout, 0),
    ],
)
def test_options_choose_what_a_network_is_made_of(arch: str, kind: type[nn.Module], count: int) -> None:
    model = build_classifier(arch, num_classes=5, image_shape=(3, 32, 32))
    assert sum(isinstance(module, kind) for module in model.modules()) == count


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("vgg11:gelu=1,silu=1", "one activation at most; got gelu, silu"),
        ("vgg11:dropout=100", "0 .. 99 percent; got 100"),
        ("vgg11:norm=1", "unknown option 'norm'"),
        ("lenet:image_size=8", "unknown option 'image_size'"),
        ("small_vit:width=100", "a multiple of 32"),
    ],
)
def test_odd_options_are_refused(arch: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_classifier(arch, num_classes=5, image_shape=(3, 32, 32))


def test_a_deep_vgg_without_norm_passes_a_signal() -> None:
    model = build_classifier("vgg19:width=8", num_classes=10, image_shape=(3, 32, 32), mean=[0.5] * 3, std=[0.25] * 3)
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert float(model.eval()(images).detach().std(0).mean()) > 1e-3
