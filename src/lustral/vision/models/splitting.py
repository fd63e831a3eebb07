"""Where a network can be cut in two: a stem whose one feature map is all that the head behind it sees of an image.

Found by watching passes of one image, so it holds for any ``nn.Module``, whatever its parts are called. A module is a cut
point if nothing of the image reaches the logits once its output is detached from what came before. The network itself stays
whole: the stem and the head are two lists of its tensors, and a hook hands the feature map over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lustral.training.modes import frozen
from lustral.vision.models.wiring import Wiring, trace

INSIDE = "network"  # where a ``Classifier`` has its network
LEAST_STEM = 0.5  # share of the layers before the head that a stem chosen by rule must hold: a stem of one layer protects nothing


@dataclass(frozen=True, kw_only=True)
class Split:
    """A network cut in two.

    Attributes:
        name: the module that the stem ends with; its output is the feature map.
        shape: (C, H, W) of that map, for the images that were watched.
        head_modules: names of the modules that run behind it and nowhere else.
        head_tensors: names of the parameters and buffers of the head; all others belong to the stem or are not used.
    """

    name: str
    shape: tuple[int, int, int]
    head_modules: frozenset[str]
    head_tensors: frozenset[str]


@dataclass(kw_only=True)
class _Call:
    """One module in a pass: when it began and ended, how often it ran, and the shape of its output if that is a feature map."""

    began: int
    ended: int = -1
    times: int = 1
    shape: tuple[int, ...] | None = None


def last_block(model: nn.Module, wiring: Wiring) -> str:
    """Return the module that holds the last convolution (or layer with weights, if none is one).

    It is that layer itself in a plain sequence, or where the module holds the layer that gives the logits as well.

    >>> vgg = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))
    >>> last_block(vgg, trace(vgg, torch.zeros(1, 3, 8, 8)))
    '2'

    Raises:
        ValueError: there is no layer with weights before the one that gives the logits.
    """
    if not wiring.layers:
        raise ValueError("expected a network with at least one layer with weights before its head")
    convolutions = [name for name in wiring.layers if isinstance(model.get_submodule(name), nn.Conv2d)]
    last = (convolutions or wiring.layers)[-1]
    parent = last.rpartition(".")[0]
    holds_all = parent == "" or wiring.head.startswith(f"{parent}.")
    return last if holds_all or type(model.get_submodule(parent)) is nn.Sequential else parent


def cut_points(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Return the names of all modules that a stem can end with, in the order in which they end. Takes a pass for each candidate.

    Args:
        model: classifier.
        images: (B, C, H, W) float32 in [0, 1]; one is enough.
    """
    calls, wiring = _calls(model, images), trace(model, images)
    return tuple(name for name in _candidates(calls, wiring) if _separates(model, images, name))


def split_at(model: nn.Module, images: Tensor, name: str | None = None) -> Split:
    """Cut a network behind a module; modes, gradients and hooks are restored.

    Args:
        model: classifier.
        images: (B, C, H, W) float32 in [0, 1]; one is enough.
        name: the module that the stem ends with; what ``Classifier`` puts before names may be left out. None: the last cut
            point before the last block, so that the head is the last block with weights and the classification.

    Raises:
        ValueError: the network cannot be cut there, or there is no place to cut by rule; the message names the cut points.
    """
    calls, wiring = _calls(model, images), trace(model, images)
    _require_gradients(model, images)
    candidates = _candidates(calls, wiring)
    if name is None:
        name = _default(model, images, calls, wiring, candidates)
    elif name not in calls and f"{INSIDE}.{name}" in calls:
        return split_at(model, images, f"{INSIDE}.{name}")
    elif name not in candidates or not _separates(model, images, name):
        known = ", ".join(cut_points(model, images)) or "none"
        raise ValueError(
            f"expected a module whose output is one feature map (B, C, H, W) that all later layers depend on; got {name!r}. "
            f"This network can be cut behind: {known}"
        )
    ended, shape = calls[name].ended, calls[name].shape
    assert shape is not None
    modules = frozenset(other for other, call in calls.items() if call.began > ended)
    tensors = _head_parameters(model, images, name)
    buffers = {buffer for buffer, _ in model.named_buffers() if buffer.rpartition(".")[0] in modules}
    channels, height, width = shape[1:]
    return Split(name=name, shape=(channels, height, width), head_modules=modules, head_tensors=tensors | buffers)


def last_map(model: nn.Module, images: Tensor) -> str | None:
    """Return the last module that hands all of an image on as one map of several pixels; None where there is no late one.

    In a convolutional network it is what global pooling, or the first linear layer, is given. The map has to come after at least
    half of the layers: the patches of a transformer are a map too, but nothing has been decided there.

    >>> vgg = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> last_map(vgg, torch.zeros(1, 3, 8, 8))
    '1'

    Args:
        model: classifier.
        images: (B, C, H, W) float32 in [0, 1]; one is enough.

    Raises:
        ValueError: the network passes no gradients to its images, or uses no layer with weights.
    """
    calls, wiring = _calls(model, images), trace(model, images)
    _require_gradients(model, images)
    layers = [calls[name].ended for name in wiring.layers if name in calls]
    for name in reversed(_candidates(calls, wiring)):
        call = calls[name]
        height, width = (call.shape or (0, 0, 0, 0))[2:]
        if sum(ended <= call.ended for ended in layers) < LEAST_STEM * len(layers):
            return None
        is_spatial = height * width > 1 and height <= images.shape[2] and width <= images.shape[3]
        if is_spatial and _separates(model, images, name):
            return name
    return None


