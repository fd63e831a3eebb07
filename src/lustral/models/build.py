"""Build a classifier from the name of its architecture.

* ``preact_resnet18``, ``preact_resnet34``: PreAct-ResNets as in BackdoorBench; ``preact_resnet18:width=16`` has 16 channels in
  its first group instead of 64, ``preact_resnet18:final_norm=1`` a batch normalisation and ReLU after the last block;
* ``preact_resnet18_flat``: the latter under the keys that files of this library had before; takes a width;
* ``small_cnn``: three convolutions, for digits and tests; takes the same option;
* ``vgg11_bn``, ``vgg13_bn``, ``vgg16_bn``, ``vgg19_bn``: VGG for small images; takes the same option;
* ``torchvision:NAME``: a classification network of torchvision, untrained, with torchvision's keys;
* ``timm:NAME``: a network of timm, untrained, with timm's keys;
* ``conditioned:LAYER@BASE``: the network BASE, any of these forms, with a polarizer for each class before its layer LAYER, as
  CNPD writes it (``lustral.models.conditioned``);
* ``path/to/file.py:FUNCTION``: the network that this function or class returns, called with ``num_classes`` if it takes
  that. Building it runs the file, so this form is for a user's own command line and never taken from a model file.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Generator, nn

from lustral.models.architecture import (
    CONDITIONED,
    LARGEST_OPTION,
    Architecture,
    ConditionedOn,
    PythonFile,
    Registered,
    Timm,
    Torchvision,
    as_architecture,
)
from lustral.models.classifier import Classifier
from lustral.models.conditioned import Conditioned
from lustral.models.preact_resnet import FlatPreActResNet18, PreActResNet
from lustral.models.small_cnn import SmallCNN
from lustral.models.vgg import VGG
from lustral.randomness import child

NETWORKS: Mapping[str, Callable[..., nn.Module]] = {
    "preact_resnet18": partial(PreActResNet, 18),
    "preact_resnet34": partial(PreActResNet, 34),
    "preact_resnet18_flat": FlatPreActResNet18,
    "small_cnn": SmallCNN,
    "vgg11_bn": partial(VGG, 11),
    "vgg13_bn": partial(VGG, 13),
    "vgg16_bn": partial(VGG, 16),
    "vgg19_bn": partial(VGG, 19),
}
_OTHER_FORMS = ("torchvision:NAME", "timm:NAME", f"{CONDITIONED}:LAYER@BASE", "FILE.py:FUNCTION")


def build_classifier(
    arch: str | Architecture,
    *,
    num_classes: int,
    image_shape: tuple[int, int, int],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    generator: Generator | None = None,
) -> Classifier:
    """Build an untrained classifier, in training mode, on the CPU.

    Args:
        arch: one of the forms in this module's docstring; text from a file goes through ``parse_architecture`` first.
        num_classes: number of classes K, at least 2.
        image_shape: (C, H, W) of the images, pixels.
        mean: per channel, on the [0, 1] scale; None: 0.
        std: per channel, on the [0, 1] scale; None: 1.
        generator: seeds the initial weights; None: the same weights every time.

    Raises:
        ValueError: unknown architecture or option, or a network that does not map such images to K logits.
    """
    network = build_network(arch, num_classes=num_classes, image_shape=image_shape, generator=generator)
    channels = image_shape[0]
    constants = {"mean": tuple(mean or (0.0,) * channels), "std": tuple(std or (1.0,) * channels)}
    for name, values in constants.items():
        if len(values) != channels:
            raise ValueError(f"expected {channels} numbers in {name}, one per channel; got {len(values)}")
    classifier = Classifier(network, **constants)
    found = count_logits(classifier, image_shape)
    if found != num_classes:
        raise ValueError(f"{arch} gives {found} logits; expected {num_classes}, one per class")
    return classifier


def build_network(
    arch: str | Architecture, *, num_classes: int, image_shape: tuple[int, int, int], generator: Generator | None = None
) -> nn.Module:
    """Build the bare network of ``build_classifier``, without normalisation and without trying it on an image."""
    if num_classes < 2:
        raise ValueError(f"expected at least 2 classes; got {num_classes}")
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"expected an image shape (channels, height, width); got {image_shape}")
    build = _builder(as_architecture(arch), num_classes, image_shape)
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


def count_logits(classifier: Classifier, image_shape: tuple[int, int, int]) -> int:
    """Return the number of logits that a classifier gives for one image of (C, H, W).

    Raises:
        ValueError: it does not take such images, or does not return a (B, K) tensor.
    """
    in_training = [module for module in classifier.modules() if module.training]
    classifier.eval()
    try:
        with torch.no_grad():  # inference mode would spoil what a network may cache
            logits = classifier(classifier.normalise.mean.new_zeros(1, *image_shape))
    except Exception as error:  # the network may be anyone's
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the network does not take images of shape {image_shape}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        for module in in_training:
            module.training = True
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2 or len(logits) != 1:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise ValueError(f"the network must map images (B, C, H, W) to logits (B, K); for one image it gave {got}")
    return logits.shape[1]


def _builder(arch: Architecture, num_classes: int, image_shape: tuple[int, int, int]) -> Callable[[], nn.Module]:
    """Return what builds the network, having looked up its name and its options."""
    match arch:
        case ConditionedOn(layer, base):
            build_base = _builder(base, num_classes, image_shape)
            return lambda: Conditioned(build_base(), layer, num_classes)
        case PythonFile(file, function):
            return partial(_from_python_file, Path(file), function, num_classes)
        case Torchvision(name):
            return _from_torchvision(name, num_classes, image_shape)
        case Timm(name):
            return _from_timm(name, num_classes, image_shape)
        case Registered(name):
            if name not in NETWORKS:
                known = ", ".join([*NETWORKS, *_OTHER_FORMS])
                raise ValueError(f"unknown architecture {str(arch)!r}; known: {known}{_suggest(name, NETWORKS)}")
            network, options = NETWORKS[name], _checked_options(arch)
            return partial(network, num_classes=num_classes, in_channels=image_shape[0], **options)


def _checked_options(arch: Registered) -> dict[str, int]:
    """Return the options by name; a parameter whose type is bool takes 0 and 1."""
    parameters = inspect.signature(NETWORKS[arch.name]).parameters
    allowed = parameters.keys() - {"num_classes", "in_channels"}
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
    return partial(models.get_model, name, weights=None, num_classes=num_classes, **size)


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
