"""Fit a state dict to a network: number of classes, image size, mismatches.

Nothing here opens a file; paths are for messages.

Errors::

    ValueError
    └── ModelFileError    a model file that is missing, damaged, unsafe, or does not fit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
PROBE_CLASSES = 1009  # prime, so that no other dimension of a network equals it
_LISTED = 8  # keys shown per kind of mismatch


class ModelFileError(ValueError):
    """A model file that cannot be used; the message says why and what to do."""


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors of unusual kinds, and weights that are not finite."""
    odd = [key for key, tensor in tensors.items() if not _is_plain(tensor)]
    if odd:
        raise ModelFileError(f"{path}: sparse, quantised, complex or overlapping tensors: {listing(odd)}")
    if bad := not_finite(tensors):
        raise ModelFileError(f"{path}: NaN or infinite weights in {listing(bad)}; this model cannot be judged")


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor has a common dtype and all its numbers in memory (so that no shape exceeds its file)."""
    return (
        type(tensor) is Tensor
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and tensor.dtype in _DTYPES
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that hold NaN or infinity."""
    return [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]


def compare_keys(
    path: Path,
    arch: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    shapes: bool,
    hint: Callable[[], str] = str,
) -> None:
    """Refuse keys (and shapes) that differ from the network's; ``hint`` is what the message says besides."""
    missing = [key for key in expected if key not in tensors and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in tensors if key not in expected]
    misshapen = [
        f"{key} {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}"
        for key in tensors
        if shapes and key in expected and tensors[key].shape != expected[key].shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    lists = [f"\n  {len(keys)} {kind}: {listing(keys)}" for kind, keys in kinds.items() if keys]
    if lists:
        raise ModelFileError(
            f"{path}: the weights do not fit {arch}; is it the right architecture?{hint()}{''.join(lists)}"
        )


def count_classes(path: Path, tensors: Mapping[str, Tensor], probe: Mapping[str, Tensor], *, asked: int | None) -> int:
    """Return the number of classes of the weights: the dimension that follows the classes in a network built for it.

    It is 1 for a network with one logit, where ``asked`` may be 2.
    """
    heads = [key for key, tensor in probe.items() if tensor.ndim and tensor.shape[0] == PROBE_CLASSES]
    if not heads:  # a network with classes of its own
        if asked is not None:
            return asked
        heads = [key for key, tensor in probe.items() if tensor.ndim >= 2][-1:]
    counts = {tensors[key].shape[0] if tensors[key].ndim else 0 for key in heads}
    if counts <= {1, 2} and 1 in counts and asked in (None, 2):
        return 1
    if len(counts) != 1:
        if asked is None:
            raise ModelFileError(f"{path}: the weights do not tell the number of classes; pass num_classes")
        return asked
    count = counts.pop()
    if asked not in (None, count):
        raise ModelFileError(f"{path}: the weights have {count} classes; expected {asked}")
    return count


def find_image_shape(path: Path, tensors: Mapping[str, Tensor], probe: Mapping[str, Tensor]) -> tuple[int, int, int]:
    """Return the (C, H, W) that a vision transformer's first convolution and positions imply."""
    stem = next((tensors[key] for key, tensor in probe.items() if tensor.ndim == 4), None)
    positions = next((tensors[key] for key in probe if key.endswith(("pos_embed", "pos_embedding"))), None)
    if stem is not None and stem.ndim == 4 and positions is not None and positions.ndim == 3:
        for extra_tokens in range(6):  # class, distillation and register tokens
            side = math.isqrt(max(positions.shape[1] - extra_tokens, 0))
            if side and side**2 == positions.shape[1] - extra_tokens:
                return stem.shape[1], side * stem.shape[2], side * stem.shape[3]
    known = f" ({stem.shape[1]} channels)" if stem is not None and stem.ndim == 4 else ""
    raise ModelFileError(f"{path}: the file does not tell the size of its images{known}; pass image_shape (C, H, W)")


def listing(names: Iterable[str], *, limit: int = _LISTED) -> str:
    """Return the first few names, and how many more there are."""
    shown = list(names)
    more = f", and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more