def copy_stem(source: nn.Module, target: nn.Module, split: Split) -> None:
    """Write all tensors of ``source`` but those of the head into ``target``, a network of the same architecture, in place."""
    own = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    with torch.no_grad():
        for name, tensor in (*target.named_parameters(), *target.named_buffers()):
            if name not in split.head_tensors:
                tensor.copy_(own[name])


@contextmanager
def tapped(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """Collect what a module gives inside the block: copies, which layers that work in place do not change.

    Take the last one: a ``Classifier`` whose network cannot work in channels-last memory begins its first pass twice.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: object, output: Tensor) -> None:
        seen.append(output.clone())

    handle = model.get_submodule(name).register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


def _calls(model: nn.Module, images: Tensor) -> Mapping[str, _Call]:
    """Return the named modules that one pass uses, in the order in which they begin."""
    calls: dict[str, _Call] = {}
    clock = iter(range(2**62))
    names = {module: name for name, module in model.named_modules() if name}

    def begin(module: nn.Module, inputs: object) -> None:
        call = calls.setdefault(names[module], _Call(began=next(clock), times=0))
        call.times += 1

    def end(module: nn.Module, inputs: object, output: object) -> None:
        call = calls[names[module]]
        call.ended = next(clock)
        is_map = isinstance(output, Tensor) and output.ndim == 4 and len(output) == len(images)
        call.shape = tuple(output.shape) if is_map and isinstance(output, Tensor) else None

    handles: list[RemovableHandle] = []
    for module in names:
        handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    try:
        with frozen(model), torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _candidates(calls: Mapping[str, _Call], wiring: Wiring) -> list[str]:
    """Return the modules with a feature map behind the first layer with weights and before the last, as they end."""
    used = [calls[name] for name in (*wiring.layers, wiring.head) if name in calls]
    if not used:  # the network is one layer
        return []
    first, last = min(call.ended for call in used), max(call.began for call in used)
    found = [
        (call.ended, name)
        for name, call in calls.items()
        if call.shape is not None and call.times == 1 and first <= call.ended < last
    ]
    return [name for _, name in sorted(found)]


def _default(
    model: nn.Module, images: Tensor, calls: Mapping[str, _Call], wiring: Wiring, candidates: list[str]
) -> str:
    """Return the last cut point before the last block, if the stem is then worth its name."""
    if wiring.layers:
        began = calls[last_block(model, wiring)].began
        for name in reversed([name for name in candidates if calls[name].ended < began]):
            before = sum(calls[layer].ended <= calls[name].ended for layer in wiring.layers)
            if before < LEAST_STEM * len(wiring.layers):
                break
            if _separates(model, images, name):
                return name
    known = ", ".join(cut_points(model, images)) or "none; use another architecture"
    raise ValueError(
        "found no place before the last block where this network passes through one feature map (B, C, H, W) with half of its "
        f"layers before it. Name the module that the stem shall end with, among: {known}"
    )


def _require_gradients(model: nn.Module, images: Tensor) -> None:
    """Raise ``ValueError`` if no gradient reaches the image: then nothing can be said of what depends on it, or learnt."""
    with frozen(model), torch.enable_grad():
        logits: Tensor = model(images.detach().clone().requires_grad_() * 1)
    if not logits.requires_grad:
        raise ValueError("expected a network that passes gradients to its images; this one computes without them")


def _separates(model: nn.Module, images: Tensor, name: str) -> bool:
    """Tell whether the logits depend on the image through this module's output alone."""

    def cut(_: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.detach()

    with frozen(model), torch.enable_grad():
        start = images.detach().clone().requires_grad_()
        handle = model.get_submodule(name).register_forward_hook(cut)
        try:
            logits: Tensor = model(start * 1)  # a network may work on its input in place
        finally:
            handle.remove()
    return not logits.requires_grad


def _head_parameters(model: nn.Module, images: Tensor, name: str) -> frozenset[str]:
    """Return the names of the parameters that the logits depend on behind a cut.

    Raises:
        ValueError: the head has none, or shares some with the stem.
    """
    maps: list[Tensor] = []

    def cut(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        maps.append(output.clone())
        return output.detach().clone()

    with frozen(model), torch.enable_grad():
        model.requires_grad_(True)
        names, parameters = zip(*model.named_parameters(), strict=True)
        handle = model.get_submodule(name).register_forward_hook(cut)
        try:
            logits: Tensor = model(images)
        finally:
            handle.remove()
        used = [torch.autograd.grad(out.float().sum(), parameters, allow_unused=True) for out in (logits, maps[-1])]
    head, stem = ({own for own, slope in zip(names, slopes, strict=True) if slope is not None} for slopes in used)
    if not head or head & stem:
        said = (
            f"shares {', '.join(sorted(head & stem))} with what is behind it" if head else "leaves no weights behind it"
        )
        raise ValueError(f"the network cannot be cut behind {name!r}: the part before {said}")
    return frozenset(head)
