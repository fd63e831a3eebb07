"""A block in which torch makes no large tensors, for code that computes sizes from numbers that a stranger wrote."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MAKERS = frozenset(
    {
        *(torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.randint, torch.randperm),
        *(torch.arange, torch.linspace, torch.eye),
    }
)


class TooLargeError(ValueError):
    """More memory was asked for than the block allows."""


class AllocationLimit(TorchFunctionMode):
    """Within the block, what torch makes by size alone may take so many bytes in all.

    What is computed from tensors that are there is not counted. Each request is sized on the meta device first, so that nothing
    is allocated for one that is refused.

    >>> with AllocationLimit(1000):
    ...     torch.zeros(10**12)
    Traceback (most recent call last):
        ...
    lustral.core.allocation.TooLargeError: it would take 4,000,000,000,000 bytes; expected 1,000 at most
    """

    def __init__(self, most_bytes: int) -> None:
        """Allow ``most_bytes`` in all."""
        super().__init__()
        self.most_bytes, self.taken = most_bytes, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Size a request, and pass it on."""
        kwargs = kwargs or {}
        if func in _MAKERS:
            outline = func(
                *args, **{k: v for k, v in kwargs.items() if k not in ("device", "generator", "out")}, device="meta"
            )
            self.taken += outline.nbytes
            if self.taken > self.most_bytes:
                raise TooLargeError(f"it would take {self.taken:,} bytes; expected {self.most_bytes:,} at most")
        return func(*args, **kwargs)
