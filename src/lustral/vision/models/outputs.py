"""The logits in whatever a network returns: a tensor, or tuples, mappings and objects that hold one beside other things.

Networks return auxiliary heads while they train (GoogLeNet, Inception), features beside the logits, objects with a field
``logits`` (transformers), or one number for two classes. What is returned is not rescaled: probabilities and logarithms of them
have the largest class where logits have it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

NAMES = (
    *("logits", "logit", "class_logits", "out", "output", "outputs"),
    *("pred", "preds", "prediction", "predictions", "score", "scores", "y_hat", "y"),
)
_DEEPEST = 3  # containers inside each other


class NoLogitsError(ValueError):
    """A network returned nothing that could be logits."""


def logits_in(output: Any, batch: int, num_classes: int | None = None) -> Tensor:
    """Return the logits (B, K), K at least 2, in what a network returned for B images.

    Of several tensors, the first with ``num_classes`` columns is taken; else the first that a mapping or object keeps under
    one of ``NAMES``; else the first at all. One number z for an image, (B,) or (B, 1), is read as the logit of the second of two
    classes, [0, z]. (B, K, 1, 1) loses its last axes.

    Raises:
        NoLogitsError: there is no such tensor.

    >>> logits_in({"loss": torch.tensor(1.0), "logits": torch.tensor([[2.0], [-1.0]])}, 2)
    tensor([[ 0.,  2.],
            [ 0., -1.]])
    """
    found = [rows for tensor in _tensors(output, _DEEPEST) if (rows := _rows(tensor, batch)) is not None]
    many = [rows for rows in found if rows.shape[1] > 1]
    best = next((rows for rows in many if rows.shape[1] == num_classes), None)
    if best is not None:
        return best
    single = next((rows for rows in found if rows.shape[1] == 1), None)
    if single is not None and (num_classes == 2 or not many):
        return torch.cat([torch.zeros_like(single), single], 1)
    if many:
        return many[0]
    raise NoLogitsError(
        f"the network must return logits (B, K), alone or in a tuple, a mapping or an object; for {batch} images it gave "
        f"{_describe(output)}"
    )


def _tensors(output: Any, depth: int) -> Iterator[Tensor]:
    """Yield the tensors inside, those under a telling name first."""
    if isinstance(output, Tensor):
        yield output
    elif depth:
        named = _named(output)
        telling = [named[name] for name in NAMES if name in named]
        parts: Iterable[Any] = output if isinstance(output, list | tuple) else named.values()
        for part in (*telling, *parts):
            yield from _tensors(part, depth - 1)


def _named(output: Any) -> dict[str, Any]:
    """Return the parts of a mapping, a named tuple, a dataclass or a plain object, by name."""
    if isinstance(output, Mapping):
        return {str(name): part for name, part in output.items()}
    if isinstance(output, tuple):
        return {name: getattr(output, name) for name in getattr(output, "_fields", ())}
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return dict(getattr(output, "__dict__", {}))


def _rows(tensor: Tensor, batch: int) -> Tensor | None:
    """Return a tensor as (B, K), or None where it has no such form."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    if tensor.ndim < 2:  # one number for each image, or one image's row after a squeeze
        if tensor.numel() == batch:
            return tensor.reshape(batch, 1)
        return tensor.reshape(1, -1) if batch == 1 else None
    if tensor.shape[0] != batch or tensor.numel() != batch * tensor.shape[1]:
        return None
    return tensor.flatten(1)


def _describe(output: Any) -> str:
    """Return in short what came."""
    shapes = [tuple(tensor.shape) for tensor in _tensors(output, _DEEPEST)][:4]
    kind = type(output).__name__
    return f"{kind} with shapes {', '.join(map(str, shapes))}" if shapes else f"{kind} without tensors"
