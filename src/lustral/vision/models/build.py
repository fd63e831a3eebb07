"""Build a classifier from the name of its architecture.

* ``preact_resnet18``, ``preact_resnet34``: PreAct-ResNets as in BackdoorBench; ``preact_resnet18:width=16`` has 16 channels in
  its first group instead of 64, ``preact_resnet18:final_norm=1`` a batch normalisation and ReLU after the last block;
* ``preact_resnet18_flat``: the latter under the keys that files of this library had before; takes a width;
* ``resnet18``, ``resnet34``: ResNets with a 3x3 stem for small images; ``resnet20``, ``resnet32``, ``resnet44``, ``resnet56``,
  ``resnet110``: those for CIFAR-10; take a width, and ``fc=1``, ``downsample=1`` for a head and shortcuts so named;
* ``wrn16``, ``wrn28``, ``wrn40``: Wide ResNets; ``wrn28:width=10`` is WRN-28-10;
  ``wrn16:dropout=30`` drops 30 % between the convolutions of a block;
* ``small_cnn``: three convolutions, for digits and tests; takes a width;
* ``vgg11_bn``, ``vgg13_bn``, ``vgg16_bn``, ``vgg19_bn``: VGG for small images; takes a width, ``dropout=30`` (percent),
  and one of ``gelu=1``, ``leaky_relu=1``, ``silu=1``; ``vgg11`` to ``vgg19`` are those without batch normalisation;
* ``lenet``: LeNet-5; takes a width (6), a dropout, and ``tanh=1`` or ``leaky_relu=1``;
* ``mobilenet``: MobileNet for small images; takes a width (32) and ``repeats`` (5) of its middle block;
* ``small_vit``: a vision transformer with patches of 4x4; takes a width (96) and a depth (4);
* ``torchvision:NAME``: a classification network of torchvision, untrained, with torchvision's keys;
* ``timm:NAME``: a network of timm, untrained, with timm's keys;
* ``conditioned:LAYER@BASE``: the network BASE, any of these forms, with a polarizer for each class before its layer LAYER, as
  CNPD writes it (``lustral.vision.models.conditioned``);
* ``path/to/file.py:FUNCTION``: the network that this function or class returns, called with ``num_classes`` if it takes
  that. Building it runs the file, so this form is for a user's own command line and never taken from a model file.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Generator, nn
from torch.overrides import TorchFunctionMode

from lustral.core.limits import LARGEST_IMAGE, LARGEST_NETWORK, MOST_CLASSES, is_image_shape
from lustral.core.randomness import child
from lustral.vision.models.architecture import (
    CONDITIONED,
    LARGEST_OPTION,
    Architecture,
    ConditionedOn,
    PythonFile,
    Registered,
    Timm,
    Torchvision,
    Transformers,
    as_architecture,
    runs_user_code,
)
from lustral.vision.models.classifier import Classifier
from lustral.vision.models.conditioned import Conditioned
from lustral.vision.models.files.hub_folder import build_transformers
from lustral.vision.models.networks.lenet import LeNet
from lustral.vision.models.networks.mobilenet import MobileNet
from lustral.vision.models.networks.preact_resnet import FlatPreActResNet18, PreActResNet
from lustral.vision.models.networks.resnet import ResNet
from lustral.vision.models.networks.small_cnn import SmallCNN
from lustral.vision.models.networks.small_vit import SmallViT
from lustral.vision.models.networks.vgg import VGG
from lustral.vision.models.networks.wide_resnet import WideResNet
from lustral.vision.models.outputs import NoLogitsError

NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "preact_resnet18": partial(PreActResNet, 18),
    "preact_resnet34": partial(PreActResNet, 34),
    "preact_resnet18_flat": FlatPreActResNet18,
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 20, 32, 44, 56, 110)},
    "small_cnn": SmallCNN,
    "vgg11_bn": partial(VGG, 11),
    "vgg13_bn": partial(VGG, 13),
    "vgg16_bn": partial(VGG, 16),
    "vgg19_bn": partial(VGG, 19),
    **{f"vgg{depth}": partial(VGG, depth, norm=False) for depth in (11, 13, 16, 19)},
    "lenet": LeNet,
    "mobilenet": MobileNet,
    "small_vit": SmallViT,
    **{f"wrn{depth}": partial(WideResNet, depth) for depth in (16, 28, 40)},
}
CHEAP_IMAGE = 2**18  # numbers in an image that a network is tried on; 3 x 224 x 224 has 150,528
_SIZE = "image_size"  # networks that have a layer for every place of an image ask for it
_OTHER_FORMS = ("torchvision:NAME", "timm:NAME", f"{CONDITIONED}:LAYER@BASE", "FILE.py:FUNCTION")


def build_classifier(
    arch: str | Architecture,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: Generator | None = None,
    one_logit: bool = False,
) -> Classifier:
    """Build an untrained classifier, in training mode, on the CPU.

    Args:
        arch: one of the forms in this module's docstring; text from a file goes through ``parse_architecture`` first.
        num_classes: number of classes K, at least 2.
        image_shape: (C, H, W) of the images, pixels.
        mean: per channel, on the [0, 1] scale; None: 0.
        std: per channel, on the [0, 1] scale; None: 1.
        generator: seeds the initial weights; None: the same weights every time.
        one_logit: the network's head has one number for two classes (``lustral.vision.models.outputs``).

    Raises:
        ValueError: unknown architecture or option, more than ``LARGEST_NETWORK`` parameters, or a network that does not map
            such images to K logits.
    """
    if num_classes < 2 or (one_logit and num_classes != 2):
        raise ValueError(f"expected at least 2 classes, and 2 with one logit; got {num_classes}")
    arch, rows = as_architecture(arch), 1 if one_logit else num_classes
    if not runs_user_code(arch):
        require_moderate(outline_network(arch, num_classes=rows, image_shape=image_shape), arch)
    network = build_network(arch, num_classes=rows, image_shape=image_shape, generator=generator)
    classifier = with_normalisation(network, image_shape, mean, std, num_classes=num_classes)
    require_logits(classifier, arch, rows=rows, image_shape=image_shape)
    return classifier


def look_at(arch: str | Architecture, *, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Return a network that shows whether ``build_classifier`` would succeed: an outline, or one that a user's code built.

    Raises:
        ValueError: it would not.
    """
    arch = as_architecture(arch)
    if runs_user_code(arch):
        return build_classifier(arch, num_classes=num_classes, image_shape=image_shape)
    network = outline_network(arch, num_classes=num_classes, image_shape=image_shape)
    require_moderate(network, arch)
    outline = with_normalisation(network, image_shape, None, None, num_classes=num_classes).to("meta")
    require_logits(outline, arch, rows=num_classes, image_shape=image_shape)
    return outline


