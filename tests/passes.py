"""Counts what networks are given, whoever calls them: what a method says it cost can be compared with that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook


@contextmanager
def counting(image_shape: tuple[int, int, int], *, any_size: bool = False) -> Iterator[list[int]]:
    """Count the image passes of every network that is called, in thirds: a forward is one, with a backward three.

    A network is the outermost module that is given a batch of images, whoever made it: originals, copies, teachers, wrappers.
    With ``any_size``, crops of images count as well.
    """
    thirds, inside = [0], list[nn.Module]()

    def is_images(given: Tensor) -> bool:
        return given.ndim == 4 and given.shape[1] == image_shape[0] if any_size else given.shape[1:] == image_shape

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        first = inputs[0] if inputs else None
        if inside or (isinstance(first, Tensor) and is_images(first)):
            inside.append(module)

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if inside and inside.pop() is module and not inside and output is not None:
            thirds[0] += len(inputs[0]) * (3 if isinstance(output, Tensor) and output.requires_grad else 1)

    hooks = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        yield thirds
    finally:
        for hook in hooks:
            hook.remove()
