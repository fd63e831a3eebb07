"""Which form of a network some weights belong to, told by their keys, and which other network they fit better.

People call forms of a network by one name: with and without a last normalisation, with a head called ``fc`` or ``linear``. Files
of this library written when ``preact_resnet18`` meant another network record that name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cache

import torch
from torch import nn

from lustral.vision.models.architecture import Architecture, ConditionedOn, Registered

_SWITCHES = (  # how a network's name begins, an option, and the end of a key that turns it on
    ("preact_resnet", "final_norm", "bn.weight"),
    ("resnet", "fc", "fc.weight"),
    ("resnet", "downsample", "downsample.0.weight"),
    ("vgg", "classifier", "classifier.weight"),
)
_EARLIER = (
    "preact_resnet18",
    "blocks.0.conv1.weight",
    "preact_resnet18_flat",
)  # the name, a key, and the name for such files
_FITS = 0.9  # least share of keys in common of those that either side has, for a suggestion
_TORCHVISION = (  # common ones; to build all eighty for a message takes too long
    *(
        "resnet18",
        "resnet34",
        "resnet50",
        "vgg11_bn",
        "vgg16",
        "vgg16_bn",
        "vgg19",
        "vgg19_bn",
        "alexnet",
        "densenet121",
    ),
    *("densenet161", "googlenet", "mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small", "efficientnet_b0"),
    *("efficientnet_b3", "shufflenet_v2_x1_0", "squeezenet1_0", "convnext_tiny", "vit_b_16", "swin_t"),
)


def by_keys(arch: Architecture, keys: Collection[str]) -> Architecture:
    """Return the form of ``arch`` that has such keys; ``arch`` itself where it has one form, or its options say which.

    Args:
        arch: the architecture, inside of conditioned ones too.
        keys: names of the tensors in a file, with whatever prefix.

    >>> str(by_keys(Registered("preact_resnet18", (("width", 16),)), ["conv1.weight", "blocks.0.conv1.weight"]))
    'preact_resnet18_flat:width=16'
    >>> str(by_keys(Registered("preact_resnet18"), ["module.layer1.0.conv1.weight", "module.bn.weight"]))
    'preact_resnet18:final_norm=1'
    """
    if isinstance(arch, ConditionedOn):
        return replace(arch, base=by_keys(arch.base, keys))
    if not isinstance(arch, Registered):
        return arch
    name, key, earlier = _EARLIER
    if arch.name == name and _any_ends(keys, key):
        return Registered(earlier, tuple(option for option in arch.options if option[0] != "final_norm"))
    options = dict(arch.options)
    for beginning, option, key in _SWITCHES:
        has_forms = arch.name.startswith(beginning) and arch.name != earlier
        if has_forms and option not in options and _any_ends(keys, key):
            options[option] = 1
    return Registered(arch.name, tuple(options.items()))


def _any_ends(keys: Collection[str], key: str) -> bool:
    return any(f".{each}".endswith(f".{key}") for each in keys)


def nearest_network(
    tensors: Mapping[str, torch.Size], networks: Mapping[str, Callable[..., nn.Module]]
) -> Architecture | None:
    """Return the network whose keys are most like those of some weights, with its width; None if none is alike.

    Args:
        tensors: shape of each tensor, by its key without the names of wrappers.
        networks: our own, ``lustral.vision.models.NETWORKS``; common ones of torchvision are tried as well. Each is built once.
    """
    keys = {key for key in tensors if not key.endswith("num_batches_tracked")}
    best: tuple[float, Architecture | None] = (_FITS, None)
    for name, build in networks.items():
        arch = by_keys(Registered(name), keys)
        if not isinstance(arch, Registered) or arch.name != name:
            continue
        state = _narrow(build, tuple((option, bool(value)) for option, value in arch.options))
        if (likeness := _likeness(keys, state)) > best[0]:
            width = _width(tensors, state)
            named = (("width", width),) if width else ()
            best = likeness, Registered(name, (*named, *arch.options))
    return best[1] or _nearest_of_torchvision(keys)


def _nearest_of_torchvision(keys: Collection[str]) -> Architecture | None:
    from lustral.vision.models.architecture import Torchvision

    best: tuple[float, Architecture | None] = (_FITS, None)
    for name in _TORCHVISION:
        if (likeness := _likeness(keys, _keys_of_torchvision(name))) > best[0]:
            best = likeness, Torchvision(name)
    return best[1]


@cache  # a file may hold many sets of tensors that fit nothing
def _narrow(build: Callable[..., nn.Module], options: tuple[tuple[str, bool], ...]) -> Mapping[str, torch.Size]:
    """Return the shapes of a network of ours of width 1, by key."""
    with torch.device("meta"):
        return {
            key: tensor.shape for key, tensor in build(num_classes=2, width=1, **dict(options)).state_dict().items()
        }


@cache
def _keys_of_torchvision(name: str) -> frozenset[str]:
    from torchvision import models

    scheme = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        return frozenset(models.get_model(name, weights=None, num_classes=2, **scheme).state_dict())


def _likeness(keys: Collection[str], expected: Collection[str]) -> float:
    """Return the share of keys in common of those that either side has."""
    wanted = {key for key in expected if not key.endswith("num_batches_tracked")}
    if min(len(wanted), len(keys)) < _FITS * max(len(wanted), len(keys)):
        return 0.0  # too small a share in any case
    return len(wanted & set(keys)) / len(wanted | set(keys))


def _width(tensors: Mapping[str, torch.Size], narrow: Mapping[str, torch.Size]) -> int | None:
    """Return the width that makes a network of width 1 as wide as the weights; None if no whole number does."""
    heads = [key for key, shape in narrow.items() if len(shape) == 2 and key in tensors and len(tensors[key]) == 2]
    if not heads:
        return None
    width, rest = divmod(tensors[heads[-1]][1], narrow[heads[-1]][1])
    return None if rest else width