def build_network(
    arch: str | Architecture, *, num_classes: int, image_shape: tuple[int, int, int], generator: Generator | None = None
) -> nn.Module:
    """Build the bare network of ``build_classifier``, without normalisation, and without looking at its size before.

    ``num_classes`` is the number of rows of its head: 1 for a network with one logit.
    """
    return _build(as_architecture(arch), num_classes, image_shape, generator)


def outline_network(arch: str | Architecture, *, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build the bare network on the meta device: names and shapes of its tensors.

    A user's own code builds as ever, but what is put around it is on the meta device.

    Raises:
        ValueError: as ``build_network``.
    """
    return _build(as_architecture(arch), num_classes, image_shape, None, device=torch.device("meta"))


def _build(
    arch: Architecture,
    num_classes: int,
    image_shape: tuple[int, int, int],
    generator: Generator | None,
    *,
    device: torch.device | None = None,
) -> nn.Module:
    if num_classes < 1:
        raise ValueError(f"expected at least 1 row of the head; got {num_classes}")
    if num_classes > MOST_CLASSES:
        raise ValueError(f"expected {MOST_CLASSES:,} classes at most; got {num_classes:,}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"expected an image shape (channels, height, width); got {image_shape}")
    if not is_image_shape(image_shape):
        raise ValueError(f"expected images of {LARGEST_IMAGE:,} numbers at most; got the shape {image_shape}")
    build = _builder(arch, num_classes, image_shape, device)
    seed = int(torch.randint(2**62, (), generator=generator if generator is not None else child(0, "initial weights")))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            network = build()
        except ValueError:
            raise
        except Exception as error:  # the user's code and that of other libraries may raise anything
            raise ValueError(f"building {arch} failed: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{arch} returned a {type(network).__name__}; expected a torch.nn.Module")
    return network


def require_moderate(outline: nn.Module, arch: Architecture) -> None:
    """Refuse a network of more than ``LARGEST_NETWORK`` parameters."""
    count = sum(parameter.numel() for parameter in outline.parameters())
    if count > LARGEST_NETWORK:
        raise ValueError(f"{arch} would have {count:,} parameters; expected {LARGEST_NETWORK:,} at most")


def require_logits(classifier: Classifier, arch: Architecture, *, rows: int, image_shape: tuple[int, int, int]) -> None:
    """Refuse a classifier that does not give one logit per class; tried on one image, a large one without numbers.

    Args:
        classifier: the classifier, which knows its number of classes.
        arch: its architecture.
        rows: of its head; 1 where one logit stands for two classes.
        image_shape: (C, H, W) of its images.

    Raises:
        ValueError: it gives another number of logits, or does not take such images.
    """
    wanted = max(rows, 2)
    if math.prod(image_shape) > CHEAP_IMAGE and not runs_user_code(arch):
        outline = outline_network(arch, num_classes=rows, image_shape=image_shape)
        classifier = with_normalisation(outline, image_shape, None, None, num_classes=wanted).to("meta")
    found = count_logits(classifier, image_shape)
    if found != wanted:
        raise ValueError(f"{arch} gives {found} logits; expected {wanted}, one per class")


def with_normalisation(
    network: nn.Module,
    image_shape: tuple[int, int, int],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    *,
    num_classes: int,
) -> Classifier:
    """Put the normalisation in front of a network for images of (C, H, W); one number per channel each, None: 0 and 1."""
    channels = image_shape[0]
    constants = {"mean": tuple(mean or (0.0,) * channels), "std": tuple(std or (1.0,) * channels)}
    for name, values in constants.items():
        if len(values) != channels:
            raise ValueError(f"expected {channels} numbers in {name}, one per channel; got {len(values)}")
    return Classifier(network, **constants, num_classes=num_classes)


def count_logits(classifier: Classifier, image_shape: tuple[int, int, int]) -> int:
    """Return the number of logits that a classifier gives for one image of (C, H, W).

    Raises:
        ValueError: it does not take such images, or returns no logits.
    """
    in_training = [module for module in classifier.modules() if module.training]
    classifier.eval()
    try:
        with torch.no_grad():  # inference mode would spoil what a network may cache
            logits = classifier(classifier.normalise.mean.new_zeros(1, *image_shape))
    except NoLogitsError:
        raise
    except Exception as error:  # the network may be anyone's
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the network does not take images of shape {image_shape}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        for module in in_training:
            module.training = True
    return int(logits.shape[1])


def _builder(
    arch: Architecture, num_classes: int, image_shape: tuple[int, int, int], device: torch.device | None
) -> Callable[[], nn.Module]:
    """Return what builds the network, on the device or where torch puts it, having looked up its name and its options."""
    match arch:
        case ConditionedOn(layer, base):
            build_base = _builder(base, num_classes, image_shape, device)
            return lambda: Conditioned(build_base(), layer, max(num_classes, 2), device=device)
        case PythonFile(file, function):
            return partial(_from_python_file, Path(file), function, num_classes)
        case Torchvision(name):
            build = _from_torchvision(name, num_classes, image_shape)
        case Timm(name):
            build = _from_timm(name, num_classes, image_shape)
        case Transformers():
            build = build_transformers(arch, num_classes, image_shape)
        case Registered(name):
            if name not in NETWORKS:
                known = ", ".join([*NETWORKS, *_OTHER_FORMS])
                raise ValueError(f"unknown architecture {str(arch)!r}; known: {known}{_suggest(name, NETWORKS)}")
            network, options = NETWORKS[name], _checked_options(arch)
            sized = {_SIZE: image_shape[1:]} if _SIZE in inspect.signature(network).parameters else {}
            build = partial(network, num_classes=num_classes, in_channels=image_shape[0], **sized, **options)
    return build if device is None else partial(_on_meta, build)


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network without memory for its tensors."""
    try:
        with torch.device("meta"):
            return build()
    except RuntimeError:  # it computes with small tensors while it is built, as torchvision's RegNets do
        with _LargeOnMeta():
            return build().to("meta")


class _LargeOnMeta(TorchFunctionMode):
    """Within the block, what torch makes by size alone has no memory, unless it is small."""

    _makers = frozenset({torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn})
    _small = 4096  # numbers

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._makers and kwargs.get("device") is None:
            outline = func(*args, **{**kwargs, "device": "meta"})
            if outline.numel() > self._small:
                return outline
        return func(*args, **kwargs)


def _checked_options(arch: Registered) -> dict[str, int]:
    """Return the options by name; a parameter whose type is bool takes 0 and 1."""
    parameters = inspect.signature(NETWORKS[arch.name]).parameters
    allowed = parameters.keys() - {"num_classes", "in_channels", "norm", _SIZE}
    options: dict[str, int] = {}
    for name, value in arch.options:
        if name not in allowed:
            known = ", ".join(sorted(allowed))
            raise ValueError(f"unknown option {name!r} in {str(arch)!r}; known: {known}{_suggest(name, allowed)}")
        is_switch = parameters[name].annotation in (bool, "bool")  # a text where annotations are postponed
        least, most = (0, 1) if is_switch else (1, LARGEST_OPTION)
        if not least <= value <= most:
            raise ValueError(f"expected {name}={least} .. {most} in {str(arch)!r}; got {name}={value}")
        options[name] = bool(value) if is_switch else value
    return options


def _from_torchvision(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> Callable[[], nn.Module]:
    from torchvision import models

    names = models.list_models(module=models)  # classification only
    if name not in names:
        raise ValueError(f"unknown torchvision classifier {name!r}{_suggest(name, names)}")
    if image_shape[0] != 3:
        raise ValueError(
            f"torchvision:{name} takes images of 3 channels; got {image_shape[0]}; timm:NAME takes any number"
        )
    size = {"image_size": image_shape[1]} if name.startswith("vit_") else {}
    scheme = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}  # what they warn will change
    return partial(models.get_model, name, weights=None, num_classes=num_classes, **size, **scheme)


def _from_timm(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> Callable[[], nn.Module]:
    import timm

    if not timm.is_model(name):  # keeps out "hf-hub:..." and "local-dir:...", which would fetch or open files
        raise ValueError(f"unknown timm model {name!r}{_suggest(name, timm.list_models())}")
    channels, *size = image_shape
    create = partial(timm.create_model, name, pretrained=False, num_classes=num_classes, in_chans=channels)

    def build() -> nn.Module:
        network: nn.Module
        try:
            network = create(img_size=tuple(size))
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            network = create()  # a network for any size
        return network

    return build


def _from_python_file(file: Path, function: str, num_classes: int) -> nn.Module:
    """Run the user's own file as ``python FILE`` would, and call one of its functions."""
    if not file.is_file():
        raise ValueError(f"no such Python file: {file}")
    spec = importlib.util.spec_from_file_location(f"lustral_user_file_{file.stem}", file)
    assert spec is not None  # it ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with _importable(file.parent):
        spec.loader.exec_module(module)
        build = getattr(module, function, None)
        if not callable(build):
            names = [name for name, value in vars(module).items() if callable(value)]
            raise ValueError(f"{file} has no function {function!r}{_suggest(function, names)}")
        parameters = inspect.signature(build).parameters.values()
        takes_classes = any(p.name == "num_classes" or p.kind is p.VAR_KEYWORD for p in parameters)
        network: nn.Module = build(num_classes=num_classes) if takes_classes else build()
    return network


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let a user's file import its neighbours, for as long as it runs."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)


def _suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?", or nothing when no known name is close."""
    close = difflib.get_close_matches(name, sorted(known))
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
