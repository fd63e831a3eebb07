"""Named random streams: a new draw in one place never shifts the draws of another."""

from __future__ import annotations

import hashlib

import torch
from torch import Generator


def child(seed: int, *name: str | int) -> Generator:
    """Return an independent CPU stream for one purpose, e.g. ``child(7, "poison", "badnets")``.

    >>> a, b = child(7, "poison"), child(7, "poison")
    >>> bool((torch.rand(3, generator=a) == torch.rand(3, generator=b)).all())
    True
    """
    digest = hashlib.blake2b(repr((seed, name)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def fork(generator: Generator, *name: str | int) -> Generator:
    """Draw one number from a stream and return the independent CPU stream it names."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return child(seed, *name)


def on_device(generator: Generator, device: torch.device) -> Generator:
    """Return a stream on ``device`` seeded from ``generator``; for hot loops that draw where the tensors are."""
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    return torch.Generator(device=device).manual_seed(seed)
