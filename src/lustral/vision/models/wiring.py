"""What runs inside a network when images pass: which layers with weights, in which order, and which norm takes whose output.

Found by watching one forward pass, so it holds for any ``nn.Module``, whatever its parts are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True, kw_only=True)
class Wiring:
    """The layers of a network as images meet them.

    Attributes:
        layers: names of convolutions and linear layers in the order of their first use, without the head.
        head: name of the one whose outputs are the logits; where none are seen to be, of the last. Those used after it, as
            auxiliary heads are, are left out of ``layers``.
        normed: for each of ``layers`` whose output goes straight into a batch normalisation: that one's name.
    """

    layers: tuple[str, ...]
    head: str
    normed: Mapping[str, str]


def trace(model: nn.Module, images: Tensor) -> Wiring:
    """Watch one forward pass, in evaluation mode; modes and hooks are restored.

    Args:
        model: classifier.
        images: (B, C, H, W) float32 in [0, 1]; one is enough.

    Raises:
        ValueError: no layer with weights was used.
    """
    names = {module: name for name, module in model.named_modules()}
    order: dict[str, None] = {}
    produced: list[tuple[Tensor, int, str]] = []  # keeps the tensors alive, so that identity means sameness
    normed: dict[str, str] = {}

    def note_layer(module: nn.Module, inputs: Any, output: Tensor) -> None:
        order[names[module]] = None
        produced.append((output, output._version, names[module]))

    def note_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for tensor, version, name in produced:
            if tensor is inputs[0] and tensor._version == version:  # a shortcut may have been added in place
                normed[name] = names[module]

    handles = []
    for module in names:
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(note_layer))
        elif isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(note_norm))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            logits = model(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not order:
        raise ValueError("expected a network with convolutions or linear layers; none was used by an image")
    names_in_order = list(order)
    ends = [name for tensor, _, name in produced if _same(tensor, logits)]
    head = ends[-1] if ends else names_in_order[-1]
    layers = names_in_order[: names_in_order.index(head)]
    return Wiring(layers=tuple(layers), head=head, normed={k: v for k, v in normed.items() if k != head})


def _same(first: Tensor, second: Any) -> bool:
    """Tell whether two values are one tensor, or views of the same numbers in the same shape."""
    if not isinstance(second, Tensor):
        return False
    return first.shape == second.shape and first.data_ptr() == second.data_ptr()


def late_layer(model: nn.Module, wiring: Wiring) -> str:
    """Return the layer at which the last block's features enter: where a filter for late features belongs.

    It is the first layer with weights of the module that holds the last one before the head: ``conv1`` of the last block of
    a ResNet, the first linear layer of the last MLP of a transformer or ConvNeXt. In a plain ``nn.Sequential`` (VGG), which
    holds the whole network, it is the last layer itself.

    >>> vgg = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    >>> late_layer(vgg, trace(vgg, torch.zeros(1, 3, 8, 8)))
    '2'
    """
    if not wiring.layers:
        raise ValueError("expected a network with at least one layer with weights before its head")
    last = wiring.layers[-1]
    parent = last.rpartition(".")[0]
    if type(model.get_submodule(parent)) is nn.Sequential or parent == "":
        return last
    return next(name for name in wiring.layers if name.rpartition(".")[0] == parent)
